import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { follow } from "./classes";
import { BINS, type Example, type Run } from "./data";
import { number, percent, whole } from "./format";
import { Picture } from "./picture";
import { colour } from "./pictures";
import type { View } from "./route";

const RANGES: [name: string, hint: string][] = [
  ["Strongest images", ""],
  ["From the middle of its range", "images whose value is between one and two thirds of the maximum"],
  ["From the low end", "images whose value is below a third of the maximum: what does it confuse?"],
];

interface Props {
  run: Run;
  latent: number;
  place: [number, number];
  step: (by: number) => void;
  close: () => void;
  open: (latent: number) => void;
  filter: (change: Partial<View>) => void;
  href: (latent: number) => string;
}

export function Latent({ run, latent, place, step, close, open, filter, href }: Props) {
  const heading = useRef<HTMLHeadingElement>(null);
  const [threshold, setThreshold] = useState(0);
  const [marked, setMarked] = useState(true);
  const examples = useMemo(() => run.examples(latent), [run, latent]);
  const max = run.max[latent];
  const usual = run.usual[latent];
  const fires = run.count[latent] > 0;

  useEffect(() => heading.current?.focus({ preventScroll: true }), [latent]);
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      const types = (event.target as HTMLElement).matches("input:not([type=range]), select, textarea");
      if (event.key === "h" && !types && !event.ctrlKey && !event.metaKey && !event.altKey) setMarked((on) => !on);
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);

  const stats: [string, string, string][] = [
    ["Frequency", percent(run.frequency[latent]), `Fires on ${whole(run.count[latent])} of ${whole(run.facts.nTokens)} tokens`],
    ["Mean value", fires ? number(run.mean[latent]) : "–", "On the tokens on which it fires"],
    ["Max", fires ? number(max) : "–", "Largest value"],
  ];
  if (run.images) stats.push(["Images", whole(run.images[latent]), "Images on which it fires"]);
  if (usual >= 0) stats.push(["Purity", `${Math.round(100 * run.purity[latent])}%`, "Share of its most common class among its strongest images"]);

  return (
    <main class="one" data-latent={latent}>
      <nav class="bar" aria-label="Latents">
        <button type="button" id="back" onClick={close}>‹ All latents</button>
        <span class="group">
          <button type="button" id="previous" onClick={() => step(-1)} aria-label="Previous latent">←</button>
          <button type="button" id="next" onClick={() => step(1)} aria-label="Next latent">→</button>
        </span>
        <output>{place[0] ? `${whole(place[0])} of ${whole(place[1])}` : "not in the filter"}</output>
        <CopyPython run={run} latent={latent} />
      </nav>
      <div class="title">
        <h2 ref={heading} tabIndex={-1}>Latent {latent}</h2>
        {usual >= 0 && (
          <button type="button" class="chip" title="List the latents of this class" onClick={() => filter({ classNumber: usual, query: "", ranges: {} })}>
            {run.className(usual)}
          </button>
        )}
        {!fires && <span class="chip">never fires</span>}
      </div>
      <dl class="metrics">
        {stats.map(([name, text, hint]) => (
          <div title={hint}>
            <dt>{name}</dt>
            <dd data-stat={name}>{text}</dd>
          </div>
        ))}
      </dl>
      {fires && (
        <div class="about">
          <Histogram run={run} latent={latent} threshold={threshold} />
          <Shares run={run} latent={latent} />
          <Neighbours run={run} latent={latent} href={href} open={open} />
        </div>
      )}
      {examples.length > 0 && (
        <div class="bar marks">
          <label>
            <input type="checkbox" checked={marked} onChange={(e) => setMarked(e.currentTarget.checked)} /> Mark patches
          </label>
          <label class="threshold">
            that have at least
            <input type="range" id="threshold" min={0} max={100} value={Math.round(threshold * 100)} disabled={!marked}
              aria-valuetext={number(threshold * max)} onInput={(e) => setThreshold(Number(e.currentTarget.value) / 100)} />
            <output>{number(threshold * max)}</output>
          </label>
          <Scale max={max} />
        </div>
      )}
      {RANGES.map(([name, hint], range) => {
        const mine = examples.filter((e) => e.range === range);
        return mine.length > 0 && (
          <section class="range" aria-label={name}>
            <h3>{name} {hint && <small>{hint}</small>}</h3>
            <div class="pictures">
              {mine.map((e) => <Figure run={run} example={e} marked={marked} threshold={threshold} />)}
            </div>
          </section>
        );
      })}
      {fires && examples.length === 0 && run.thumb[latent] >= 0 && (
        <section class="range">
          <h3>Strongest image <small>the file had no room for more of this latent</small></h3>
          <div class="pictures few">
            <figure>
              <Picture run={run} image={run.thumb[latent]} alt={run.facts.files[run.thumb[latent]]} />
              <figcaption><b>{run.label(run.thumb[latent])}</b><small>{run.facts.files[run.thumb[latent]]}</small></figcaption>
            </figure>
          </div>
        </section>
      )}
      {fires && run.thumb[latent] < 0 && (
        <p class="nothing">The file has no room for pictures of this latent: write it with a larger <code>--max-mb</code>.</p>
      )}
    </main>
  );
}

function Figure({ run, example, marked, threshold }: { run: Run; example: Example; marked: boolean; threshold: number }) {
  const { facts } = run;
  const label = run.label(example.image);
  const patches = facts.grid[0] * facts.grid[1];
  const file = facts.files[example.image];
  return (
    <figure>
      <Picture run={run} image={example.image} example={marked ? example : null} threshold={threshold}
        alt={`${label || file}: ${example.patches.length} of ${patches} patches fire, at most ${number(example.value)}`} />
      <figcaption>
        <b>{label || file}</b>
        <span class="value">{number(example.value)}</span>
        {label && <small class="file">{file}</small>}
        <small>{example.patches.length} of {patches} patches</small>
      </figcaption>
    </figure>
  );
}

function Scale({ max }: { max: number }) {
  return (
    <span class="scale" role="img" aria-label={`Colours from 0 to ${number(max)}: dark blue is weak, yellow is strong`}>
      0
      <svg viewBox="0 0 48 1" preserveAspectRatio="none" aria-hidden="true">
        {Array.from({ length: 48 }, (_, i) => <rect x={i} width={1.05} height={1} fill={colour(i / 47)} />)}
      </svg>
      {number(max)}
    </span>
  );
}

function Histogram({ run, latent, threshold }: { run: Run; latent: number; threshold: number }) {
  const bins = run.row("bins", latent);
  const max = run.max[latent];
  return (
    <section class="card">
      <h3>Values {!run.facts.hasCodes && <small>of its strongest images</small>}</h3>
      <svg class="bars" viewBox={`0 0 ${BINS} 60`} preserveAspectRatio="none" role="img" aria-label={`Histogram of its values from 0 to ${number(max)}`}>
        {bins.map((height, i) => height > 0 && (
          <rect x={i + 0.06} width={0.88} y={60 - Math.max(1.5, (58 * height) / 255)} height={60} class={(i + 1) / BINS > threshold ? "" : "below"} />
        ))}
      </svg>
      <p class="axis"><span>0</span><span>heights are square roots of counts</span><span>{number(max)}</span></p>
    </section>
  );
}

function Shares({ run, latent }: { run: Run; latent: number }) {
  if (!run.has("shareClass")) return null;
  const classes = run.row("shareClass", latent);
  const images = run.row("shareImages", latent);
  return (
    <section class="card">
      <h3>Classes <small>share of their images on which it fires</small></h3>
      <table class="shares">
        <tbody>
          {classes.map((one, i) => one >= 0 && (
            <tr title={`${whole(images[i])} of ${whole(run.facts.imagesByClass[one])} images`}>
              <th scope="row">{run.className(one)}</th>
              <td class="meter"><span style={{ width: `${(100 * images[i]) / run.facts.imagesByClass[one]}%` }} /></td>
              <td class="n">{percent(images[i] / run.facts.imagesByClass[one])}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </section>
  );
}

function Neighbours({ run, latent, href, open }: Pick<Props, "run" | "latent" | "href" | "open">) {
  if (!run.has("near")) return null;
  const near = run.row("near", latent);
  const cosines = run.row("cosine", latent).map((c) => c / 32767);
  return (
    <section class="card">
      <h3>Neighbours <small>cosine of decoder directions</small></h3>
      <div class="near">
        {near.map((one, i) => (
          <a key={one} href={href(one)} onClick={(event) => follow(event, () => open(one))}>
            {run.thumb[one] >= 0 ? (
              <Picture run={run} image={run.thumb[one]} example={run.examples(one)[0] ?? null} alt="" />
            ) : (
              <span class="blank" />
            )}
            <b>{one}</b>
            <small>{cosines[i].toFixed(2)}</small>
          </a>
        ))}
      </div>
    </section>
  );
}

/** Puts a line of Python into the clipboard; where that is not allowed, into a box, selected. */
function CopyPython({ run, latent }: { run: Run; latent: number }) {
  const [state, setState] = useState<"" | "copied" | "shown">("");
  const box = useRef<HTMLTextAreaElement>(null);
  const text = `from saev.inference.results import Results\nResults.open(${JSON.stringify(run.facts.results)}).top(${latent})`;
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      setState("copied");
    } catch {
      setState("shown");
    }
  };
  useEffect(() => {
    if (state === "shown") box.current?.select();
  }, [state]);
  return (
    <span class="copy">
      <button type="button" onClick={() => void copy()}>{state === "copied" ? "Copied" : "Copy as Python"}</button>
      {state === "shown" && <textarea ref={box} readOnly rows={2} aria-label="Python, to be copied" value={text} />}
    </span>
  );
}
