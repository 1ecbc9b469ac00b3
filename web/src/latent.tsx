// The page of one latent.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { follow, toHash } from "./address";
import { FigureDialog } from "./figure";
import { noFilter } from "./filter";
import { number, whole } from "./format";
import { usePromise } from "./hooks";
import { NotesCard } from "./notes";
import type { Page, PageProps } from "./pages";
import { CopyPython, Figures, highest, Matches, Nearest, Shares, Values } from "./panels";
import { Picture } from "./picture";
import { gradient } from "./pictures";
import type { Example, Run } from "./source";

const N_FIGURE = 8;

/** By what images are ranked. */
const RANKINGS = {
  max: { name: "largest value", of: (e: Example) => e.value },
  mean: { name: "mean over all patches", of: (e: Example, n: number) => sum(e) / n },
  area: { name: "marked area", of: (e: Example, n: number, least: number) => marked(e, least) / n },
} as const;
type Ranking = keyof typeof RANKINGS;

const sum = ({ values }: Example) => Array.from(values).reduce((a, b) => a + b, 0);
const marked = ({ values }: Example, least: number) => Array.from(values).filter((v) => v > 0 && v >= least * (1 - 1e-6)).length;

function Latent(props: PageProps) {
  const { source, run, address, router, filter, shown, notes, step, narrow, open, href } = props;
  const latent = Number(address.item);
  if (!/^\d+$/.test(address.item) || latent >= run.facts.nLatents)
    throw new Error(`There is no latent ${address.item}: the SAE has ${whole(run.facts.nLatents)}.`);
  const detail = usePromise(() => run.latent(latent), [run, latent]);
  const heading = useRef<HTMLHeadingElement>(null);
  const [threshold, setThreshold] = useState(0);
  const [isMarked, setMarked] = useState(true);
  const [ranking, setRanking] = useState<Ranking>("max");
  const [hasFigure, setFigure] = useState(false);
  const high = highest(run, latent);
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

  const pageOf = ({ example }: Example) => {
    if (source.kind !== "server") return undefined;
    const to = { run: run.id, page: "image", item: String(example), words: { l: String(latent) } };
    return { href: toHash(to), open: () => router.go(to) };
  };
  const examples = detail?.examples ?? [];
  const hasMarks = examples.some(({ patches }) => patches);
  const nPatches = run.facts.grid[0] * run.facts.grid[1];
  const groups = useMemo(() => {
    const of = (e: Example) => RANKINGS[ranking].of(e, nPatches, threshold * high);
    return ranges(examples).map((one) => ({ ...one, mine: ranking === "max" ? one.mine : [...one.mine].sort((a, b) => of(b) - of(a)) }));
  }, [detail, ranking, ranking === "area" && threshold]);
  const most = run.nameOf(latent);
  return (
    <main class="one" data-latent={latent}>
      <nav class="bar" aria-label="Latents">
        <button type="button" id="back" onClick={() => router.go({ page: "", item: "" })}>‹ All latents</button>
        <span class="group">
          <button type="button" id="previous" onClick={() => step(-1)} aria-label="Previous latent">←</button>
          <button type="button" id="next" onClick={() => step(1)} aria-label="Next latent">→</button>
        </span>
        <output>{place ? `${whole(place)} of ${whole(shown.length)}` : "not in the filter"}</output>
        <span class="right">
          {examples.length > 0 && <button type="button" id="figure" onClick={() => setFigure(true)}>Figure</button>}
          <CopyPython run={run} latent={latent} />
        </span>
      </nav>
      <div class="title">
        <h2 ref={heading} tabIndex={-1}>Latent {latent}</h2>
        {best !== undefined && (
          <button type="button" class="chip" title="List the latents of this class" onClick={() => narrow({ ...noFilter(filter), class: String(best) })}>
            {run.facts.classes[best].name}
          </button>
        )}
        {notes.here[latent]?.tags.map((tag) => <span key={tag} class="chip tag">{tag}</span>)}
        {!fires && <span class="chip">never fires</span>}
      </div>
      <Figures run={run} latent={latent} />
      <div class="split">
        <div>
          {hasMarks && (
            <div class="bar marks">
              <label>
                <input type="checkbox" checked={isMarked} onChange={(e) => setMarked(e.currentTarget.checked)} /> Mark patches
              </label>
              <label class="threshold">
                from
                <input type="range" id="threshold" min={0} max={100} value={Math.round(threshold * 100)} disabled={!isMarked}
                  aria-label="Smallest value of marked patches" aria-valuetext={number(threshold * high)} onInput={(e) => setThreshold(Number(e.currentTarget.value) / 100)} />
                <output>{number(threshold * high)}</output>
              </label>
              <label>
                order by{" "}
                <select id="ranking" value={ranking} onChange={(e) => setRanking(e.currentTarget.value as Ranking)}>
                  {Object.entries(RANKINGS).map(([key, { name }]) => <option value={key}>{name}</option>)}
                </select>
              </label>
              <Scale high={high} />
            </div>
          )}
          {groups.map(({ name, hint, mine }) => mine.length > 0 && (
            <section key={name} class="range" aria-label={name}>
              <h3>{name} {hint && <small>{hint}</small>}</h3>
              <div class="pictures">
                {mine.map((e) => <Figure key={`${e.kind}${e.example}`} run={run} example={e} marked={isMarked} high={high} threshold={threshold} page={pageOf(e)} />)}
              </div>
            </section>
          ))}
          {fires && detail && examples.length === 0 && (
            <p class="nothing">The file has no room for pictures of this latent: write it with a larger <code>--max-mb</code>.</p>
          )}
        </div>
        <div class="about">
          {fires && detail && (
            <>
              <Values detail={detail} high={high} threshold={threshold * high} />
              <Shares run={run} detail={detail} />
              <Nearest run={run} name="Neighbours" hint="cosine of decoder directions" near={detail.neighbours} href={href} open={open} />
              <Nearest run={run} name="Fire together" hint="cosine of the tokens on which they fire" near={detail.coactive} href={href} open={open} />
              <Matches source={source} router={router} matches={detail.matches} />
            </>
          )}
          <NotesCard key={latent} latent={latent} notes={notes} />
        </div>
      </div>
      {hasFigure && (
        <FigureDialog
          name={`latent-${latent}`}
          close={() => setFigure(false)}
          of={{
            run, high, threshold: threshold * high, marked: isMarked,
            examples: groups[0].mine.slice(0, N_FIGURE),
            title: `Latent ${latent}${most ? `: ${most}` : ""}`,
            caption: `Images on which latent ${latent} is strongest, and the patches on which it fires${threshold ? ` with at least ${number(threshold * high)}` : ""}. ${run.facts.title}; ${run.facts.subtitle}.`,
          }}
        />
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

interface FigureProps {
  run: Run;
  example: Example;
  marked: boolean;
  high: number;
  threshold: number;
  /** Where the page of the image is; none: there is no such page. */
  page?: { href: string; open: () => void };
}

function Figure({ run, example, marked, high, threshold, page }: FigureProps) {
  const { facts } = run;
  const { label, file, patches, value, side } = example;
  const all = facts.grid[0] * facts.grid[1];
  const fires = patches ? `${patches.length} of ${all} patches` : "";
  return (
    <figure>
      <Picture run={run} image={example.example} marks={marked && patches ? example : null} high={high} threshold={threshold * high}
        alt={patches ? `${label || file}: ${fires} fire, at most ${number(value)}` : label || file} />
      <figcaption>
        <b>
          {page ? <a href={page.href} title="Which other latents fire here?" onClick={(event) => follow(event, page.open)}>{label || file}</a> : label || file}
        </b>
        <span class="value">{number(value)}</span>
        {label && <small class="of">{file}</small>}
        {patches && <small>{fires}{side === "unknown" ? "" : ` · ${side}`}</small>}
      </figcaption>
    </figure>
  );
}

function Scale({ high }: { high: number }) {
  return (
    <span class="scale" role="img" aria-label={`Colours from 0 to ${number(high)}: dark blue is weak, yellow is strong`}>
      0
      {gradient()}
      {number(high)}
    </span>
  );
}
