// The source that is a server, `saev serve`. docs/explorer.md lists its addresses.
import { BrowserNotes, checked } from "./notes";
import type {
  ClassFacts, Column, Comparison, Detail, Example, Facts, Finding, Group, Match, Note, Notes, NoteStore, Numbers, Run, Source, Summary,
} from "./source";

interface Sae {
  key: string;
  name: string;
  measured: boolean;
  shards: string;
  /** Which images the figures are of, in words. */
  images: string;
  config: Record<string, unknown>;
  [figure: string]: unknown;
}

interface RootAnswer {
  /** Whether the server keeps notes. */
  notes: boolean;
  saes: Sae[];
  problems: string[];
}

interface RunAnswer {
  title: string;
  subtitle: string;
  headline: [label: string, text: string, hint: string][];
  warnings: string[];
  activations: string;
  inference: string;
  n_latents: number;
  n_tokens: number;
  n_images: number;
  grid: [number, number];
  figures: Column[];
  classes: (ClassFacts & { class: number })[];
  side: string;
  has_held_out: boolean;
  has_codes: boolean;
}

interface ExampleAnswer {
  kind: "top" | "spread";
  example: number;
  side: Example["side"];
  value: number;
  quantile: number | null;
  patches: number[];
  patch_values: number[];
  path: string | null;
  label: string | null;
}

interface ScoreAnswer {
  ap: number | null;
  ap_held_out: number | null;
  rate_inside: number | null;
  rate_inside_held_out: number | null;
  rate_outside: number | null;
  rate_outside_held_out: number | null;
}

interface LatentAnswer {
  figures: {
    histogram_first: number | null;
    histogram: number[] | null;
    quantiles: number[] | null;
    neighbours: number[] | null;
    neighbour_cosines: number[] | null;
    coactive: number[] | null;
    coactive_cosines: number[] | null;
  };
  quantile_shares: number[] | null;
  examples: ExampleAnswer[];
  classes: (ScoreAnswer & { class: number })[];
}

interface ClassesAnswer {
  classes: { class: number; best: (ScoreAnswer & { latent: number })[] }[];
}

interface MatchesAnswer {
  matches: { run: string; name: string; latent: number; cosine: number }[];
}

interface CompareAnswer {
  groups: { n: number }[];
  first: { latent: number; rates: [number, number] }[];
  second: { latent: number; rates: [number, number] }[];
}

type Curves = Record<string, [steps: number[], values: number[]]>;

const ARRAYS = { f4: Float32Array, f8: Float64Array, i4: Int32Array };
const [BINS_PER_OCTAVE, LOW_EXPONENT] = [8, -12];
/** Figures of the page of all SAEs. */
const FIGURES = [
  "nmse", "l0", "n_dead", "training_nmse", "training_l0", "all_nmse", "all_l0", "dense_share", "d_sae",
];
/** Pixels of the longer side of pictures. */
const SIZE = 224;
/** Status of HTTP where another one has changed something meanwhile, and how often to try again. */
const [CHANGED, TRIES] = [412, 4];
/** Latents whose first images are asked for at once. */
const AT_ONCE = 100;

/** An answer, good or bad. Addresses are relative to the page: a proxy may show it below any path. */
async function send(path: string, more: RequestInit = {}): Promise<Response> {
  try {
    return await fetch(`api/${path}`, { credentials: "same-origin", ...more });
  } catch {
    throw new Error("The server does not answer. Is `saev serve` still running?");
  }
}

/** What a bad answer says, in the server's words. */
async function problem(answer: Response): Promise<Error> {
  try {
    const { detail, remedy } = (await answer.json()) as { detail: string; remedy: string };
    return new Error(`${detail} ${remedy}`);
  } catch {
    // Something between the page and the server has answered.
    return new Error(`The server answered with status ${answer.status}.`);
  }
}

/** A good answer; a bad one is an error. */
async function ask(path: string): Promise<Response> {
  const answer = await send(path);
  if (!answer.ok) throw await problem(answer);
  return answer;
}

const json = async <T>(path: string): Promise<T> => (await (await ask(path)).json()) as T;
const orNaN = (value: number | null) => value ?? NaN;

/** Columns as saev/serve/columns.py packs them. */
function unpacked(buffer: ArrayBuffer): { values: Map<string, Numbers>; texts: Map<string, string[]> } {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length))) as {
    columns: { name: string; dtype: keyof typeof ARRAYS; start: number; length: number; dictionary?: string[] }[];
  };
  const values = new Map<string, Numbers>();
  const texts = new Map<string, string[]>();
  for (const { name, dtype, start, length: n, dictionary } of head.columns) {
    const array = new ARRAYS[dtype](buffer, 4 + length + start, n);
    if (dictionary) texts.set(name, Array.from(array, (place) => dictionary[place] ?? ""));
    else values.set(name, array);
  }
  return { values, texts };
}

/** Questions about single latents, put together to one. */
class Together<T> {
  private waiting = new Map<number, ((answer: Promise<T>) => void)[]>();

  constructor(private readonly askAll: (latents: number[]) => Promise<Record<string, T>>) {}

  ask(latent: number): Promise<T> {
    return new Promise((take) => {
      if (!this.waiting.size) setTimeout(() => this.send(), 0);
      const takers = this.waiting.get(latent);
      if (takers) takers.push(take);
      else this.waiting.set(latent, [take]);
    });
  }

  private send(): void {
    const all = [...this.waiting];
    this.waiting = new Map();
    for (let i = 0; i < all.length; i += AT_ONCE) {
      const some = all.slice(i, i + AT_ONCE);
      const answers = this.askAll(some.map(([latent]) => latent));
      for (const [latent, takers] of some)
        for (const take of takers) take(answers.then((found) => found[latent]));
    }
  }
}

class LiveRun implements Run {
  readonly facts: Facts;
  readonly order: Numbers;
  private readonly place = new Map<number, number>();
  private readonly values_: Map<string, Numbers>;
  private readonly texts: Map<string, string[]>;
  private readonly first = new Map<number, Together<ExampleAnswer[]>>();

  constructor(readonly id: string, private readonly said: RunAnswer, figures: ArrayBuffer) {
    const { values, texts } = unpacked(figures);
    [this.values_, this.texts] = [values, texts];
    said.classes.forEach((one, i) => this.place.set(one.class, i));
    for (const key of ["class", "mask"])
      values.set(key, Int32Array.from(values.get(key)!, (one) => this.place.get(one) ?? -1));
    this.order = values.get("order")!;
    let nFiring = 0;
    for (const tokens of values.get("tokens")!) nFiring += Number(tokens > 0);
    this.facts = {
      title: said.title,
      subtitle: said.subtitle,
      metrics: said.headline,
      warnings: said.warnings,
      activations: said.activations,
      results: said.inference,
      nLatents: said.n_latents,
      nTokens: said.n_tokens,
      nImages: said.n_images,
      nFiring,
      nPictured: nFiring,
      nDetailed: nFiring,
      grid: said.grid,
      aspect: said.grid[1] / said.grid[0],
      columns: said.figures,
      classes: said.classes.map(({ name, kind, support }) => ({ name, kind, support })),
      side: said.side,
    };
  }

  has(key: string): boolean {
    return this.values_.has(key);
  }

  values(key: string): Numbers {
    return this.values_.get(key)!;
  }

  nameOf(latent: number): string {
    const best = [this.values("class")[latent], this.values("mask")[latent]].find((one) => one >= 0);
    return this.texts.get("name")?.[latent] || (best === undefined ? "" : this.facts.classes[best].name);
  }

  private get path(): string {
    return `runs/${encodeURIComponent(this.id)}`;
  }

  async examples(latent: number, most: number): Promise<Example[]> {
    let together = this.first.get(most);
    if (!together) {
      together = new Together((latents) => json(`${this.path}/examples?latents=${latents.join(",")}&n=${most}`));
      this.first.set(most, together);
    }
    return (await together.ask(latent)).map(example);
  }

  async latent(latent: number): Promise<Detail> {
    const { figures, quantile_shares, examples, classes } = await json<LatentAnswer>(`${this.path}/latents/${latent}`);
    return {
      examples: examples.map(example),
      histogram: histogram(figures.histogram_first, figures.histogram),
      quantiles: (figures.quantiles ?? []).map((value, i) => [quantile_shares?.[i] ?? NaN, value]),
      classes: classes.map((one) => this.finding(latent, one.class, one)),
      neighbours: near(figures.neighbours, figures.neighbour_cosines),
      coactive: near(figures.coactive, figures.coactive_cosines),
      matches: this.matches(latent),
    };
  }

  /** None if they cannot be computed: the weights of SAEs may be gone. */
  private async matches(latent: number): Promise<Match[]> {
    try {
      const { matches } = await json<MatchesAnswer>(`${this.path}/latents/${latent}/matches`);
      return matches.map(({ run, name, latent: theirs, cosine }) => ({ run, title: name, latent: theirs, cosine }));
    } catch {
      return [];
    }
  }

  private finding(latent: number, one: number, score: ScoreAnswer): Finding {
    const heldOut = this.said.has_held_out;
    return {
      latent,
      class: this.place.get(one) ?? -1,
      inside: orNaN(heldOut ? score.rate_inside_held_out : score.rate_inside),
      outside: orNaN(heldOut ? score.rate_outside_held_out : score.rate_outside),
      ap: orNaN(heldOut ? score.ap_held_out : score.ap),
      apAll: orNaN(score.ap),
    };
  }

  async picture(one: number): Promise<Blob | null> {
    try {
      return await (await ask(`${this.path}/pictures/${one}/${SIZE}`)).blob();
    } catch {
      return null;
    }
  }

  async findings(): Promise<Finding[]> {
    const { classes } = await json<ClassesAnswer>(`${this.path}/classes`);
    return classes.flatMap((one) => one.best.map((score) => this.finding(score.latent, one.class, score)));
  }

  async search(query: string): Promise<Set<number>> {
    const { latents } = await json<{ latents: number[] }>(`${this.path}/search?q=${encodeURIComponent(query)}`);
    return new Set(latents);
  }

  readonly groups: Group["kind"][] = ["class", "latent", "images", "rest"];

  async compare(a: Group, b: Group): Promise<Comparison> {
    const said = (group: Group) =>
      group.kind === "class" ? `class:${this.said.classes[group.class].class}`
      : group.kind === "latent" ? `latent:${group.latent}`
      : group.kind === "images" ? `images:${group.examples.join(",")}`
      : "rest";
    const words = new URLSearchParams({ a: said(a), b: said(b) });
    const { groups, first, second } = await json<CompareAnswer>(`${this.path}/compare?${words}`);
    const rows = [...first, ...second.reverse()].map(({ latent, rates }) => ({ latent, a: rates[0], b: rates[1] }));
    return { n: [groups[0].n, groups[1].n], rows };
  }
}

/** The notes that all share who use a server with `--notes`; without it, those of this browser. */
class LiveNotes implements NoteStore {
  private readonly own = new BrowserNotes();
  /** Of the notes on the server, as they were read or written last; null: there are none there. */
  private version: string | null = null;
  private there: Notes = {};
  /** What the page has. */
  private here: Notes = {};

  /** @param isKept whether the server keeps notes. */
  constructor(private readonly isKept: () => Promise<boolean>) {}

  get where(): string | null {
    return this.version === null ? this.own.where : "on the server, for all who use it";
  }

  async read(): Promise<Notes> {
    if (!(await this.isKept())) return this.own.read();
    await this.look();
    this.here = this.there;
    return this.there;
  }

  private async look(): Promise<void> {
    const answer = await ask("notes");
    this.version = answer.headers.get("ETag") ?? "";
    this.there = checked(await answer.json());
  }

  /** Writes what has changed on this page. What others have written meanwhile stays. */
  async write(notes: Notes): Promise<void> {
    if (this.version === null) return this.own.write(notes);
    const before = this.here;
    this.here = notes;
    for (let tries = 0; tries < TRIES; tries++) {
      const wanted = changed(before, notes, this.there);
      const headers = { "If-Match": this.version, "Content-Type": "application/json" };
      const answer = await send("notes", { method: "PUT", body: JSON.stringify(wanted), headers });
      if (answer.status === CHANGED) await this.look();
      else {
        if (!answer.ok) throw await problem(answer);
        this.version = answer.headers.get("ETag") ?? "";
        this.there = wanted;
        return;
      }
    }
    throw new Error("Others write notes at the same time: the last change is not kept.");
  }
}

/** `there` with what changed from `before` to `after`. */
function changed(before: Notes, after: Notes, there: Notes): Notes {
  const found: Notes = { ...there };
  for (const results of new Set([...Object.keys(before), ...Object.keys(after)])) {
    const [old, mine] = [before[results] ?? {}, after[results] ?? {}];
    const notes: Record<string, Note> = { ...found[results] };
    for (const latent of new Set([...Object.keys(old), ...Object.keys(mine)])) {
      if (JSON.stringify(old[latent]) === JSON.stringify(mine[latent])) continue;
      if (mine[latent]) notes[latent] = mine[latent];
      else delete notes[latent];
    }
    found[results] = notes;
  }
  return found;
}

const example = (one: ExampleAnswer): Example => {
  // -1 is the class token, which has no place in the image.
  const inside = one.patches.flatMap((patch, i) => (patch < 0 ? [] : [i]));
  return {
    example: one.example,
    file: (one.path ?? "").split("/").at(-1)!,
    label: one.label ?? "",
    kind: one.kind,
    value: one.value,
    quantile: orNaN(one.quantile),
    side: one.side,
    patches: inside.map((i) => one.patches[i]),
    values: inside.map((i) => one.patch_values[i]),
  };
};

function histogram(first: number | null, counts: number[] | null): Detail["histogram"] {
  if (first === null || !counts?.length) return null;
  const edge = (bin: number) =>
    2 ** (Math.floor(bin / BINS_PER_OCTAVE) + LOW_EXPONENT) * (1 + (bin % BINS_PER_OCTAVE) / BINS_PER_OCTAVE);
  return { edges: Array.from({ length: counts.length + 1 }, (_, i) => edge(first + i)), counts };
}

const near = (latents: number[] | null, cosines: number[] | null) =>
  (latents ?? []).map((latent, i) => ({ latent, cosine: cosines?.[i] ?? NaN }));

/** Entries of a config as text, by dotted keys. */
function flat(config: Record<string, unknown>, before = ""): Record<string, string> {
  const found: Record<string, string> = {};
  for (const [key, value] of Object.entries(config))
    if (value !== null && typeof value === "object" && !Array.isArray(value))
      Object.assign(found, flat(value as Record<string, unknown>, `${before}${key}.`));
    else found[`${before}${key}`] = Array.isArray(value) ? value.join(", ") : String(value ?? "");
  return found;
}

function summary(sae: Sae, curves: Curves): Summary {
  const known = FIGURES.map((key) => [key, sae[key]]).filter(([, value]) => typeof value === "number");
  const figures = Object.fromEntries(known) as Record<string, number>;
  return {
    id: sae.key,
    title: sae.name,
    dataset: sae.shards.split("/").at(-1) ?? "",
    figures,
    side: sae.images,
    config: flat(sae.config),
    curves,
    isMeasured: sae.measured,
  };
}

export class LiveSource implements Source {
  readonly kind = "server";
  readonly notes = new LiveNotes(async () => (await this.root()).notes);
  private rootAnswer: Promise<RootAnswer> | null = null;
  private readonly opened = new Map<string, Promise<Run>>();

  async runs(): Promise<Summary[]> {
    const [root, curves] = await Promise.all([this.root(), json<Record<string, Curves>>("curves")]);
    return root.saes.map((sae) => summary(sae, curves[sae.key] ?? {}));
  }

  private root(): Promise<RootAnswer> {
    this.rootAnswer ??= json<RootAnswer>("root");
    return this.rootAnswer;
  }

  open(id: string): Promise<Run> {
    let found = this.opened.get(id);
    if (!found) {
      found = this.read(id);
      this.opened.set(id, found);
      found.catch(() => this.opened.delete(id)); // the next one tries again
    }
    return found;
  }

  private async read(id: string): Promise<Run> {
    const path = `runs/${encodeURIComponent(id)}`;
    const [said, figures] = await Promise.all([json<RunAnswer>(path), ask(`${path}/figures`)]);
    return new LiveRun(id, said, await figures.arrayBuffer());
  }
}
