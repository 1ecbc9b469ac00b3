// What `saev serve` says of one image: of the dataset, or one's own (saev/serve/own.py). Images of
// one's own are in this tab's memory only.
import type { Run } from "./source";

/** The active latents of an image, one entry for each patch and latent. */
export interface Codes {
  /** From 0, row by row; -1 is the class token. */
  patch: number[];
  latent: number[];
  value: number[];
}

/** An image as the model sees it. */
export interface Seen {
  name: string;
  /** What the crop is of, in words. */
  about: string;
  grid: [rows: number, columns: number];
  crop: ImageBitmap;
  codes: Codes;
}

/** A name of an image in lists. */
export interface Named {
  example: number;
  path: string | null;
  label: string | null;
}

interface Answer {
  name: string;
  width: number;
  height: number;
  grid: [number, number];
  crop: string;
  tokens: Codes;
}

interface Said {
  detail: string;
  remedy: string;
}

type Last = { image: Answer } | { ready: true };
type Line = { doing: string } | { problem: Said } | Last;
type Tell = (doing: string) => void;

/** An image's word in the address: own1, own2, …, or the number of one of the dataset. */
export type Ref = string;

const files = new Map<Ref, File>();

/** Keep an image of one's own. */
export function add(file: File): Ref {
  const ref = `own${files.size + 1}`;
  files.set(ref, file);
  return ref;
}

const url = (run: Run, path: string) => `api/runs/${encodeURIComponent(run.id)}/${path}`;

async function ask(path: string, options: RequestInit = {}): Promise<Response> {
  let answer: Response;
  try {
    answer = await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new Error("The server does not answer. Is `saev serve` still running?");
  }
  if (answer.ok) return answer;
  const said = (await answer.json().catch(() => null)) as Said | null;
  throw new Error(said ? `${said.detail} ${said.remedy}` : `The server answered with status ${answer.status}.`);
}

/** The latents of an image. `tell` gets words for what takes time. */
export async function see(run: Run, ref: Ref, tell: Tell): Promise<Seen> {
  if (/^\d+$/.test(ref)) return ofDataset(run, Number(ref), tell);
  const file = files.get(ref);
  if (!file) throw new Error("This image was in another tab, or before the page was loaded again. Choose it again.");
  tell("send the image");
  const name = encodeURIComponent(file.name);
  return shown(await ask(url(run, `own?name=${name}`), { method: "POST", body: file }), tell);
}

/** Load the model, so that the first image need not wait for it. */
export async function prepare(run: Run, tell: Tell): Promise<void> {
  await last(await ask(url(run, "own")), tell);
}

async function ofDataset(run: Run, example: number, tell: Tell): Promise<Seen> {
  const facts = (await (await ask(url(run, `images/${example}`))).json()) as { path: string; has_codes: boolean };
  const picture = facts.has_codes ? await run.picture(example) : null;
  if (!picture) return shown(await ask(url(run, `images/${example}/encoded`)), tell);
  const codes = (await (await ask(url(run, `images/${example}/tokens`))).json()) as Codes;
  const crop = await createImageBitmap(picture);
  const about = `image ${example} of the dataset, as it was measured`;
  return { name: facts.path, about, grid: run.facts.grid, crop, codes };
}

async function shown(answer: Response, tell: Tell): Promise<Seen> {
  const said = await last(answer, tell);
  if (!("image" in said)) throw new Error("The server sent no image.");
  return drawn(said.image);
}

/** The last line of an answer that comes in lines. */
async function last(answer: Response, tell: Tell): Promise<Last> {
  const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    text += value ?? "";
    const lines = text.split("\n");
    text = lines.pop()!;
    for (const line of lines) {
      const said = JSON.parse(line) as Line;
      if ("doing" in said) tell(said.doing);
      else if ("problem" in said) throw new Error(`${said.problem.detail} ${said.problem.remedy}`);
      else return said;
    }
    if (done) throw new Error("The server ended its answer too early. Try again.");
  }
}

async function drawn({ name, width, height, grid, crop, tokens }: Answer): Promise<Seen> {
  const bytes = Uint8Array.from(atob(crop), (letter) => letter.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/webp" }));
  return { name, about: `what the model sees of ${width} × ${height} pixels`, grid, crop: bitmap, codes: tokens };
}

/** The images on which some latents are strongest together. */
export async function nearest(run: Run, latents: number[], n: number): Promise<(Named & { score: number })[]> {
  const answer = await ask(url(run, `nearest?latents=${latents.join(",")}&n=${n}`));
  return ((await answer.json()) as { images: (Named & { score: number })[] }).images;
}

/** Images of the dataset by words of their names. */
export async function find(run: Run, query: string): Promise<Named[]> {
  const answer = await ask(url(run, `search?q=${encodeURIComponent(query)}`));
  return ((await answer.json()) as { images: Named[] }).images;
}

/** A latent on some patches: its largest value, and on how many it fires. */
export interface Peak {
  value: number;
  n: number;
}

/** The latents that fire on some patches; null are all tokens. */
export function peaks({ patch, latent, value }: Codes, chosen: Set<number> | null): Map<number, Peak> {
  const found = new Map<number, Peak>();
  for (let i = 0; i < patch.length; i++) {
    if (chosen && !chosen.has(patch[i])) continue;
    const before = found.get(latent[i]);
    if (!before) found.set(latent[i], { value: value[i], n: 1 });
    else {
      before.value = Math.max(before.value, value[i]);
      before.n++;
    }
  }
  return found;
}

/** The patches on which a latent fires, and its values there. */
export function mapOf({ patch, latent, value }: Codes, one: number): { patches: number[]; values: number[] } {
  const patches: number[] = [];
  const values: number[] = [];
  for (let i = 0; i < patch.length; i++)
    if (latent[i] === one && patch[i] >= 0) {
      patches.push(patch[i]);
      values.push(value[i]);
    }
  return { patches, values };
}
