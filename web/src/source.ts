// Where the pages take everything from. There are two sources: the file that holds all (file.ts),
// and a server (live.ts). Pages know this interface only.
//
// Numbers of all latents are in memory once a run is open, so that lists, maps and filters need not
// wait. Everything about one latent or one image is a promise.

export type Numbers =
  Float32Array | Float64Array | Uint8Array | Uint16Array | Uint32Array | Int16Array | Int32Array;

/** How a figure is written: a share as percent, a count as a whole number. */
export type Unit = "share" | "count" | "value" | "ratio";

/** A figure that latents have, and that lists sort, filter and show. */
export interface Column {
  key: string;
  name: string;
  /** What it is, in one sentence. */
  hint: string;
  unit: Unit;
  /** The same figure of all images, where `key` is of the held-out ones. */
  all?: string;
  /** Whether its values are best seen on a logarithmic axis. */
  log?: boolean;
}

export interface ClassFacts {
  name: string;
  /** Whether images or patches have it. */
  kind: "image" | "mask";
  /** Images, or labelled tokens, that were measured. */
  support: number;
}

export interface Facts {
  title: string;
  subtitle: string;
  /** Figures of the SAE: name, text, explanation. */
  metrics: [label: string, text: string, hint: string][];
  /** How the activations differ from those of training. */
  warnings: string[];
  activations: string;
  /** Link to the page of all SAEs. */
  home?: string;
  /** URL of the results, for Python. */
  results: string;
  nLatents: number;
  nTokens: number;
  nImages: number;
  /** Latents that fire. */
  nFiring: number;
  /** Latents that have a picture, and that have several. */
  nPictured: number;
  nDetailed: number;
  /** Rows and columns of an image's patches. */
  grid: [rows: number, columns: number];
  /** Width of pictures by their height. */
  aspect: number;
  columns: Column[];
  classes: ClassFacts[];
  /** Where one statement holds for all figures of `columns`: "held-out images", or "all images". */
  side: string;
}

/** An image on which a latent fires. */
export interface Example {
  /** Row of the shards' examples, and what pictures are asked by. */
  example: number;
  file: string;
  /** Class, "" if it has none. */
  label: string;
  kind: "top" | "spread";
  /** Largest value over the image's tokens. */
  value: number;
  /** Share of the images on which the latent fires whose value is at most this one; NaN: unknown. */
  quantile: number;
  side: "held-out" | "training" | "unknown";
  /** Patches on which it fires, and its values there; null where they are not known. */
  patches: ArrayLike<number> | null;
  values: ArrayLike<number>;
}

export interface Near {
  latent: number;
  cosine: number;
}

/** The same latent in another SAE, by the cosine of decoder rows. */
export interface Match extends Near {
  run: string;
  title: string;
}

/** How well a latent finds a class. Figures that are not known are NaN. */
export interface Finding {
  latent: number;
  /** Number in `Facts.classes`. */
  class: number;
  /** Share of the images (tokens) of the class, and of all others, on which it fires. */
  inside: number;
  outside: number;
  /** Average precision: of held-out images where there are some, and of all. */
  ap: number;
  apAll: number;
}

export interface Histogram {
  /** Edges of the bins, one more than bins. They are logarithmic. */
  edges: number[];
  /** Tokens in each bin. */
  counts: number[];
}

/** What only the page of one latent needs. */
export interface Detail {
  examples: Example[];
  histogram: Histogram | null;
  /** Value at each of some shares of the tokens on which it fires. */
  quantiles: [share: number, value: number][];
  classes: Finding[];
  neighbours: Near[];
  coactive: Near[];
  /** A server needs seconds to compute them at first. */
  matches: Match[] | Promise<Match[]>;
}

/** A group of images: of a class, those on which a latent fires, chosen ones, or all others. */
export type Group =
  | { kind: "class"; class: number }
  | { kind: "latent"; latent: number }
  | { kind: "images"; examples: number[] }
  | { kind: "rest" };

/** Shares of the images of two groups on which a latent fires with at least a twentieth of its
 *  largest value. */
export interface Difference {
  latent: number;
  a: number;
  b: number;
}

export interface Comparison {
  /** Images of each group. */
  n: [a: number, b: number];
  /** From the largest difference a − b to the lowest; those in between may be left out. */
  rows: Difference[];
}

export interface Run {
  readonly id: string;
  readonly facts: Facts;
  /** All latents, strong and rare ones first. */
  readonly order: Numbers;
  has(key: string): boolean;
  /** A column: one number per latent, NaN where it is not defined. Besides those of `Facts.columns`
   *  there are `tokens` (on which it fires), `class` and `mask` (its best ones), `x` and `y`, and where
   *  somebody chose latents, `chosen` (1 or 0). */
  values(key: string): Numbers;
  /** Its name, else the name of the class that it finds, else "". */
  nameOf(latent: number): string;
  /** Its first images, for lists. */
  examples(latent: number, most: number): Promise<Example[]>;
  latent(latent: number): Promise<Detail>;
  /** The picture of an image, null if there is none. */
  picture(example: number): Promise<Blob | null>;
  /** The latents that find each class, best first. */
  findings(): Promise<Finding[]>;
  /** Latents by names of classes, latents and files, and by number. */
  search(query: string): Promise<Set<number>>;
  /** The kinds of groups that `compare` can take here; none: it cannot compare. */
  readonly groups: Group["kind"][];
  compare(a: Group, b: Group): Promise<Comparison>;
}

/** A row of the page of all SAEs. */
export interface Summary {
  id: string;
  title: string;
  dataset: string;
  /** Figures by name, such as nmse, l0 and n_dead; held-out where there are such images. */
  figures: Record<string, number>;
  /** Which images the figures are of. */
  side: string;
  /** Entries of its config, as text. */
  config: Record<string, string>;
  /** Curves of training: steps and values by name. */
  curves: Record<string, [steps: number[], values: number[]]>;
  /** Whether `open` can be called: it was measured. */
  isMeasured: boolean;
}

export interface Note {
  text: string;
  tags: string[];
}

/** Notes by URL of the results, then by latent. This is what is exported and imported, too. */
export type Notes = Record<string, Record<string, Note>>;

export interface NoteStore {
  /** Where notes are kept, as in "in this browser"; null if they cannot be kept. */
  readonly where: string | null;
  read(): Promise<Notes>;
  /** Replace all notes. */
  write(notes: Notes): Promise<void>;
}

export interface Source {
  readonly kind: "file" | "server";
  readonly notes: NoteStore;
  runs(): Promise<Summary[]>;
  open(id: string): Promise<Run>;
}
