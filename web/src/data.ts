// What the file holds: facts in words, and columns of numbers with one entry per latent.

type Kind = "f4" | "f8" | "u1" | "u2" | "u4" | "i2" | "i4";
type Numbers = Float32Array | Float64Array | Uint8Array | Uint16Array | Uint32Array | Int16Array | Int32Array;

export interface Facts {
  title: string;
  subtitle: string;
  metrics: [label: string, text: string, hint: string][];
  warnings: string[];
  activations: string;
  results: string;
  nLatents: number;
  nTokens: number;
  grid: [rows: number, columns: number];
  hasCodes: boolean;
  classes: string[];
  imagesByClass: number[];
  found: [classNumber: number, latents: [latent: number, inside: number, outside: number][]][];
  concepts: [name: string, nTokens: number, latent: number, ap: number, purity: number][];
  files: string[];
  labels: number[];
  aspect: number;
  nPictured: number;
  nDetailed: number;
  nFiring: number;
  kinds: Record<string, string>;
}

/** An image on which a latent fires. */
export interface Example {
  image: number;
  /** 0: from the top of the latent's values, 1: from their middle third, 2: from the low third. */
  range: number;
  value: number;
  patches: Numbers;
  /** Value of each patch, as share of the latent's maximum, times 255. */
  levels: Numbers;
}

export const BINS = 24;
const ARRAYS = {
  f4: Float32Array, f8: Float64Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i2: Int16Array,
  i4: Int32Array,
};

const textOf = (id: string) => document.getElementById(id)?.textContent ?? "";

function bytes(text: string): Uint8Array<ArrayBuffer> {
  const raw = atob(text);
  const out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}

/** Where each of several runs of entries begins, and where the last one ends. */
function starts(lengths: Numbers): Uint32Array {
  const out = new Uint32Array(lengths.length + 1);
  for (let i = 0; i < lengths.length; i++) out[i + 1] = out[i] + lengths[i];
  return out;
}

export class Run {
  readonly frequency: Float64Array;
  readonly count: Numbers;
  readonly mean: Numbers;
  readonly max: Numbers;
  readonly purity: Numbers;
  readonly usual: Numbers;
  readonly images: Numbers | null;
  readonly thumb: Numbers;
  /** Place of each latent in the order of strong and rare ones. */
  readonly rank: Uint32Array;
  readonly order: Numbers;
  private readonly cache = new Map<string, Numbers>();
  private readonly exampleStarts: Uint32Array;
  private readonly patchStarts: Uint32Array;
  private readonly pictureStarts: Uint32Array;
  private pictureText: string | null = null;

  constructor(readonly facts: Facts, readonly number: number) {
    this.count = this.column("count");
    this.mean = this.column("mean");
    this.max = this.column("max");
    this.purity = this.column("purity");
    this.usual = this.column("usual");
    this.thumb = this.column("thumb");
    this.order = this.column("order");
    this.images = this.has("images") ? this.column("images") : null;
    this.frequency = Float64Array.from(this.count, (n) => n / facts.nTokens);
    this.rank = new Uint32Array(facts.nLatents);
    for (let i = 0; i < facts.nLatents; i++) this.rank[this.order[i]] = i;
    this.exampleStarts = starts(this.column("examples"));
    this.patchStarts = starts(this.column("patches"));
    const padded = Uint32Array.from(this.column("pictureBytes"), (n) => Math.ceil(n / 3) * 3);
    this.pictureStarts = starts(padded);
  }

  has(name: string): boolean {
    return name in this.facts.kinds;
  }

  column(name: string): Numbers {
    let found = this.cache.get(name);
    if (!found) {
      const raw = bytes(textOf(`b${this.number}-${name}`));
      found = new ARRAYS[this.facts.kinds[name] as Kind](raw.buffer);
      this.cache.set(name, found);
    }
    return found;
  }

  /** Some entries of a column that has several per latent. */
  row(name: string, latent: number): number[] {
    const column = this.column(name);
    const width = column.length / this.facts.nLatents;
    return Array.from(column.subarray(latent * width, (latent + 1) * width));
  }

  examples(latent: number): Example[] {
    const found: Example[] = [];
    for (let i = this.exampleStarts[latent]; i < this.exampleStarts[latent + 1]; i++) {
      const [first, last] = [this.patchStarts[i], this.patchStarts[i + 1]];
      found.push({
        image: this.column("image")[i],
        range: this.column("range")[i],
        value: this.column("value")[i],
        patches: this.column("patch").subarray(first, last),
        levels: this.column("level").subarray(first, last),
      });
    }
    return found;
  }

  get nImages(): number {
    return this.facts.files.length;
  }

  /** The WebP file of an image. Pictures begin at multiples of three bytes, so of four letters. */
  picture(image: number): Uint8Array<ArrayBuffer> {
    this.pictureText ??= textOf(`b${this.number}-pictures`);
    const [first, last] = [this.pictureStarts[image], this.pictureStarts[image + 1]];
    const found = bytes(this.pictureText.slice((first / 3) * 4, (last / 3) * 4));
    return found.subarray(0, this.column("pictureBytes")[image]);
  }

  className(number: number): string {
    return number < 0 ? "" : this.facts.classes[number];
  }

  /** Class of an image, "" if it has none. */
  label(image: number): string {
    return this.className(this.facts.labels[image]);
  }

  /** All latents that have an image in the file. */
  *pairs(): Generator<[latent: number, image: number]> {
    const images = this.column("image");
    for (let latent = 0; latent < this.facts.nLatents; latent++) {
      const [first, last] = [this.exampleStarts[latent], this.exampleStarts[latent + 1]];
      if (first === last && this.thumb[latent] >= 0) yield [latent, this.thumb[latent]];
      for (let i = first; i < last; i++) yield [latent, images[i]];
    }
  }
}

export function readRuns(): Run[] {
  return (JSON.parse(textOf("runs")) as Facts[]).map((facts, number) => new Run(facts, number));
}
