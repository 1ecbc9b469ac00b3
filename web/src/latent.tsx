// The page of one latent.
import { useEffect, useRef, useState } from "preact/hooks";
import { follow } from "./address";
import { noFilter } from "./filter";
import { figure, number, whole } from "./format";
import { usePromise } from "./hooks";
import type { Page, PageProps } from "./pages";
import { Picture } from "./picture";
import { colour } from "./pictures";
import type { Detail, Example, Near, Run } from "./source";

function Latent({ run, address, router, filter, shown, step, narrow, open, href }: PageProps) {
  const latent = Number(address.item);
  if (!/^\d+$/.test(address.item) || latent >= run.facts.nLatents)
    throw new Error(`There is no latent ${address.item}: the SAE has ${whole(run.facts.nLatents)}.`);
  const detail = usePromise(() => run.latent(latent), [run, latent]);
  const heading = useRef<HTMLHeadingElement>(null);
  const [threshold, setThreshold] = useState(0);
  const [marked, setMarked] = useState(true);
  const high = run.values(run.has("max_all") ? "max_all" : "max")[latent];
  const fires = run.values("tokens")[latent] > 0;
  const best = [run.values("class")[latent], run.values("mask")[latent]].find((one) => one >= 0);
  const place = shown.indexOf(latent) + 1;

  useEffect(() => heading.current?.focus({ preventScroll: true }), [latent]);
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      const types = (event.target as HTMLElement).matches("input:not([type=range], [type=checkbox]), select, textarea");
      if (event.key === "h" && !types && !event.ctrlKey && !event.metaKey && !event.altKey) setMarked((on) => !on);
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);

  const examples = detail?.examples ?? [];
  const hasMarks = examples.some(({ patches }) => patches);
  return (
    <main class="one" data-latent={latent}>
      <nav class="bar" aria-label="Latents">
        <button type="button" id="back" onClick={() => router.go({ page: "", item: "" })}>‹ All latents</button>
        <span class="group">
          <button type="button" id="previous" onClick={() => step(-1)} aria-label="Previous latent">←</button>
          <button type="button" id="next" onClick={() => step(1)} aria-label="Next latent">→</button>
        </span>
        <output>{place ? `${whole(place)} of ${whole(shown.length)}` : "not in the filter"}</output>
        <CopyPython run={run} latent={latent} />
      </nav>
      <div class="title">
        <h2 ref={heading} tabIndex={-1}>Latent {latent}</h2>
        {best !== undefined && (
          <button type="button" class="chip" title="List the latents of this class" onClick={() => narrow({ ...noFilter(filter), class: String(best) })}>
            {run.facts.classes[best].name}
          </button>
        )}
        {!fires && <span class="chip">never fires</span>}
      </div>
      <Figures run={run} latent={latent} />
      {fires && detail && (
        <div class="about">
          <Values detail={detail} high={high} threshold={threshold * high} />
          <Shares run={run} detail={detail} />
          <Nearest run={run} name="Neighbours" hint="cosine of decoder directions" near={detail.neighbours} href={href} open={open} />
          <Nearest run={run} name="Fire together" hint="cosine of the tokens on which they fire" near={detail.coactive} href={href} open={open} />
        </div>
      )}
      {hasMarks && (
        <div class="bar marks">
          <label>
            <input type="checkbox" checked={marked} onChange={(e) => setMarked(e.currentTarget.checked)} /> Mark patches
          </label>
          <label class="threshold">
            that have at least
            <input type="range" id="threshold" min={0} max={100} value={Math.round(threshold * 100)} disabled={!marked}
              aria-valuetext={number(threshold * high)} onInput={(e) => setThreshold(Number(e.currentTarget.value) / 100)} />
            <output>{number(threshold * high)}</output>
          </label>
          <Scale high={high} />
        </div>
      )}
      {ranges(examples).map(({ name, hint, mine }) => mine.length > 0 && (
        <section key={name} class="range" aria-label={name}>
          <h3>{name} {hint && <small>{hint}</small>}</h3>
          <div class="pictures">
            {mine.map((e) => <Figure key={`${e.kind}${e.example}`} run={run} example={e} marked={marked} high={high} threshold={threshold} />)}
          </div>
        </section>
      ))}
      {fires && detail && examples.length === 0 && (
        <p class="nothing">The file has no room for pictures of this latent: write it with a larger <code>--max-mb</code>.</p>
      )}
    </main>
  );
}

export const latent: Page = { path: "latent", View: Latent };

/** The strongest images, and a sample of all on which it fires, in two halves. */
function ranges(examples: Example[]): { name: string; hint: string; mine: Example[] }[] {
  const isUpper = ({ quantile }: Example) => !(quantile <= 0.5);
  const spread = examples.filter(({ kind }) => kind === "spread");
  const top = examples.filter(({ kind }) => kind === "top");
  const few = top.length === 1 && !top[0].patches ? "the file had no room for more of this latent" : "";
  return [
    { name: "Strongest images", hint: few, mine: top },
    { name: "From the upper half", hint: "a sample of the images on which it fires", mine: spread.filter(isUpper) },
    { name: "From the lower half", hint: "what does it confuse?", mine: spread.filter((e) => !isUpper(e)) },
  ];
}

function Figures({ run, latent }: { run: Run; latent: number }) {
  const { facts } = run;
  return (
    <dl class="metrics">
      {facts.columns.map(({ key, name, hint, unit, all }) => {
        const value = run.values(key)[latent];
        if (Number.isNaN(value)) return null;
        return (
          <div key={key} title={all ? `${hint}. Of ${facts.side}; below, of all images` : hint}>
            <dt>{name}</dt>
            <dd data-stat={key}>{figure(value, unit)}</dd>
            {all && <small>{figure(run.values(all)[latent], unit)}</small>}
          </div>
        );
      })}
    </dl>
  );
}

interface FigureProps {
  run: Run;
  example: Example;
  marked: boolean;
  high: number;
  threshold: number;
}

function Figure({ run, example, marked, high, threshold }: FigureProps) {
  const { facts } = run;
  const { label, file, patches, value, side } = example;
  const all = facts.grid[0] * facts.grid[1];
  const fires = patches ? `${patches.length} of ${all} patches` : "";
  return (
    <figure>
      <Picture run={run} image={example.example} marks={marked && patches ? example : null} high={high} threshold={threshold * high}
        alt={patches ? `${label || file}: ${fires} fire, at most ${number(value)}` : label || file} />
      <figcaption>
        <b>{label || file}</b>
        <span class="value">{number(value)}</span>
        {label && <small class="file">{file}</small>}
        {patches && <small>{fires}{side === "unknown" ? "" : ` · ${side}`}</small>}
      </figcaption>
    </figure>
  );
}

function Scale({ high }: { high: number }) {
  return (
    <span class="scale" role="img" aria-label={`Colours from 0 to ${number(high)}: dark blue is weak, yellow is strong`}>
      0
      <svg viewBox="0 0 48 1" preserveAspectRatio="none" aria-hidden="true">
        {Array.from({ length: 48 }, (_, i) => <rect x={i} width={1.05} height={1} fill={colour(i / 47)} />)}
      </svg>
      {number(high)}
    </span>
  );
}

function Values({ detail, high, threshold }: { detail: Detail; high: number; threshold: number }) {
  const { histogram } = detail;
  if (!histogram) return null;
  const { edges, counts } = histogram;
  const most = Math.max(...counts);
  const n = counts.length;
  return (
    <section class="card">
      <h3>Values <small>tokens of all images by value, logarithmic</small></h3>
      <svg class="bars" viewBox={`0 0 ${n} 60`} preserveAspectRatio="none" role="img" aria-label={`Histogram of its values from ${number(edges[0])} to ${number(high)}`}>
        {counts.map((tokens, i) => tokens > 0 && (
          <rect x={i + 0.06} width={0.88} y={60 - Math.max(1.5, 58 * Math.sqrt(tokens / most))} height={60} class={edges[i + 1] > threshold ? "" : "below"}>
            <title>{`${number(edges[i])} to ${number(edges[i + 1])}: about ${whole(Math.round(tokens))} tokens`}</title>
          </rect>
        ))}
      </svg>
      <p class="axis"><span>{number(edges[0])}</span><span>heights are square roots of counts</span><span>{number(edges[n])}</span></p>
    </section>
  );
}

function Shares({ run, detail }: { run: Run; detail: Detail }) {
  const { classes, side } = run.facts;
  const { classes: findings } = detail;
  if (!findings.length) return null;
  return (
    <section class="card">
      <h3>Classes <small>share of each on which it fires, of {side}</small></h3>
      <table class="shares">
        <thead>
          <tr>
            <th scope="col">Class</th>
            <th scope="col" colSpan={2}>Fires on</th>
            <th scope="col" class="n" title="Share of all others on which it fires">Others</th>
            <th scope="col" class="n" title="Average precision of its values as a ranking">AP</th>
          </tr>
        </thead>
        <tbody>
          {findings.map(({ class: one, inside, outside, ap }) => (
            <tr key={one}>
              <th scope="row">{classes[one].name}{classes[one].kind === "mask" && <small> patches</small>}</th>
              <td class="meter"><span style={{ width: `${100 * (inside || 0)}%` }} /></td>
              <td class="n">{figure(inside, "share")}</td>
              <td class="n">{figure(outside, "share")}</td>
              <td class="n">{figure(ap, "ratio")}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </section>
  );
}

interface NearestProps extends Pick<PageProps, "run" | "href" | "open"> {
  name: string;
  hint: string;
  near: Near[];
}

function Nearest({ run, name, hint, near, href, open }: NearestProps) {
  if (!near.length) return null;
  return (
    <section class="card">
      <h3>{name} <small>{hint}</small></h3>
      <div class="near">
        {near.slice(0, 6).map(({ latent: one, cosine }) => (
          <a key={one} href={href(one)} onClick={(event) => follow(event, () => open(one))}>
            <First run={run} latent={one} />
            <b>{one}</b>
            <small>{cosine.toFixed(2)}</small>
          </a>
        ))}
      </div>
    </section>
  );
}

/** The strongest image of a latent. */
function First({ run, latent }: { run: Run; latent: number }) {
  const examples = usePromise(() => run.examples(latent, 1), [run, latent]);
  const first = examples?.[0];
  if (!first) return <span class="blank" />;
  const high = run.values(run.has("max_all") ? "max_all" : "max")[latent];
  return <Picture run={run} image={first.example} marks={first.patches && first} high={high} alt="" />;
}

/** Puts lines of Python into the clipboard; where that is not allowed, into a box, selected. */
function CopyPython({ run, latent }: { run: Run; latent: number }) {
  const [state, setState] = useState<"" | "copied" | "shown">("");
  const box = useRef<HTMLTextAreaElement>(null);
  const text = `from saev.inference.results import Results\n\nresults = Results.open(${JSON.stringify(run.facts.results)})\nresults.latent_examples(${latent}).to_pandas()`;
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
      {state === "shown" && <textarea ref={box} readOnly rows={4} aria-label="Python, to be copied" value={text} />}
    </span>
  );
}
