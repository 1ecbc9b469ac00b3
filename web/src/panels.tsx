// What the page of a latent has beside the images.
import { useState } from "preact/hooks";
import { follow, toHash } from "./address";
import { Fallback } from "./download";
import { figure, number, whole } from "./format";
import { usePromise } from "./hooks";
import type { PageProps } from "./pages";
import { Picture } from "./picture";
import type { Detail, Match, Near, Run } from "./source";

/** The value that has the last colour: the latent's largest one of all images. */
export const highest = (run: Run, latent: number): number =>
  run.values(run.has("max_all") ? "max_all" : "max")[latent];

export function Figures({ run, latent }: { run: Run; latent: number }) {
  const { facts } = run;
  return (
    <dl class="metrics">
      {facts.columns.map(({ key, name, hint, unit, all }) => {
        const value = run.values(key)[latent];
        if (Number.isNaN(value)) return null;
        return (
          <div key={key} title={all ? `${hint}. Of ${facts.side}; below, of all images` : hint}>
            <dt>{name}</dt>
            <dd data-stat={key}>
              {figure(value, unit)}
              {all && <small>{figure(run.values(all)[latent], unit)}</small>}
            </dd>
          </div>
        );
      })}
    </dl>
  );
}

export function Values({ detail, high, threshold }: { detail: Detail; high: number; threshold: number }) {
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

export function Shares({ run, detail }: { run: Run; detail: Detail }) {
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

export function Nearest({ run, name, hint, near, href, open }: NearestProps) {
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
  const high = highest(run, latent);
  return <Picture run={run} image={first.example} marks={first.patches && first} high={high} alt="" />;
}

interface MatchesProps extends Pick<PageProps, "source" | "router"> {
  matches: Match[] | Promise<Match[]>;
}

/** The same latent in the other SAEs. */
export function Matches({ source, router, matches }: MatchesProps) {
  const found = usePromise(() => Promise.resolve(matches), [matches]) ?? [];
  if (!found.length) return null;
  return (
    <section class="card">
      <h3>In other SAEs <small>the closest decoder direction, and its cosine</small></h3>
      <div class="near">{found.map((one) => <Other key={one.run} source={source} router={router} match={one} />)}</div>
    </section>
  );
}

function Other({ source, router, match }: Pick<PageProps, "source" | "router"> & { match: Match }) {
  const run = usePromise(() => source.open(match.run), [source, match.run]);
  const to = { run: match.run, page: "latent", item: String(match.latent), words: {} };
  return (
    <a href={toHash(to)} title={match.title} onClick={(event) => follow(event, () => router.go(to))}>
      {run ? <First run={run} latent={match.latent} /> : <span class="blank" />}
      <b>{match.latent}</b>
      <small>{match.cosine.toFixed(2)}</small>
      <small class="of">{match.title}</small>
    </a>
  );
}

/** Puts lines of Python into the clipboard; where that is not allowed, into a box, selected. */
export function CopyPython({ run, latent }: { run: Run; latent: number }) {
  const [state, setState] = useState<"" | "copied" | "shown">("");
  const text = `from saev.inference.results import Results\n\nresults = Results.open(${JSON.stringify(run.facts.results)})\nresults.latent_examples(${latent}).to_pandas()`;
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      setState("copied");
    } catch {
      setState("shown");
    }
  };
  return (
    <span class="copy">
      <button type="button" onClick={() => void copy()}>{state === "copied" ? "Copied" : "Copy as Python"}</button>
      {state === "shown" && <Fallback name="Python" text={text} />}
    </span>
  );
}
