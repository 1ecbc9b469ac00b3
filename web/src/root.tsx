// All SAEs: a plot of two figures, a table with what differs in their configs, and curves.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { follow, toHash, type Address, type Router } from "./address";
import { Axis, drawFrame, prepare } from "./axis";
import { count, number, whole } from "./format";
import { useSize } from "./hooks";
import type { Source, Summary } from "./source";

const [LEFT, RIGHT, TOP, BOTTOM] = [58, 16, 12, 38];
const NEAR = 14;
/** Okabe and Ito's colours, which can be told apart with any colour vision. Yellow is left out. */
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"];
const NAMES: Record<string, string> = { nmse: "NMSE", l0: "L0", n_dead: "Dead latents", dense_share: "Dense share", d_sae: "Latents" };

function nameOf(key: string): string {
  const [, side, of] = /^(training|all)_(.*)$/.exec(key) ?? [];
  return side ? `${nameOf(of)}, ${side}` : (NAMES[key] ?? key.replace(/_/g, " "));
}

interface Props {
  source: Source;
  runs: Summary[];
  address: Address;
  router: Router;
}

/** Entries of configs that are not the same for all. */
function differing(runs: Summary[]): string[] {
  const keys = new Set(runs.flatMap(({ config }) => Object.keys(config)));
  return [...keys].filter((key) => new Set(runs.map(({ config }) => config[key])).size > 1);
}

/** No other SAE on the same images has both figures lower. */
function onFront(runs: Summary[], x: string, y: string): Set<string> {
  const known = runs.filter(({ figures }) => Number.isFinite(figures[x]) && Number.isFinite(figures[y]));
  const beaten = (one: Summary) =>
    known.some((other) => other !== one && other.dataset === one.dataset && other.figures[x] <= one.figures[x] && other.figures[y] <= one.figures[y]
      && (other.figures[x] < one.figures[x] || other.figures[y] < one.figures[y]));
  return new Set(known.filter((one) => !beaten(one)).map(({ id }) => id));
}

export function Root({ runs, address, router }: Props) {
  const { words } = address;
  const figures = useMemo(() => [...new Set(runs.flatMap((run) => Object.keys(run.figures)))], [runs]);
  const pick = (word: string | undefined, usual: string) => (word && figures.includes(word) ? word : figures.includes(usual) ? usual : figures[0]);
  const [x, y] = [pick(words.x, "l0"), pick(words.y, "nmse")];
  const datasets = [...new Set(runs.map(({ dataset }) => dataset))];
  const shown = words.dataset && datasets.includes(words.dataset) ? runs.filter(({ dataset }) => dataset === words.dataset) : runs;
  const config = useMemo(() => differing(shown), [shown.length, words.dataset]);
  const front = useMemo(() => onFront(shown, x, y), [shown.length, words.dataset, x, y]);
  const [near, setNear] = useState<string | null>(null);
  const sort = words.sort || (x ?? "");
  const key = sort.replace(/^-/, "");
  const value = (run: Summary): number | string => run.figures[key] ?? run.config[key] ?? (key === "title" ? run.title : NaN);
  const order = [...shown].sort((a, b) => (sort.startsWith("-") ? -1 : 1) * compared(value(a), value(b)));
  const heads = (name: string, label: string, isNumber: boolean) => (
    <th key={name} scope="col" class={isNumber ? "n" : ""} aria-sort={sort === name ? "ascending" : sort === `-${name}` ? "descending" : undefined}>
      <button type="button" onClick={() => router.say({ sort: sort === name ? `-${name}` : name })}>{label}</button>
    </th>
  );
  const sides = [...new Set(shown.map(({ side }) => side).filter(Boolean))];
  const open = (run: Summary) => router.go({ run: run.id, page: "", item: "", words: {} });
  return (
    <>
      <header class="top">
        <div class="titles">
          <h1>{count(runs.length, "SAE")}</h1>
          <p>{count(datasets.length, "dataset")}{sides.length ? ` · figures of ${sides.join(" or ")}` : ""}</p>
        </div>
      </header>
      <main class="one root">
        {datasets.length > 1 && (
          <label class="bar">
            Dataset{" "}
            <select id="dataset" value={words.dataset ?? ""} onChange={(e) => router.say({ dataset: e.currentTarget.value })}>
              <option value="">all</option>
              {datasets.map((one) => <option value={one}>{one}</option>)}
            </select>
          </label>
        )}
        <div class="charts">
          {figures.length > 1 && (
            <section class="card" aria-label="Plot">
              <div class="choices">
                {([["x", x], ["y", y]] as const).map(([axis, chosen]) => (
                  <label key={axis}>
                    {axis === "x" ? "across" : "up"}{" "}
                    <select id={`axis-${axis}`} value={chosen} onChange={(e) => router.say({ [axis]: e.currentTarget.value })}>
                      {figures.map((one) => <option value={one}>{nameOf(one)}</option>)}
                    </select>
                  </label>
                ))}
              </div>
              <Scatter runs={shown} x={x} y={y} front={front} near={near} setNear={setNear} open={open} />
              <p class="hint">Filled points are on the front: no other SAE on the same images has both figures lower. Click a point to open its SAE; the table below has the same numbers.</p>
            </section>
          )}
          <Curves runs={shown} chosen={words.curve} choose={(curve) => router.say({ curve })} near={near} />
        </div>
        <section class="card" aria-label="SAEs">
          <div class="scroll wide" tabIndex={0} role="region" aria-label="Table of SAEs">
            <table class="saes">
              <thead>
                <tr>
                  {heads("title", "SAE", false)}
                  {datasets.length > 1 && <th scope="col">Dataset</th>}
                  {figures.map((one) => heads(one, nameOf(one), true))}
                  {config.map((one) => heads(one, one, false))}
                </tr>
              </thead>
              <tbody>
                {order.map((run) => (
                  <tr key={run.id} class={near === run.id ? "near-row" : ""} onMouseEnter={() => setNear(run.id)} onMouseLeave={() => setNear(null)}>
                    <th scope="row">
                      {run.isMeasured ? (
                        <a href={toHash({ run: run.id, page: "", item: "", words: {} })} onFocus={() => setNear(run.id)} onClick={(event) => follow(event, () => open(run))}>{run.title}</a>
                      ) : (
                        <span title="Not measured: run saev inference">{run.title}</span>
                      )}
                    </th>
                    {datasets.length > 1 && <td>{run.dataset}</td>}
                    {figures.map((one) => <td key={one} class="n">{written(run.figures[one])}</td>)}
                    {config.map((one) => <td key={one}>{run.config[one] ?? "–"}</td>)}
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
        </section>
      </main>
    </>
  );
}

const written = (value: number | undefined): string =>
  value === undefined || !Number.isFinite(value) ? "–" : Number.isInteger(value) ? whole(value) : number(value);

function compared(a: number | string, b: number | string): number {
  const [x, y] = [Number(a), Number(b)];
  if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
  return String(a).localeCompare(String(b));
}

interface ScatterProps {
  runs: Summary[];
  x: string;
  y: string;
  front: Set<string>;
  near: string | null;
  setNear: (id: string | null) => void;
  open: (run: Summary) => void;
}

function Scatter({ runs, x, y, front, near, setNear, open }: ScatterProps) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const size = useSize(canvas);
  const [width, height] = size;
  const known = runs.filter(({ figures }) => Number.isFinite(figures[x]) && Number.isFinite(figures[y]));
  const axes = useMemo(() => {
    const values = (key: string) => known.map(({ figures }) => figures[key]);
    const isLog = (key: string) => values(key).every((v) => v > 0) && Math.max(...values(key)) > 4 * Math.min(...values(key));
    return {
      x: new Axis(values(x), isLog(x), LEFT, width - RIGHT),
      y: new Axis(values(y), isLog(y), height - BOTTOM, TOP),
    };
  }, [known.length, x, y, width, height]);
  const place = ({ figures }: Summary): [number, number] => [axes.x.place(figures[x]), axes.y.place(figures[y])];
  useEffect(() => {
    if (!width) return;
    const [context, of] = prepare(canvas.current!);
    context.clearRect(0, 0, width, height);
    drawFrame(context, { ...axes, names: [nameOf(x), nameOf(y)], write: [String, String] }, of);
    for (const run of known) {
      const [px, py] = place(run);
      context.strokeStyle = context.fillStyle = of("--accent");
      context.lineWidth = 1.5;
      context.beginPath();
      context.arc(px, py, run.id === near ? 7 : 4.5, 0, 7);
      if (front.has(run.id)) context.fill();
      context.stroke();
    }
  }, [axes, near, front, size]);
  const nearest = (event: PointerEvent): Summary | null => {
    const box = canvas.current!.getBoundingClientRect();
    let [best, found]: [number, Summary | null] = [NEAR ** 2, null];
    for (const run of known) {
      const [px, py] = place(run);
      const far = (px - event.clientX + box.left) ** 2 + (py - event.clientY + box.top) ** 2;
      if (far < best) [best, found] = [far, run];
    }
    return found;
  };
  const shown = known.find(({ id }) => id === near);
  return (
    <div class="plot">
      <canvas
        ref={canvas}
        role="img"
        aria-label={`${known.length} SAEs by ${nameOf(x)} and ${nameOf(y)}. The table below has the same numbers.`}
        onPointerMove={(event) => setNear(nearest(event)?.id ?? null)}
        onPointerLeave={() => setNear(null)}
        onClick={(event) => {
          const one = nearest(event as unknown as PointerEvent);
          if (one?.isMeasured) open(one);
        }}
      />
      {shown && <Tip run={shown} x={x} y={y} at={place(shown)} width={width} />}
    </div>
  );
}

function Tip({ run, x, y, at: [px, py], width }: { run: Summary; x: string; y: string; at: [number, number]; width: number }) {
  const side = px > width / 2 ? { right: `${width - px + 12}px` } : { left: `${px + 12}px` };
  return (
    <div class="tip" style={{ top: `${py + 10}px`, ...side }}>
      <span>
        <b>{run.title}</b>
        <br />
        {nameOf(x)} {written(run.figures[x])} · {nameOf(y)} {written(run.figures[y])}
      </span>
    </div>
  );
}

interface CurvesProps {
  runs: Summary[];
  chosen: string | undefined;
  choose: (name: string) => void;
  near: string | null;
}

function Curves({ runs, chosen, choose, near }: CurvesProps) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const names = useMemo(() => [...new Set(runs.flatMap(({ curves }) => Object.keys(curves)))], [runs]);
  const name = chosen && names.includes(chosen) ? chosen : (names.find((one) => one.endsWith("normalized_mse")) ?? names[0]);
  const lines = useMemo(() => distinct(runs, name), [runs, name]);
  if (!names.length) return null;
  const title = runs.find(({ id }) => id === near)?.title;
  return (
    <section class="card" aria-label="Curves">
      <div class="choices">
        <label>
          curve{" "}
          <select id="curve" value={name} onChange={(e) => choose(e.currentTarget.value)}>
            {names.map((one) => <option value={one}>{one}</option>)}
          </select>
        </label>
      </div>
      <Lines key={name} canvas={canvas} runs={lines} name={name} near={lines.find((one) => one.title === title)?.id ?? null} />
      <ul class="legend">
        {lines.slice(0, 12).map((run, i) => (
          <li key={run.id}>
            <svg viewBox="0 0 18 4" aria-hidden="true"><path d="M0 2h18" stroke={COLOURS[i % COLOURS.length]} stroke-width="3" stroke-dasharray={dash(i).join(" ")} /></svg>
            {run.title}
          </li>
        ))}
      </ul>
    </section>
  );
}

/** SAEs with a curve. One that was measured on several datasets was trained once, so it is there once. */
function distinct(runs: Summary[], name: string): Summary[] {
  const found = new Map<string, Summary>();
  for (const run of runs) {
    const key = JSON.stringify([run.title, run.curves[name]]);
    if (run.curves[name] && !found.has(key)) found.set(key, run);
  }
  return [...found.values()];
}

/** Lines beyond the colours are dashed, so that they can be told apart. */
const dash = (i: number): number[] => [[], [6, 3], [2, 2]][Math.floor(i / COLOURS.length) % 3];

interface LinesProps {
  canvas: { current: HTMLCanvasElement | null };
  runs: Summary[];
  name: string;
  near: string | null;
}

function Lines({ canvas, runs, name, near }: LinesProps) {
  const size = useSize(canvas);
  const [width, height] = size;
  useEffect(() => {
    if (!width) return;
    const [context, of] = prepare(canvas.current!);
    context.clearRect(0, 0, width, height);
    const all = (side: 0 | 1) => runs.flatMap(({ curves }) => curves[name][side].filter(Number.isFinite));
    const values = all(1);
    const isLog = values.every((v) => v > 0) && Math.max(...values) > 4 * Math.min(...values);
    const x = new Axis(all(0), false, LEFT, width - RIGHT);
    const y = new Axis(values, isLog, height - BOTTOM, TOP);
    drawFrame(context, { x, y, names: ["step", name], write: [(v) => v.toLocaleString("en"), String] }, of);
    runs.forEach((run, i) => {
      const [steps, curve] = run.curves[name];
      context.strokeStyle = COLOURS[i % COLOURS.length];
      context.setLineDash(dash(i));
      context.lineWidth = run.id === near ? 3.5 : 1.8;
      context.globalAlpha = near && run.id !== near ? 0.35 : 1;
      context.beginPath();
      curve.forEach((value, at) => Number.isFinite(value) && context.lineTo(x.place(steps[at]), y.place(value)));
      context.stroke();
    });
    context.setLineDash([]);
    context.globalAlpha = 1;
  }, [runs.length, name, near, size]);
  return (
    <div class="plot">
      <canvas ref={canvas} role="img" aria-label={`Curves of ${name} of ${runs.length} SAEs over the steps of training`} />
    </div>
  );
}
