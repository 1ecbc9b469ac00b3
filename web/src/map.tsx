import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { WIDE } from "./classes";
import { rangeWords, type Range } from "./filter";
import { number, percent, whole } from "./format";
import { usePromise } from "./hooks";
import type { PageProps } from "./pages";
import { Picture } from "./picture";
import type { Run } from "./source";

const [LEFT, RIGHT, TOP, BOTTOM] = [46, 12, 10, 36];
const NEAR = 10;
const MOVED = 5;

type Box = [x0: number, y0: number, x1: number, y1: number];

/** A log axis: whole powers of ten, or 1-2-5 steps if it is short. */
class Axis {
  readonly low: number;
  readonly high: number;
  constructor(values: ArrayLike<number>, readonly from: number, readonly to: number) {
    let [low, high] = [Infinity, -Infinity];
    for (let i = 0; i < values.length; i++)
      if (values[i] > 0) (low = Math.min(low, values[i])), (high = Math.max(high, values[i]));
    const pad = low < high ? 0.04 * Math.log10(high / low) : 0.5;
    this.low = Number.isFinite(low) ? Math.log10(low) - pad : -1;
    this.high = Number.isFinite(low) ? Math.log10(high) + pad : 0;
  }
  place = (value: number) =>
    this.from + ((Math.log10(value) - this.low) / (this.high - this.low)) * (this.to - this.from);
  value = (place: number) =>
    10 ** (this.low + ((place - this.from) / (this.to - this.from)) * (this.high - this.low));
  get ticks(): number[] {
    const steps = this.high - this.low > 2.5 ? [1] : this.high - this.low > 1 ? [1, 3] : [1, 2, 3, 5];
    const found: number[] = [];
    for (let power = Math.floor(this.low); power <= this.high; power++)
      for (const step of steps) {
        const value = Number((step * 10 ** power).toPrecision(3));
        if (Math.log10(value) >= this.low && Math.log10(value) <= this.high) found.push(value);
      }
    return found;
  }
}

/** All latents that fire: frequency from left to right, mean value upwards. */
export function LatentMap({ run, shown, filter, narrow, open }: PageProps) {
  const { ranges } = filter;
  const [frequency, mean] = [run.values("frequency"), run.values("mean")];
  const isOn = (latent: number) => frequency[latent] > 0 && mean[latent] > 0;
  const canvas = useRef<HTMLCanvasElement>(null);
  const [size, setSize] = useState<[number, number]>([0, 0]);
  const [, setScheme] = useState(0);
  const [drag, setDrag] = useState<Box | null>(null);
  const [near, setNear] = useState<number | null>(null);
  const start = useRef<[number, number] | null>(null);
  const [width, height] = size;
  const axes = useMemo(
    () => ({
      x: new Axis(frequency, LEFT, width - RIGHT),
      y: new Axis(mean, height - BOTTOM, TOP),
    }),
    [run, width, height],
  );
  const isShown = useMemo(() => {
    const mask = new Uint8Array(run.facts.nLatents);
    for (const latent of shown) mask[latent] = 1;
    return mask;
  }, [run, shown]);

  useEffect(() => {
    const element = canvas.current!;
    const observer = new ResizeObserver(() => setSize([element.clientWidth, element.clientHeight]));
    observer.observe(element);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const redraw = () => setScheme((n) => n + 1);
    scheme.addEventListener("change", redraw);
    return () => {
      observer.disconnect();
      scheme.removeEventListener("change", redraw);
    };
  }, []);

  useEffect(() => {
    if (!width) return;
    const element = canvas.current!;
    const scale = globalThis.devicePixelRatio || 1;
    element.width = Math.round(width * scale);
    element.height = Math.round(height * scale);
    const context = element.getContext("2d")!;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const style = getComputedStyle(element);
    const of = (name: string) => style.getPropertyValue(name);
    frame(context, axes, width, height, of);
    const n = run.facts.nLatents;
    const radius = n > 4000 ? 1.6 : n > 1000 ? 2.2 : 3;
    for (const wanted of [0, 1]) {
      context.fillStyle = of(wanted ? "--accent" : "--faint");
      context.globalAlpha = wanted ? (n > 4000 ? 0.5 : 0.7) : 0.6;
      for (let i = 0; i < n; i++) {
        if (!isOn(i) || isShown[i] !== wanted) continue;
        const [x, y] = [axes.x.place(frequency[i]), axes.y.place(mean[i])];
        if (n > 4000) context.fillRect(x - radius, y - radius, 2 * radius, 2 * radius); // much faster
        else {
          context.beginPath();
          context.arc(x, y, radius, 0, 7);
          context.fill();
        }
      }
    }
    context.globalAlpha = 1;
    const box = drag ?? boxOf(axes, ranges, width, height);
    if (box) {
      context.strokeStyle = of("--accent");
      context.fillStyle = of("--accent");
      context.globalAlpha = 0.1;
      context.fillRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
      context.globalAlpha = 1;
      context.strokeRect(box[0] + 0.5, box[1] + 0.5, box[2] - box[0], box[3] - box[1]);
    }
    if (near !== null) {
      context.strokeStyle = of("--ink");
      context.lineWidth = 2;
      context.beginPath();
      context.arc(axes.x.place(frequency[near]), axes.y.place(mean[near]), radius + 3, 0, 7);
      context.stroke();
    }
  });

  const at = (event: PointerEvent): [number, number] => {
    const box = canvas.current!.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const nearest = ([px, py]: [number, number]): number | null => {
    let [best, found]: [number, number | null] = [NEAR ** 2, null];
    for (let i = 0; i < run.facts.nLatents; i++) {
      if (!isOn(i)) continue;
      const far = (axes.x.place(frequency[i]) - px) ** 2 + (axes.y.place(mean[i]) - py) ** 2;
      if (far < best) [best, found] = [far, i];
    }
    return found;
  };
  const boxTo = ([px, py]: [number, number]): Box => {
    const [sx, sy] = start.current!;
    const x = (v: number) => Math.min(width - RIGHT, Math.max(LEFT, v));
    const y = (v: number) => Math.min(height - BOTTOM, Math.max(TOP, v));
    return [x(Math.min(sx, px)), y(Math.min(sy, py)), x(Math.max(sx, px)), y(Math.max(sy, py))];
  };
  const hasMoved = ([px, py]: [number, number]) =>
    start.current !== null && Math.hypot(px - start.current[0], py - start.current[1]) > MOVED;

  const onDown = (event: PointerEvent) => {
    start.current = at(event);
    canvas.current!.setPointerCapture(event.pointerId);
  };
  const onMove = (event: PointerEvent) => {
    const place = at(event);
    if (hasMoved(place)) {
      setDrag(boxTo(place));
      setNear(null);
    } else if (!start.current) setNear(nearest(place));
  };
  const onUp = (event: PointerEvent) => {
    const place = at(event);
    if (hasMoved(place)) {
      const [x0, y0, x1, y1] = boxTo(place);
      narrow({
        frequency: rangeWords([axes.x.value(x0), axes.x.value(x1)]),
        mean: rangeWords([axes.y.value(y1), axes.y.value(y0)]),
      });
    } else {
      const one = nearest(place);
      if (one !== null) open(one);
      else if (ranges.frequency || ranges.mean) narrow({ frequency: "", mean: "" });
    }
    start.current = null;
    setDrag(null);
  };
  const cancel = () => {
    start.current = null;
    setDrag(null);
  };

  return (
    <details class="card map" open={WIDE}>
      <summary>
        <h2>Map of latents</h2>
      </summary>
      <div class="plot">
        <canvas
          ref={canvas}
          role="img"
          aria-label={`Map of ${whole(run.facts.nFiring)} latents that fire, by frequency and mean value. The table of latents has the same numbers; its filter does what a drag over the map does.`}
          onPointerDown={onDown}
          onPointerMove={onMove}
          onPointerUp={onUp}
          onPointerCancel={cancel}
          onPointerLeave={() => setNear(null)}
        />
        {near !== null && <Hint run={run} latent={near} x={axes.x.place(frequency[near])} y={axes.y.place(mean[near])} width={width} />}
      </div>
      <p class="hint">Drag to filter, click a point to open it. Latents that never fire are not on the map.</p>
    </details>
  );
}

function Hint({ run, latent, x, y, width }: { run: Run; latent: number; x: number; y: number; width: number }) {
  const first = usePromise(() => run.examples(latent, 1), [run, latent])?.[0];
  const left = x > width / 2;
  return (
    <div class="tip" style={{ top: `${y + 10}px`, ...(left ? { right: `${width - x + 10}px` } : { left: `${x + 10}px` }) }}>
      {first && <Picture run={run} image={first.example} alt="" />}
      <span>
        <b>{latent}</b> {run.nameOf(latent)}
        <br />
        {percent(run.values("frequency")[latent])} · mean {number(run.values("mean")[latent])}
      </span>
    </div>
  );
}

function boxOf(axes: { x: Axis; y: Axis }, ranges: Record<string, Range>, width: number, height: number): Box | null {
  if (!ranges.frequency && !ranges.mean) return null;
  const clip = (value: number, low: number, high: number) => Math.min(high, Math.max(low, value));
  const [f0, f1] = ranges.frequency ?? [0, Infinity];
  const [m0, m1] = ranges.mean ?? [0, Infinity];
  const x = (value: number) => clip(value > 0 ? axes.x.place(value) : -Infinity, LEFT, width - RIGHT);
  const y = (value: number) => clip(value > 0 ? axes.y.place(value) : Infinity, TOP, height - BOTTOM);
  return [x(f0), y(m1), x(f1), y(m0)];
}

function frame(
  context: CanvasRenderingContext2D, axes: { x: Axis; y: Axis }, width: number, height: number,
  of: (name: string) => string,
): void {
  context.clearRect(0, 0, width, height);
  context.font = `11px ${of("--font") || "sans-serif"}`;
  context.strokeStyle = of("--line");
  context.fillStyle = of("--soft");
  context.lineWidth = 1;
  context.textAlign = "center";
  let last = -Infinity;
  for (const tick of axes.x.ticks) {
    const x = Math.round(axes.x.place(tick)) + 0.5;
    context.beginPath();
    context.moveTo(x, TOP);
    context.lineTo(x, height - BOTTOM);
    context.stroke();
    if (x - last < 46) continue;
    context.fillText(percent(tick).replace(/\.?0+%$/, "%"), x, height - BOTTOM + 15);
    last = x;
  }
  context.textAlign = "right";
  for (const tick of axes.y.ticks) {
    const y = Math.round(axes.y.place(tick)) + 0.5;
    context.beginPath();
    context.moveTo(LEFT, y);
    context.lineTo(width - RIGHT, y);
    context.stroke();
    context.fillText(String(tick), LEFT - 6, y + 4);
  }
  context.textAlign = "right";
  context.fillText("frequency →", width - RIGHT, height - 4);
  context.save();
  context.translate(10, TOP);
  context.rotate(-Math.PI / 2);
  context.fillText("mean value →", 0, 0);
  context.restore();
}
