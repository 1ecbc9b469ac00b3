// The source that is this file itself: facts as JSON, numbers as compressed blocks, pictures.
// saev/explorer/page.py writes it.
import { BrowserNotes } from "./notes";
import { TextSearch } from "./search";
import type {
  Comparison, Detail, Difference, Example, Facts, Finding, Group, Match, Near, Numbers, Run, Source, Summary,
} from "./source";

interface FileFacts extends Facts {
  summary: Omit<Summary, "id" | "dataset" | "isMeasured">;
  dataset: string;
  /** Of the pictures: name and class of each image. */
  files: string[];
  labelNames: string[];
  labels: number[];
  names?: string[];
  kinds: Record<string, [kind: string, scale: number]>;
}

const ARRAYS = {
  f4: Float32Array, f8: Float64Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i2: Int16Array,
  i4: Int32Array,
};
const NAN = -(2 ** 15);
const SIDES = ["unknown", "training", "held-out"] as const;
const [BINS_PER_OCTAVE, LOW_EXPONENT] = [4, -12];

const textOf = (id: string) => document.getElementById(id)?.textContent ?? "";

function bytes(text: string): Uint8Array<ArrayBuffer> {
  const raw = atob(text);
  const out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}

async function unpacked(text: string): Promise<ArrayBuffer> {
  const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** Where each of several runs of entries begins, and where the last one ends. */
function starts(lengths: Numbers): Uint32Array {
  const out = new Uint32Array(lengths.length + 1);
  for (let i = 0; i < lengths.length; i++) out[i + 1] = out[i] + lengths[i];
  return out;
}

async function readBlocks(number: number, kinds: FileFacts["kinds"]): Promise<Map<string, Numbers>> {
  const read = async ([name, [kind, scale]]: [string, [string, number]]): Promise<[string, Numbers]> => {
    const array = new ARRAYS[kind as keyof typeof ARRAYS](await unpacked(textOf(`b${number}-${name}`)));
    const scaled = scale === 1 ? array : Float32Array.from(array, (v) => (v === NAN ? NaN : v * scale));
    return [name, scaled];
  };
  return new Map(await Promise.all(Object.entries(kinds).filter(([, [kind]]) => kind).map(read)));
}

class FileRun implements Run {
  readonly id: string;
  readonly order: Numbers;
  private readonly exampleStarts: Uint32Array;
  private readonly patchStarts: Uint32Array;
  private readonly pictureStarts: Uint32Array;
  private readonly binStarts: Uint32Array;
  private readonly findingStarts: Uint32Array;
  private readonly pictures = new Map<number, number>();
  private pictureText: string | null = null;
  private searched: { text: TextSearch; latents: number[][] } | null = null;

  constructor(
    readonly facts: FileFacts, private readonly number: number, private readonly blocks: Map<string, Numbers>,
    /** Of all SAEs in the file. */
    private readonly titles: string[],
  ) {
    this.id = String(number);
    this.order = this.block("order");
    this.exampleStarts = starts(this.block("examples"));
    this.patchStarts = starts(this.block("patches"));
    this.binStarts = starts(this.block("binCount"));
    this.findingStarts = starts(this.block("findings"));
    this.pictureStarts = starts(Uint32Array.from(this.block("pictureBytes"), (n) => Math.ceil(n / 3) * 3));
    this.block("row").forEach((example, i) => this.pictures.set(example, i));
  }

  private block(name: string): Numbers {
    return this.blocks.get(name)!;
  }

  has(key: string): boolean {
    return this.blocks.has(key);
  }

  values(key: string): Numbers {
    return this.block(key);
  }

  nameOf(latent: number): string {
    const best = [this.block("class")[latent], this.block("mask")[latent]].find((one) => one >= 0);
    return this.facts.names?.[latent] || (best === undefined ? "" : this.facts.classes[best].name);
  }

  async examples(latent: number, most: number): Promise<Example[]> {
    const [first, last] = [this.exampleStarts[latent], this.exampleStarts[latent + 1]];
    const found: Example[] = [];
    for (let i = first; i < Math.min(last, first + most); i++) found.push(this.example(latent, i));
    const thumb = this.block("thumb")[latent];
    return found.length || thumb < 0 ? found : [this.bare(latent, thumb)];
  }

  private example(latent: number, i: number): Example {
    const [first, last] = [this.patchStarts[i], this.patchStarts[i + 1]];
    const high = this.peak(latent);
    return {
      ...this.image(this.block("image")[i]),
      kind: this.block("kind")[i] ? "spread" : "top",
      value: this.block("value")[i],
      quantile: this.block("quantile")[i],
      side: SIDES[this.block("side")[i]],
      patches: this.block("patch").subarray(first, last),
      values: Float32Array.from(this.block("level").subarray(first, last), (level) => (level / 255) * high),
    };
  }

  /** The strongest image of a latent for which the file had no room for more. */
  private bare(latent: number, image: number): Example {
    const value = this.peak(latent);
    return { ...this.image(image), kind: "top", value, quantile: 1, side: "unknown", patches: null, values: [] };
  }

  private image(image: number): Pick<Example, "example" | "file" | "label"> {
    const { files, labels, labelNames } = this.facts;
    return { example: this.block("row")[image], file: files[image], label: labelNames[labels[image]] };
  }

  private peak(latent: number): number {
    return (this.blocks.get("max_all") ?? this.block("max"))[latent];
  }

  async latent(latent: number): Promise<Detail> {
    return {
      examples: await this.examples(latent, Infinity),
      histogram: this.histogram(latent),
      quantiles: [],
      classes: this.findingsOf(latent),
      neighbours: this.near("neighbour", latent),
      coactive: this.near("coactive", latent),
      matches: this.matchesOf(latent),
    };
  }

  private histogram(latent: number): Detail["histogram"] {
    const [first, last] = [this.binStarts[latent], this.binStarts[latent + 1]];
    if (first === last) return null;
    const at = this.block("binFirst")[latent];
    const heights = Array.from(this.block("bins").subarray(first, last), (height) => (height / 255) ** 2);
    const sum = heights.reduce((a, b) => a + b, 0);
    const tokens = this.block("tokens")[latent];
    const edge = (bin: number) =>
      2 ** (Math.floor(bin / BINS_PER_OCTAVE) + LOW_EXPONENT) * (1 + (bin % BINS_PER_OCTAVE) / BINS_PER_OCTAVE);
    return {
      edges: Array.from({ length: heights.length + 1 }, (_, i) => edge(at + i)),
      counts: heights.map((height) => (height / sum) * tokens),
    };
  }

  private findingsOf(latent: number): Finding[] {
    const found: Finding[] = [];
    for (let i = this.findingStarts[latent]; i < this.findingStarts[latent + 1]; i++)
      found.push({
        latent,
        class: this.block("findingClass")[i],
        inside: this.block("findingInside")[i],
        outside: this.block("findingOutside")[i],
        ap: this.block("findingAp")[i],
        apAll: this.block("findingApAll")[i],
      });
    return found;
  }

  private near(kind: "neighbour" | "coactive", latent: number): Near[] {
    if (!this.has(kind)) return [];
    const [which, cosines] = [this.block(kind), this.block(`${kind}Cosine`)];
    const width = which.length / this.facts.nLatents;
    const found: Near[] = [];
    for (let i = latent * width; i < (latent + 1) * width; i++)
      if (which[i] < this.facts.nLatents) found.push({ latent: which[i], cosine: cosines[i] });
    return found;
  }

  private matchesOf(latent: number): Match[] {
    const found: Match[] = [];
    this.titles.forEach((title, other) => {
      if (!this.has(`match${other}`)) return;
      const cosine = this.block(`match${other}Cosine`)[latent];
      if (!Number.isNaN(cosine)) found.push({ run: String(other), title, latent: this.block(`match${other}`)[latent], cosine });
    });
    return found;
  }

  /** Pictures begin at multiples of three bytes, so of four letters. */
  async picture(example: number): Promise<Blob | null> {
    const image = this.pictures.get(example);
    if (image === undefined) return null;
    this.pictureText ??= textOf(`b${this.number}-pictures`);
    const [first, last] = [this.pictureStarts[image], this.pictureStarts[image + 1]];
    const found = bytes(this.pictureText.slice((first / 3) * 4, (last / 3) * 4));
    return new Blob([found.subarray(0, this.block("pictureBytes")[image])], { type: "image/webp" });
  }

  async findings(): Promise<Finding[]> {
    const found: Finding[] = [];
    for (let latent = 0; latent < this.facts.nLatents; latent++) found.push(...this.findingsOf(latent));
    const score = ({ apAll }: Finding) => (Number.isNaN(apAll) ? -1 : apAll);
    return found.sort((a, b) => a.class - b.class || score(b) - score(a) || a.latent - b.latent);
  }

  async search(query: string): Promise<Set<number>> {
    const words = query.trim().replace(/^#/, "");
    const found = new Set<number>();
    if (/^\d+$/.test(words))
      for (let i = 0; i < this.facts.nLatents; i++) if (String(i).startsWith(words)) found.add(i);
    if (found.size) return found;
    this.searched ??= this.texts();
    for (const text of this.searched.text.find(words))
      for (const latent of this.searched.latents[text]) found.add(latent);
    return found;
  }

  get groups(): Group["kind"][] {
    return this.has("rates") ? ["class", "rest"] : [];
  }

  async compare(a: Group, b: Group): Promise<Comparison> {
    const [first, second] = [this.rates(a, b), this.rates(b, a)];
    const rows = first.rates.reduce<Difference[]>((all, rate, latent) => {
      if (rate || second.rates[latent]) all.push({ latent, a: rate, b: second.rates[latent] });
      return all;
    }, []);
    rows.sort((x, y) => y.a - y.b - (x.a - x.b) || x.latent - y.latent);
    return { n: [first.n, second.n], rows };
  }

  /** On which share of a group's images each latent fires. The file has the shares of classes. */
  private rates(group: Group, other: Group): { n: number; rates: number[] } {
    const { classes, nLatents } = this.facts;
    const all = this.block("rates");
    const row = (one: number) => all.subarray(one * nLatents, (one + 1) * nLatents);
    if (group.kind === "class") return { n: classes[group.class].support, rates: Array.from(row(group.class)) };
    if (group.kind !== "rest" || other.kind !== "class") throw new Error("This file compares classes of images only.");
    const rest = classes.map((_, i) => i).filter((i) => classes[i].kind === "image" && i !== other.class);
    const n = rest.reduce((sum, i) => sum + classes[i].support, 0);
    const rates = new Array<number>(nLatents).fill(0);
    for (const i of rest) row(i).forEach((rate, latent) => (rates[latent] += (rate * classes[i].support) / n));
    return { n, rates };
  }

  /** All texts that can be found, and the latents that each one stands for. */
  private texts() {
    const { facts } = this;
    const texts: string[] = [...facts.classes.map((one) => one.name), ...facts.files.map((file, i) => `${file} ${facts.labelNames[facts.labels[i]]}`)];
    const latents: number[][] = texts.map(() => []);
    const nClasses = facts.classes.length;
    const images = this.block("image");
    for (let latent = 0; latent < facts.nLatents; latent++) {
      for (const best of [this.block("class")[latent], this.block("mask")[latent]])
        if (best >= 0) latents[best].push(latent);
      const [first, last] = [this.exampleStarts[latent], this.exampleStarts[latent + 1]];
      for (let i = first; i < last; i++) latents[nClasses + images[i]].push(latent);
      const thumb = this.block("thumb")[latent];
      if (first === last && thumb >= 0) latents[nClasses + thumb].push(latent);
    }
    facts.names?.forEach((name, latent) => {
      if (name) (texts.push(name), latents.push([latent]));
    });
    return { text: new TextSearch(texts), latents };
  }
}

export class FileSource implements Source {
  readonly kind = "file";
  readonly notes = new BrowserNotes();
  private readonly facts = JSON.parse(textOf("runs")) as FileFacts[];
  private readonly opened = new Map<string, Promise<Run>>();

  static isHere(): boolean {
    return document.getElementById("runs") !== null;
  }

  async runs(): Promise<Summary[]> {
    return this.facts.map(({ dataset, summary }, i) => ({
      id: String(i), dataset, isMeasured: true, ...summary,
    }));
  }

  open(id: string): Promise<Run> {
    let found = this.opened.get(id);
    if (!found) {
      found = this.read(id);
      this.opened.set(id, found);
    }
    return found;
  }

  private async read(id: string): Promise<Run> {
    const facts = this.facts[Number(id)];
    if (!facts) throw new Error(`There is no SAE ${id} in this file. It has ${this.facts.length}.`);
    const titles = this.facts.map(({ summary }) => summary.title);
    return new FileRun(facts, Number(id), await readBlocks(Number(id), facts.kinds), titles);
  }
}
