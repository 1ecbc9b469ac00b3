// Which latents are listed, in which order.
import MiniSearch from "minisearch";
import type { Run } from "./data";
import { COLUMNS, type Column, type View } from "./route";

export function values(run: Run, column: Column): ArrayLike<number> | null {
  return column === "images" ? run.images : run[column];
}

const plain = (word: string) => word.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();

/** Finds latents by names of classes and files. The index is made when it is first needed. */
export class Search {
  private index: MiniSearch | null = null;
  private readonly latents = new Map<string, number[]>();

  constructor(private readonly run: Run) {}

  find(query: string): Set<number> {
    const words = query.trim().replace(/^#/, "");
    const found = new Set<number>();
    if (/^\d+$/.test(words)) {
      for (let i = 0; i < this.run.facts.nLatents; i++) if (String(i).startsWith(words)) found.add(i);
      if (found.size) return found;
    }
    this.index ??= this.build();
    for (const { id } of this.index.search(words, { prefix: true, combineWith: "AND" }))
      for (const latent of this.latents.get(id) ?? []) found.add(latent);
    return found;
  }

  private build(): MiniSearch {
    const { facts } = this.run;
    const index = new MiniSearch({ fields: ["text"], processTerm: plain });
    const add = (id: string, text: string) => {
      this.latents.set(id, []);
      index.add({ id, text });
    };
    facts.classes.forEach((name, i) => add(`c${i}`, name));
    facts.files.forEach((name, i) => add(`i${i}`, `${name} ${this.run.label(i)}`));
    for (let i = 0; i < facts.nLatents; i++)
      if (this.run.usual[i] >= 0) this.latents.get(`c${this.run.usual[i]}`)!.push(i);
    for (const [latent, image] of this.run.pairs()) this.latents.get(`i${image}`)!.push(latent);
    return index;
  }
}

/** The latents that a view lists, in order. */
export function listed(run: Run, search: Search, view: View): Uint32Array {
  const found = view.query.trim() ? search.find(view.query) : null;
  const ranges = COLUMNS.flatMap((column) => {
    const range = view.ranges[column];
    const column_values = values(run, column);
    return range && column_values ? [[column_values, ...range] as const] : [];
  });
  const shown: number[] = [];
  for (let i = 0; i < run.facts.nLatents; i++) {
    if (found && !found.has(i)) continue;
    if (view.classNumber !== null && run.usual[i] !== view.classNumber) continue;
    if (ranges.every(([column, low, high]) => column[i] >= low && column[i] <= high)) shown.push(i);
  }
  const down = view.sort.startsWith("-");
  const name = view.sort.replace(/^-/, "");
  const key =
    name === "latent" ? null
    : (COLUMNS as readonly string[]).includes(name) ? (values(run, name as Column) ?? run.rank)
    : run.rank;
  const sign = down ? -1 : 1;
  if (key) shown.sort((a, b) => sign * (key[a] - key[b]) || a - b);
  else if (down) shown.reverse();
  return Uint32Array.from(shown);
}
