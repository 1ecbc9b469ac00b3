import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { Classes } from "./classes";
import type { Run } from "./data";
import { listed, Search } from "./filter";
import { count, percent, whole } from "./format";
import { Latent } from "./latent";
import { List } from "./list";
import { LatentMap } from "./map";
import { START, toHash, type Router, type View } from "./route";
import { Toolbar } from "./toolbar";

export function App({ runs, router }: { runs: Run[]; router: Router }) {
  const [view, setView] = useState<View>(router.view);
  const scrolled = useRef(0);
  const run = runs[Math.min(view.run, runs.length - 1)];
  const search = useMemo(() => new Search(run), [run]);
  const shown = useMemo(
    () => listed(run, search, view),
    [run, view.query, view.sort, view.ranges, view.classNumber],
  );
  const latent = view.latent !== null && view.latent < run.facts.nLatents ? view.latent : null;

  useEffect(() => router.listen(setView), [router]);
  useLayoutEffect(() => {
    if (latent === null) scrollTo(0, scrolled.current);
    else scrollTo(0, 0);
  }, [latent]);
  useEffect(() => {
    const remember = () => {
      if (router.view.latent === null) scrolled.current = scrollY;
    };
    addEventListener("scroll", remember, { passive: true });
    return () => removeEventListener("scroll", remember);
  }, [router]);

  const filter = (change: Partial<View>) => {
    scrolled.current = Math.min(scrollY, scrolled.current);
    router.go({ ...change, latent: null }, true);
  };
  const open = (one: number) => router.go({ latent: one });
  // What is looked at now: a second key may come before the first one is drawn.
  const current = () => router.view.latent;
  const step = (by: number) => {
    const one = current();
    if (one === null || !shown.length) return;
    const at = shown.indexOf(one);
    const next = at < 0 ? 0 : (at + by + shown.length) % shown.length;
    router.go({ latent: shown[next] }, true);
  };
  const close = () => router.go({ latent: null });

  useLayoutEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const target = event.target as HTMLElement;
      const types = target.matches("input:not([type=range]), select, textarea");
      if (types) {
        if (event.key === "Escape") target.blur();
        return;
      }
      const on_slider = target.matches("input[type=range]");
      const action =
        event.key === "/" ? () => document.getElementById("search")?.focus()
        : event.key === "r" && shown.length ? () => open(shown[Math.floor(Math.random() * shown.length)])
        : current() === null || on_slider ? null
        : event.key === "ArrowLeft" ? () => step(-1)
        : event.key === "ArrowRight" ? () => step(1)
        : event.key === "Escape" ? close
        : null;
      if (!action) return;
      event.preventDefault();
      action();
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  });

  return (
    <>
      <Header run={run} runs={runs} choose={(one) => router.go({ ...START, run: one })} small={latent !== null} />
      {latent === null ? (
        <main>
          <div class="beside">
            <LatentMap run={run} shown={shown} ranges={view.ranges} filter={filter} open={open} />
            <Classes run={run} view={view} filter={filter} href={(one) => toHash({ ...view, latent: one })} open={open} />
          </div>
          <section class="all" aria-label="Latents">
            <Toolbar run={run} view={view} n={shown.length} filter={filter} random={() => open(shown[Math.floor(Math.random() * shown.length)])} />
            <List run={run} shown={shown} view={view} filter={filter} open={open} />
          </section>
        </main>
      ) : (
        <Latent
          key={`${run.number}/${latent}`}
          run={run}
          latent={latent}
          place={[shown.indexOf(latent) + 1, shown.length]}
          step={step}
          close={close}
          open={open}
          filter={filter}
          href={(one) => toHash({ ...view, latent: one })}
        />
      )}
      <footer>
        <p>{run.facts.activations}</p>
        <p>
          Keys: <kbd>/</kbd> search, <kbd>↑</kbd> <kbd>↓</kbd> in the list, <kbd>Enter</kbd> opens a latent,{" "}
          <kbd>←</kbd> <kbd>→</kbd> previous and next, <kbd>h</kbd> marks on and off, <kbd>r</kbd> a random one,{" "}
          <kbd>Esc</kbd> back.
        </p>
      </footer>
    </>
  );
}

interface HeaderProps {
  run: Run;
  runs: Run[];
  choose: (run: number) => void;
  small: boolean;
}

function Header({ run, runs, choose, small }: HeaderProps) {
  const { facts } = run;
  return (
    <header class={small ? "top small" : "top"}>
      <div class="titles">
        <h1>{facts.title}</h1>
        <p>{facts.subtitle}</p>
        {runs.length > 1 && (
          <label class="runs">
            SAE{" "}
            <select value={run.number} onChange={(e) => choose(Number(e.currentTarget.value))}>
              {runs.map((one) => (
                <option value={one.number}>{one.facts.title}</option>
              ))}
            </select>
          </label>
        )}
      </div>
      {!small && (
        <dl class="metrics">
          {facts.metrics.map(([label, text, hint]) => (
            <div title={hint}>
              <dt>{label}</dt>
              <dd>{text}</dd>
            </div>
          ))}
        </dl>
      )}
      {!small && <p class="words">{words(run)}</p>}
      {facts.warnings.length > 0 && (
        <p class="warning">The SAE was trained on other activations: {facts.warnings.join("; ")}.</p>
      )}
    </header>
  );
}

function words(run: Run): string {
  const { facts } = run;
  const pictured = `Pictures for ${whole(facts.nPictured)} of ${whole(facts.nLatents)} latents`;
  const dead = facts.nLatents - facts.nFiring;
  const silent = dead ? ` (${whole(dead)} never fire)` : "";
  const few =
    facts.nDetailed < facts.nPictured
      ? ` Of ${whole(facts.nDetailed)}, the strong and rare ones, there are several with marked patches; of the others there is one.`
      : "";
  const codes = facts.hasCodes
    ? ""
    : ` There are no sparse codes in these results, or too many to read for a page: numbers of images and images from the middle and the low range are left out, and histograms are of the strongest images.`;
  const share = facts.nFiring ? Array.from(run.frequency).reduce((a, b) => a + b, 0) / facts.nLatents : 0;
  return `${pictured}${silent}.${few}${codes} On average, a latent fires on ${percent(share)} of ${count(facts.nTokens, "token")}.`;
}
