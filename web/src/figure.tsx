// A latent's images as one figure, with title, scale and caption, for a paper: PNG or SVG.
import { useEffect, useRef, useState } from "preact/hooks";
import { Fallback, offer } from "./download";
import { number } from "./format";
import { colour, draw } from "./pictures";
import type { Example, Run } from "./source";

const TILE = 200;
const GAP = 12;
const ACROSS = 4;
const SHARP = 2;
const [INK, SOFT] = ["#1b1f24", "#5c6570"];
const FONT = "Helvetica, Arial, sans-serif";

interface Text {
  text: string;
  x: number;
  y: number;
  size: number;
  bold?: boolean;
  colour?: string;
  end?: boolean;
}

interface Layout {
  width: number;
  height: number;
  tiles: { canvas: HTMLCanvasElement; x: number; y: number; height: number }[];
  texts: Text[];
  /** The colour scale. */
  scale: { x: number; y: number; width: number; height: number };
}

export interface FigureOf {
  run: Run;
  title: string;
  caption: string;
  examples: Example[];
  high: number;
  threshold: number;
  marked: boolean;
}

const measure = document.createElement("canvas").getContext("2d")!;

function broken(text: string, size: number, width: number): string[] {
  measure.font = `${size}px ${FONT}`;
  const lines: string[] = [];
  for (const word of text.split(/\s+/)) {
    const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
    if (lines.length && measure.measureText(longer).width <= width) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}

function cut(text: string, size: number, width: number): string {
  measure.font = `${size}px ${FONT}`;
  if (measure.measureText(text).width <= width) return text;
  let end = text.length;
  while (end > 1 && measure.measureText(`${text.slice(0, end)}…`).width > width) end--;
  return `${text.slice(0, end)}…`;
}

async function tile({ run, high, threshold, marked }: FigureOf, example: Example): Promise<HTMLCanvasElement | null> {
  const blob = await run.picture(example.example);
  if (!blob) return null;
  const bitmap = await createImageBitmap(blob);
  const canvas = document.createElement("canvas");
  canvas.width = TILE * SHARP;
  canvas.height = Math.round((TILE * SHARP * bitmap.height) / bitmap.width);
  draw(canvas, bitmap, run.facts.grid, marked ? example : null, high, threshold);
  return canvas;
}

async function layout(of: FigureOf): Promise<Layout> {
  const made = await Promise.all(of.examples.map(async (e) => [e, await tile(of, e)] as const));
  const shown = made.filter((pair): pair is readonly [Example, HTMLCanvasElement] => pair[1] !== null);
  const across = Math.max(2, Math.min(ACROSS, shown.length));
  const width = 2 * GAP + across * TILE + (across - 1) * GAP;
  const texts: Text[] = [{ text: cut(of.title, 18, width - 2 * GAP), x: GAP, y: 30, size: 18, bold: true, colour: INK }];
  const tiles: Layout["tiles"] = [];
  const top = 46;
  const tall = Math.max(...shown.map(([, canvas]) => canvas.height / SHARP), 0);
  shown.forEach(([example, canvas], i) => {
    const x = GAP + (i % across) * (TILE + GAP);
    const y = top + Math.floor(i / across) * (tall + 34);
    tiles.push({ canvas, x, y, height: canvas.height / SHARP });
    const value = number(example.value);
    texts.push({ text: cut(example.label || example.file, 12, TILE - 50), x, y: y + tall + 16, size: 12, colour: INK });
    texts.push({ text: value, x: x + TILE, y: y + tall + 16, size: 12, bold: true, colour: INK, end: true });
  });
  const below = top + Math.ceil(shown.length / across) * (tall + 34) + 4;
  const scale = { x: GAP + 18, y: below, width: 140, height: 10 };
  texts.push({ text: "0", x: GAP, y: below + 10, size: 12, colour: SOFT });
  texts.push({ text: `${number(of.high)}, value of the latent`, x: scale.x + scale.width + 8, y: below + 10, size: 12, colour: SOFT });
  let y = below + 36;
  for (const line of broken(of.caption, 13, width - 2 * GAP)) {
    texts.push({ text: line, x: GAP, y, size: 13, colour: INK });
    y += 18;
  }
  return { width, height: y - 4, tiles, texts, scale };
}

const shades = Array.from({ length: 48 }, (_, i) => colour(i / 47));

function paint({ width, height, tiles, texts, scale }: Layout, canvas: HTMLCanvasElement): void {
  canvas.width = width * SHARP;
  canvas.height = height * SHARP;
  const context = canvas.getContext("2d")!;
  context.scale(SHARP, SHARP);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  for (const { canvas: one, x, y, height: tall } of tiles) context.drawImage(one, x, y, TILE, tall);
  shades.forEach((shade, i) => {
    context.fillStyle = shade;
    context.fillRect(scale.x + (i * scale.width) / shades.length, scale.y, scale.width / shades.length + 0.5, scale.height);
  });
  for (const { text, x, y, size, bold, colour: ink, end } of texts) {
    context.font = `${bold ? "600 " : ""}${size}px ${FONT}`;
    context.fillStyle = ink ?? INK;
    context.textAlign = end ? "right" : "left";
    context.fillText(text, x, y);
  }
}

const escaped = (text: string) =>
  text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`).replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, "");

function svg({ width, height, tiles, texts, scale }: Layout): string {
  const lines = [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="${FONT}">`,
    `<rect width="100%" height="100%" fill="#fff"/>`,
    ...tiles.map(({ canvas, x, y, height: tall }) => `<image x="${x}" y="${y}" width="${TILE}" height="${tall}" href="${canvas.toDataURL("image/png")}"/>`),
    ...shades.map((shade, i) => `<rect x="${scale.x + (i * scale.width) / shades.length}" y="${scale.y}" width="${scale.width / shades.length + 0.5}" height="${scale.height}" fill="${shade.replace(/ \/ 1\)/, ")").replace(/ /g, ",")}"/>`),
    ...texts.map(({ text, x, y, size, bold, colour: ink, end }) =>
      `<text x="${x}" y="${y}" font-size="${size}"${bold ? ' font-weight="600"' : ""}${end ? ' text-anchor="end"' : ""} fill="${ink ?? INK}">${escaped(text)}</text>`),
    "</svg>",
  ];
  return lines.join("\n");
}

/** A dialog with the figure, its caption to be edited, and the two files. */
export function FigureDialog({ of, name, close }: { of: FigureOf; name: string; close: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const [caption, setCaption] = useState(of.caption);
  const [made, setMade] = useState<Layout | null>(null);
  const [shown, setShown] = useState<{ kind: string; text: string } | null>(null);
  useEffect(() => dialog.current?.showModal(), []);
  useEffect(() => {
    let isOver = false;
    void layout({ ...of, caption }).then((found) => {
      if (isOver || !canvas.current) return;
      paint(found, canvas.current);
      setMade(found);
    });
    return () => {
      isOver = true;
    };
  }, [caption]);
  const png = () =>
    canvas.current!.toBlob((blob) => {
      if (!blob || !offer(`${name}.png`, blob)) setShown({ kind: "png", text: "" });
    });
  const vector = () => {
    const text = svg(made!);
    if (!offer(`${name}.svg`, new Blob([text], { type: "image/svg+xml" }))) setShown({ kind: "svg", text });
  };
  // Esc closes the dialog, and nothing behind it.
  const onKey = (event: KeyboardEvent) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    dialog.current?.close();
  };
  return (
    <dialog ref={dialog} class="figure" aria-label="Figure" onClose={close} onKeyDown={onKey}>
      <div class="bar">
        <h2>Figure</h2>
        <button type="button" id="png" disabled={!made} onClick={png}>PNG</button>
        <button type="button" id="svg" disabled={!made} onClick={vector}>SVG</button>
        <button type="button" id="close" onClick={() => dialog.current?.close()}>Close</button>
      </div>
      {shown?.kind === "png" && <p class="hint" role="status">This frame may not offer files. Copy the picture below with the browser's menu.</p>}
      {shown?.kind === "svg" && <Fallback name="SVG" text={shown.text} />}
      <label>
        Caption
        <textarea rows={2} value={caption} onInput={(e) => setCaption(e.currentTarget.value)} />
      </label>
      <canvas ref={canvas} role="img" aria-label={`${of.title}: ${of.examples.length} images`} />
    </dialog>
  );
}
