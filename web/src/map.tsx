// All latents as points: by frequency and mean value, or by the directions of their decoder rows.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { Axis, drawFrame, prepare } from "./axis";
import { WIDE } from "./classes";
import { rangeWords, type Range } from "./filter";
import { figure, number, percent, whole } from "./format";
import { usePromise, useSize } from "./hooks";
import type { PageProps } from "./pages";
import { Picture } from "./picture";
import { colour, gradient } from "./pictures";
import type { Column, Run } from "./source";

const [LEFT, RIGHT, TOP, BOTTOM] = [46, 12, 10, 36];
const NEAR = 10;
const MOVED = 5;
/** Steps of the colour scale: points of one step are drawn together. */
const STEPS = 24;

type Box = [x0: number, y0: number, x1: number, y1: number];

const MODES = {
  "": { name: "frequency × mean", keys: ["frequency", "mean"] },
  directions: { name: "decoder directions", keys: ["x", "y"] },
} as const;

const short = (tick: number) => percent(tick).replace(/(\.\d*?)0+%$/, "$1%").replace(".%", "%");

export function LatentMap({ run, router, address, shown, filter, narrow, open }: PageProps) {
  const { ranges } = filter;
  const mode = address.words.map === "directions" && run.has("x") ? "directions" : "";
  const [keyX, keyY] = MODES[mode].keys;
  const canvas = useRef<HTMLCanvasElement>(null);
  const size = useSize(canvas);
  const [width, height] = size;
  const [drag, setDrag] = useState<Box | null>(null);
  const [near, setNear] = useState<number | null>(null);
  const start = useRef<[number, number] | null>(null);
  const [xs, ys] = [run.values(keyX), run.values(keyY)];
  const tokens = run.values("tokens");
  const isOn = (i: number) => tokens[i] > 0 && (mode ? xs[i] === xs[i] : xs[i] > 0 && ys[i] > 0);
  const by = run.facts.columns.find(({ key }) => key === address.words.by);

  const axes = useMemo(() => {
    const left = mode ? 8 : LEFT;
    const bottom = mode ? 8 : BOTTOM;
    return { x: new Axis(xs, !mode, left, width - RIGHT), y: new Axis(ys, !mode, height - bottom, TOP) };
  }, [run, mode, width, height]);
  const steps = useMemo(() => by && colourSteps(run, by), [run, by]);
  const isShown = useMemo(() => {
    const mask = new Uint8Array(run.facts.nLatents);
    for (const latent of shown) mask[latent] = 1;
    return mask;
  }, [run, shown]);

  // The points are drawn once; what moves with the pointer is on a second canvas above them.
  useEffect(() => {
    if (!width) return;
    const [context, of] = prepare(canvas.current!);
    context.clearRect(0, 0, width, height);
    if (!mode)
      drawFrame(context, { ...axes, names: ["frequency", "mean value"], write: [short, String] }, of);
    drawPoints(context, of);
  }, [axes, isShown, steps, size]);

  const radius = run.facts.nLatents > 4000 ? 1.6 : run.facts.nLatents > 1000 ? 2.2 : 3;
  const drawPoints = (context: CanvasRenderingContext2D, of: (name: string) => string) => {
    const n = run.facts.nLatents;
    const draw = (style: string, alpha: number, wanted: (i: number) => boolean) => {
      context.fillStyle = style;
      context.globalAlpha = alpha;
      for (let i = 0; i < n; i++) {
        if (!isOn(i) || !wanted(i)) continue;
        const [x, y] = [axes.x.place(xs[i]), axes.y.place(ys[i])];
        if (n > 4000) context.fillRect(x - radius, y - radius, 2 * radius, 2 * radius); // much faster
        else {
          context.beginPath();
          context.arc(x, y, radius, 0, 7);
          context.fill();
        }
      }
    };
    draw(of("--faint"), 0.6, (i) => !isShown[i] || steps?.[i] === 255);
    if (!steps) draw(of("--accent"), n > 4000 ? 0.5 : 0.7, (i) => isShown[i] === 1);
    else
      for (let step = 0; step < STEPS; step++)
        draw(colour(step / (STEPS - 1)), 0.9, (i) => isShown[i] === 1 && steps[i] === step);
    context.globalAlpha = 1;
  };

  const over = useRef<HTMLCanvasElement>(null);
  useEffect(() => {
    if (!width) return;
    const [context, of] = prepare(over.current!);
    const box = drag ?? boxOf(axes, [ranges[keyX], ranges[keyY]], width, height);
    if (box) {
      context.strokeStyle = context.fillStyle = of("--accent");
      context.globalAlpha = 0.12;
      context.fillRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
      context.globalAlpha = 1;
      context.strokeRect(box[0] + 0.5, box[1] + 0.5, box[2] - box[0], box[3] - box[1]);
    }
    if (near !== null) {
      context.strokeStyle = of("--ink");
      context.lineWidth = 2;
      context.beginPath();
      context.arc(axes.x.place(xs[near]), axes.y.place(ys[near]), radius + 3, 0, 7);
      context.stroke();
    }
  }, [axes, drag, near, ranges, size]);

  const at = (event: PointerEvent): [number, number] => {
    const box = canvas.current!.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const nearest = ([px, py]: [number, number]): number | null => {
    let [best, found]: [number, number | null] = [NEAR ** 2, null];
    for (let i = 0; i < run.facts.nLatents; i++) {
      if (!isOn(i)) continue;
      const far = (axes.x.place(xs[i]) - px) ** 2 + (axes.y.place(ys[i]) - py) ** 2;
      if (far < best) [best, found] = [far, i];
    }
    return found;
  };
  const boxTo = ([px, py]: [number, number]): Box => {
    const [sx, sy] = start.current!;
    const x = (v: number) => Math.min(axes.x.to, Math.max(axes.x.from, v));
    const y = (v: number) => Math.min(axes.y.from, Math.max(axes.y.to, v));
    return [x(Math.min(sx, px)), y(Math.min(sy, py)), x(Math.max(sx, px)), y(Math.max(sy, py))];
  };
  const hasMoved = ([px, py]: [number, number]) =>
    start.current !== null && Math.hypot(px - start.current[0], py - start.current[1]) > MOVED;

  const onDown = (event: PointerEvent) => {
    start.current = at(event);
    over.current!.setPointerCapture(event.pointerId);
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
        [keyX]: rangeWords([axes.x.value(x0), axes.x.value(x1)]),
        [keyY]: rangeWords([axes.y.value(y1), axes.y.value(y0)]),
      });
    } else {
      const one = nearest(place);
      if (one !== null) open(one);
      else if (ranges[keyX] || ranges[keyY]) narrow({ [keyX]: "", [keyY]: "" });
    }
    start.current = null;
    setDrag(null);
  };
  const cancel = () => {
    start.current = null;
    setDrag(null);
  };
  // Arrows go through the list's latents; the map shows where each one is.
  const onKey = (event: KeyboardEvent) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter" && near !== null) open(near);
    if (by === undefined || !shown.length) return;
    event.preventDefault();
    let place = near === null ? (by > 0 ? -1 : 0) : shown.indexOf(near);
    for (let tries = 0; tries < shown.length; tries++) {
      place = (place + by + shown.length) % shown.length;
      if (isOn(shown[place])) return setNear(shown[place]);
    }
  };

  return (
    <details class="card map" open={WIDE}>
      <summary>
        <h2>Map of latents</h2>
      </summary>
      <div class="choices">
        <label>
          by{" "}
          <select id="map-mode" value={mode} onChange={(e) => router.say({ map: e.currentTarget.value, x: "", y: "" })}>
            {Object.entries(MODES).map(([key, { name }]) => (!key || run.has("x")) && <option value={key}>{name}</option>)}
          </select>
        </label>
        <label>
          colour{" "}
          <select id="map-colour" value={by?.key ?? ""} onChange={(e) => router.say({ by: e.currentTarget.value })}>
            <option value="">none</option>
            {run.facts.columns.map(({ key, name }) => <option value={key}>{name}</option>)}
          </select>
        </label>
        {by && <Legend run={run} column={by} />}
      </div>
      <div class="plot">
        <canvas ref={canvas} aria-hidden="true" />
        <canvas
          ref={over}
          class="over"
          role="application"
          tabIndex={0}
          aria-label={`Map of ${whole(run.facts.nFiring)} latents that fire, by ${MODES[mode].name}. Arrows go through the latents of the list, Enter opens one. The table of latents has the same numbers, and its filter does what a drag over the map does.`}
          onPointerDown={onDown}
          onPointerMove={onMove}
          onPointerUp={onUp}
          onPointerCancel={cancel}
          onPointerLeave={() => setNear(null)}
          onKeyDown={onKey}
          onBlur={() => setNear(null)}
        />
        {near !== null && <Hint run={run} latent={near} by={by} x={axes.x.place(xs[near])} y={axes.y.place(ys[near])} width={width} />}
      </div>
      <p class="hint">
        {mode ? "The first two principal components of the decoder's directions: close points are similar at most in these two. " : ""}
        Drag to filter, click a point to open it. Latents that never fire are not on the map.
      </p>
    </details>
  );
}

/** Lowest and highest value of a column, without the outermost hundredth at each end. */
function bounds(run: Run, { key, log }: Column): [number, number] {
  const known = Float64Array.from(run.values(key)).filter((v) => !Number.isNaN(v) && (!log || v > 0)).sort();
  if (!known.length) return [0, 1];
  const cut = Math.floor(known.length / 100);
  return [known[cut], known[known.length - 1 - cut]];
}

/** The step of the colour scale of each latent; 255: it has no value. */
function colourSteps(run: Run, column: Column): Uint8Array {
  const [low, high] = bounds(run, column);
  const place = (v: number) =>
    column.log ? Math.log(v / low) / (Math.log(high / low) || 1) : (v - low) / (high - low || 1);
  return Uint8Array.from(run.values(column.key), (v) =>
    Number.isNaN(v) || (column.log && v <= 0) ? 255 : Math.round(Math.min(1, Math.max(0, place(v))) * (STEPS - 1)),
  );
}

function Legend({ run, column }: { run: Run; column: Column }) {
  const [low, high] = bounds(run, column);
  return (
    <span class="scale" role="img" aria-label={`Colours from ${figure(low, column.unit)}, dark blue, to ${figure(high, column.unit)}, yellow`}>
      {figure(low, column.unit)}
      {gradient()}
      {figure(high, column.unit)}
    </span>
  );
}

interface HintProps {
  run: Run;
  latent: number;
  by: Column | undefined;
  x: number;
  y: number;
  width: number;
}

function Hint({ run, latent, by, x, y, width }: HintProps) {
  const first = usePromise(() => run.examples(latent, 1), [run, latent])?.[0];
  const left = x > width / 2;
  return (
    <div class="tip" role="status" style={{ top: `${y + 10}px`, ...(left ? { right: `${width - x + 10}px` } : { left: `${x + 10}px` }) }}>
      {first && <Picture run={run} image={first.example} alt="" />}
      <span>
        <b>{latent}</b> {run.nameOf(latent)}
        <br />
        {percent(run.values("frequency")[latent])} · mean {number(run.values("mean")[latent])}
        {by && !["frequency", "mean"].includes(by.key) && (
          <>
            <br />
            {by.name} {figure(run.values(by.key)[latent], by.unit)}
          </>
        )}
      </span>
    </div>
  );
}

function boxOf(axes: { x: Axis; y: Axis }, [xs, ys]: (Range | undefined)[], width: number, height: number): Box | null {
  if (!xs && !ys) return null;
  const clip = (value: number, low: number, high: number) => Math.min(high, Math.max(low, value));
  const place = (axis: Axis, value: number | undefined, end: number) =>
    value === undefined || !Number.isFinite(value) || (axis.isLog && value <= 0) ? end : axis.place(value);
  const { x, y } = axes;
  return [
    clip(place(x, xs?.[0], x.from), 0, width), clip(place(y, ys?.[1], y.to), 0, height),
    clip(place(x, xs?.[1], x.to), 0, width), clip(place(y, ys?.[0], y.from), 0, height),
  ];
}
