// Pictures are decoded when they are seen, a few at a time. What is no longer seen is not decoded.
import type { Example, Run } from "./source";

const MAX_BYTES = 96e6;
const AT_A_TIME = 4;

interface Wish {
  key: string;
  run: Run;
  image: number;
  takers: Set<(bitmap: ImageBitmap) => void>;
}

const decoded = new Map<string, ImageBitmap>();
const wishes = new Map<string, Wish>();
let nBytes = 0;
let busy = 0;

/** Call `take` with a picture, now or later. Returns what takes the wish back. */
export function want(run: Run, image: number, take: (bitmap: ImageBitmap) => void): () => void {
  const key = `${run.id}/${image}`;
  const known = decoded.get(key);
  if (known) {
    decoded.delete(key); // to the end: the last one used is the last to go
    decoded.set(key, known);
    take(known);
    return () => {};
  }
  const wish = wishes.get(key) ?? { key, run, image, takers: new Set() };
  wish.takers.add(take);
  wishes.set(key, wish);
  void work();
  return () => {
    wish.takers.delete(take);
    if (!wish.takers.size) wishes.delete(key);
  };
}

async function work(): Promise<void> {
  if (busy >= AT_A_TIME) return;
  const [wish] = wishes.values();
  if (!wish) return;
  wishes.delete(wish.key);
  busy++;
  try {
    const found = await wish.run.picture(wish.image);
    if (!found) return;
    const bitmap = await createImageBitmap(found);
    keep(wish.key, bitmap);
    for (const take of [...wish.takers]) take(bitmap);
  } finally {
    busy--;
    void work();
  }
}

function keep(key: string, bitmap: ImageBitmap): void {
  decoded.set(key, bitmap);
  nBytes += bitmap.width * bitmap.height * 4;
  for (const [oldest, old] of decoded) {
    if (nBytes <= MAX_BYTES || oldest === key) break;
    nBytes -= old.width * old.height * 4;
    decoded.delete(oldest);
  }
}

// Viridis, as in the picture book: rises in lightness and can be read with any colour vision. Its
// first colours are left out, because they are too dark to be seen as a tint.
const STOPS = [
  [68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137],
  [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37],
];
const DARKEST = 0.15;
/** Patches of fewer pixels have no outline: it would hide them. */
const SMALLEST_OUTLINED = 7;

/** The scale as a strip. */
export const gradient = () => (
  <span class="strip" style={{ background: `linear-gradient(to right, ${Array.from({ length: 12 }, (_, i) => colour(i / 11)).join(", ")})` }} />
);

export function colour(share: number, opacity = 1): string {
  const place = (DARKEST + (1 - DARKEST) * Math.min(1, Math.max(0, share))) * (STOPS.length - 1);
  const i = Math.min(STOPS.length - 2, Math.floor(place));
  const mixed = STOPS[i].map((from, c) => Math.round(from + (place - i) * (STOPS[i + 1][c] - from)));
  return `rgb(${mixed.join(" ")} / ${opacity})`;
}

/** Draw a picture, and mark the patches whose value is at least `threshold`; `high` has the last
 *  colour. */
export function draw(
  canvas: HTMLCanvasElement, bitmap: CanvasImageSource, grid: [number, number], example: Example | null,
  high: number, threshold: number,
): void {
  const [width, height] = [canvas.width, canvas.height];
  const context = canvas.getContext("2d")!;
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  if (!example?.patches) return;
  const { patches, values } = example;
  const [rows, columns] = grid;
  const levels = new Float32Array(rows * columns);
  let some = false;
  for (let i = 0; i < patches.length; i++)
    if (values[i] >= threshold * (1 - 1e-6)) (levels[patches[i]] = values[i] / high), (some = true);
  const x = (column: number) => Math.round((column * width) / columns);
  const y = (row: number) => Math.round((row * height) / rows);
  const fires = (row: number, column: number) =>
    row >= 0 && column >= 0 && row < rows && column < columns && levels[row * columns + column] > 0;
  if (!some && patches.length === 0) return;
  // Colours under a tint are greyed, so that they do not mix with it.
  context.globalCompositeOperation = "saturation";
  context.fillStyle = "rgb(128 128 128 / 0.6)";
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "source-over";
  const dim = width < 140 ? "rgb(12 14 18 / 0.5)" : "rgb(12 14 18 / 0.55)";
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      const level = levels[row * columns + column];
      context.fillStyle = level > 0 ? colour(level, 0.2 + 0.4 * level) : dim;
      context.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
    }
  if (width / columns < SMALLEST_OUTLINED || height / rows < SMALLEST_OUTLINED) return;
  const line = Math.max(1, Math.round(Math.min(width, height) / 200));
  for (const [style, inside] of [["rgb(0 0 0 / 0.6)", false], ["#fff", true]] as const) {
    context.fillStyle = style;
    const off = inside ? 0 : -line;
    for (let row = 0; row < rows; row++)
      for (let column = 0; column < columns; column++) {
        if (!fires(row, column)) continue;
        const [left, top, right, bottom] = [x(column), y(row), x(column + 1), y(row + 1)];
        const end = inside ? line : 0;
        if (!fires(row - 1, column)) context.fillRect(left, top + off, right - left, line);
        if (!fires(row + 1, column)) context.fillRect(left, bottom - end, right - left, line);
        if (!fires(row, column - 1)) context.fillRect(left + off, top, line, bottom - top);
        if (!fires(row, column + 1)) context.fillRect(right - end, top, line, bottom - top);
      }
  }
}
