// One image with its patches: click or drag to choose some, by mouse, finger or keyboard.
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { mapOf, peaks, type Seen } from "./own";
import { draw } from "./pictures";
import type { Run } from "./source";

interface Props {
  run: Run;
  seen: Seen;
  /** The latent whose map is shown. */
  pointed: number | null;
  chosen: Set<number>;
  choose: (patches: Set<number>) => void;
}

type Cell = [row: number, column: number];

const PIXELS = Math.min(2, globalThis.devicePixelRatio || 1);
const HINT = "Arrow keys move, Space chooses a patch, Shift and arrow keys choose several, Escape takes all.";

export function Patches({ run, seen, pointed, chosen, choose }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [dragged, setDragged] = useState<[Cell, Cell] | null>(null);
  const [cursor, setCursor] = useState<Cell | null>(null);
  const [rows, columns] = seen.grid;
  const high = pointed === null ? 1 : run.values(run.has("max_all") ? "max_all" : "max")[pointed] || 1;

  useLayoutEffect(() => {
    const element = canvas.current!;
    const width = Math.round(element.clientWidth * PIXELS) || seen.crop.width;
    element.width = width;
    element.height = Math.round((width * seen.crop.height) / seen.crop.width);
    const marks = pointed === null ? null : mapOf(seen.codes, pointed);
    draw(element, seen.crop, seen.grid, marks as Parameters<typeof draw>[3], high, 0);
    const within = dragged ? new Set([...chosen, ...between(...dragged, columns)]) : chosen;
    outline(element, seen.grid, within, cursor);
    element.dataset.drawn = pointed === null ? "picture" : String(pointed);
  });
  useEffect(() => setCursor(null), [seen]);

  const at = (event: PointerEvent): Cell => {
    const box = canvas.current!.getBoundingClientRect();
    const place = (share: number, n: number) => Math.max(0, Math.min(n - 1, Math.floor(share * n)));
    return [place((event.clientY - box.top) / box.height, rows), place((event.clientX - box.left) / box.width, columns)];
  };
  const down = (event: PointerEvent) => {
    if (event.button !== 0) return;
    try {
      canvas.current!.setPointerCapture(event.pointerId);
    } catch {
      // The pointer has left already.
    }
    setDragged([at(event), at(event)]);
  };
  const up = () => {
    if (!dragged) return;
    const cells = between(...dragged, columns);
    setDragged(null);
    if (cells.length > 1) return choose(new Set([...chosen, ...cells]));
    choose(toggled(chosen, cells[0]));
  };
  const key = (event: KeyboardEvent) => {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const now = cursor ?? [0, 0];
    if (by) {
      const next: Cell = cursor
        ? [Math.max(0, Math.min(rows - 1, now[0] + by[0])), Math.max(0, Math.min(columns - 1, now[1] + by[1]))]
        : [0, 0];
      setCursor(next);
      if (event.shiftKey) choose(new Set([...chosen, ...between(now, next, columns)]));
    } else if (event.key === " ") choose(toggled(chosen, now[0] * columns + now[1]));
    else if (event.key === "Escape" && chosen.size) choose(new Set());
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const under = cursor && peaks(seen.codes, new Set([cursor[0] * columns + cursor[1]])).size;
  return (
    <>
      <canvas
        ref={canvas} class="patches" tabIndex={0} role="application" aria-label={`Patches of ${seen.name}. ${HINT}`} title={HINT}
        style={{ aspectRatio: `${seen.crop.width} / ${seen.crop.height}` }}
        onPointerDown={down} onPointerMove={(event) => dragged && setDragged([dragged[0], at(event)])} onPointerUp={up}
        onPointerCancel={() => setDragged(null)} onKeyDown={key} onBlur={() => setCursor(null)}
      />
      <span class="unseen" role="status">{cursor ? `Row ${cursor[0] + 1}, column ${cursor[1] + 1}: ${under} latents fire` : ""}</span>
    </>
  );
}

function toggled(chosen: Set<number>, patch: number): Set<number> {
  const next = new Set(chosen);
  if (!next.delete(patch)) next.add(patch);
  return next;
}

/** The patches of a rectangle. */
function between([top, left]: Cell, [bottom, right]: Cell, columns: number): number[] {
  const found: number[] = [];
  for (let row = Math.min(top, bottom); row <= Math.max(top, bottom); row++)
    for (let column = Math.min(left, right); column <= Math.max(left, right); column++) found.push(row * columns + column);
  return found;
}

/** Draw a frame around chosen patches, and one around the cursor's. */
function outline(canvas: HTMLCanvasElement, [rows, columns]: [number, number], chosen: Set<number>, cursor: Cell | null): void {
  const context = canvas.getContext("2d")!;
  const [width, height] = [canvas.width, canvas.height];
  const line = Math.max(2, Math.round(width / 160));
  const frame = (row: number, column: number, style: string, inside: number) => {
    const [left, top] = [Math.round((column * width) / columns), Math.round((row * height) / rows)];
    const [right, bottom] = [Math.round(((column + 1) * width) / columns), Math.round(((row + 1) * height) / rows)];
    context.strokeStyle = style;
    context.lineWidth = line / 2;
    context.strokeRect(left + inside, top + inside, right - left - 2 * inside, bottom - top - 2 * inside);
  };
  for (const patch of chosen) {
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    frame(row, column, "#000", line * 0.25);
    frame(row, column, "#ffd21f", line * 0.75);
  }
  if (cursor) {
    frame(...cursor, "#000", line * 0.25);
    frame(...cursor, "#fff", line * 0.75);
  }
}
