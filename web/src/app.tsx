import { Component, type ComponentChildren } from "preact";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { follow, toHash, type Address, type Router } from "./address";
import { listed, readFilter } from "./filter";
import { count, percent, whole } from "./format";
import { usePromise } from "./hooks";
import { useNotes, type NoteBook } from "./notes";
import { PAGES, type PageProps } from "./pages";
import { Root } from "./root";
import type { Run, Source, Summary } from "./source";

interface Props {
  source: Source;
  router: Router;
}

export function App({ source, router }: Props) {
  const [address, setAddress] = useState<Address>(router.address);
  useEffect(() => router.listen(setAddress), [router]);
  return (
    <Guard at={toHash(address)}>
      <Chosen source={source} router={router} address={address} />
    </Guard>
  );
}

/** Shows an error in words, where the page would be, until another address is opened. */
class Guard extends Component<{ at: string; children: ComponentChildren }, { error: unknown }> {
  override state = { error: null as unknown };
  override componentDidCatch(error: unknown) {
    this.setState({ error });
  }
  override componentDidUpdate(before: { at: string }) {
    if (this.state.error && before.at !== this.props.at) this.setState({ error: null });
  }
  override render() {
    const { error } = this.state;
    if (!error) return this.props.children;
    return (
      <main class="one">
        <p class="warning" role="alert">{error instanceof Error ? error.message : String(error)}</p>
      </main>
    );
  }
}

function Chosen({ source, router, address }: Props & { address: Address }) {
  const runs = usePromise(() => source.runs(), [source]);
  const only = runs?.length === 1 ? runs[0].id : null;
  const id = address.run ?? only;
  const run = usePromise(() => (id === null ? null : source.open(id)), [id]);
  if (runs && id === null) return <Root source={source} runs={runs} router={router} address={address} />;
  if (!runs || !run || run.id !== id) return <p class="loading">Reading the latents …</p>;
  return <OfRun key={id} source={source} runs={runs} run={run} router={router} address={address} />;
}

/** What the text search finds, and so which latents are listed. */
function useShown(run: Run, words: Address["words"], notes: NoteBook) {
  const filter = useMemo(() => readFilter(words), [JSON.stringify(words)]);
  const query = filter.query.trim();
  const found = usePromise(() => (query ? run.search(query) : null), [run, query]);
  const shown = useMemo(
    () => listed(run, filter, query && found ? new Set([...found, ...notes.find(query)]) : null),
    [run, filter.sort, filter.class, JSON.stringify(filter.ranges), query !== "", found, notes.here],
  );
  return { filter, shown };
}

interface OfRunProps extends Props {
  runs: Summary[];
  run: Run;
  address: Address;
}

function OfRun({ source, runs, run, router, address }: OfRunProps) {
  const notes = useNotes(source, run);
  const { filter, shown } = useShown(run, address.words, notes);
  const scrolled = useRef(0);
  const page = PAGES.find((one) => one.path === address.page) ?? PAGES[0];
  const isList = page === PAGES[0];

  useLayoutEffect(() => scrollTo(0, isList ? scrolled.current : 0), [page, address.item]);
  useEffect(() => {
    const remember = () => {
      if (router.address.page === "") scrolled.current = scrollY;
    };
    addEventListener("scroll", remember, { passive: true });
    return () => removeEventListener("scroll", remember);
  }, [router]);

  const to = (latent: number): Partial<Address> => ({ run: run.id, page: "latent", item: String(latent) });
  const open = (latent: number) => router.go(to(latent));
  const close = () => router.go({ page: "", item: "" });
  const narrow = (words: Address["words"]) => {
    scrolled.current = Math.min(scrollY, scrolled.current);
    const isSame = router.address.page === "";
    router.go({ run: run.id, page: "", item: "", words: { ...router.address.words, ...words } }, isSame);
  };
  // What is looked at now: a second key may come before the first one is drawn.
  const current = () => (router.address.page === "latent" ? Number(router.address.item) : null);
  const step = (by: number) => {
    const one = current();
    if (one === null || !shown.length) return;
    const at = shown.indexOf(one);
    router.go(to(shown[at < 0 ? 0 : (at + by + shown.length) % shown.length]), true);
  };
  const random = () => open(shown[Math.floor(Math.random() * shown.length)]);

  useLayoutEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const target = event.target as HTMLElement;
      if (target.matches("input:not([type=range], [type=checkbox]), select, textarea")) {
        if (event.key === "Escape") target.blur();
        return;
      }
      if (document.querySelector("dialog[open]")) return; // Esc closes it, and nothing else
      const onSlider = target.matches("input[type=range], [role=application]");
      const action =
        event.key === "/" ? () => document.getElementById("search")?.focus()
        : event.key === "r" && shown.length ? random
        : isList || onSlider ? null
        : event.key === "ArrowLeft" && current() !== null ? () => step(-1)
        : event.key === "ArrowRight" && current() !== null ? () => step(1)
        : event.key === "Escape" ? close
        : null;
      if (!action) return;
      event.preventDefault();
      action();
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  });

  const props: PageProps = {
    source, run, address, router, filter, shown, notes, narrow, open, step,
    href: (latent) => toHash({ ...address, ...to(latent) }),
  };
  return (
    <>
      <Header runs={runs} small={!isList} {...props} />
      <page.View key={`${page.path}/${address.item}`} {...props} />
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

function Header({ source, run, runs, router, address, small }: PageProps & { runs: Summary[]; small: boolean }) {
  const { facts } = run;
  const pages = PAGES.filter((one) => one.name && (one.can?.(source, run) ?? true));
  return (
    <header class={small ? "top small" : "top"}>
      <div class="titles">
        {facts.home && <a class="home" href={facts.home}>‹ all SAEs</a>}
        <h1>{facts.title}</h1>
        <p>{facts.subtitle}</p>
        {runs.length > 1 && (
          <label class="runs">
            SAE{" "}
            <select value={run.id} onChange={(e) => router.go({ run: e.currentTarget.value, page: "", item: "", words: {} })}>
              <Choices runs={runs.filter((one) => one.isMeasured)} />
            </select>
          </label>
        )}
      </div>
      {(pages.length > 1 || runs.length > 1) && (
        <nav class="pages" aria-label="Pages">
          {runs.length > 1 && (
            <a href="#/" onClick={(event) => follow(event, () => router.go({ run: null, page: "", item: "", words: {} }))}>All SAEs</a>
          )}
          {pages.map(({ path, name }) => {
            const to = { ...address, run: run.id, page: path, item: "" };
            return (
              <a href={toHash(to)} aria-current={address.page === path ? "page" : undefined} onClick={(event) => follow(event, () => router.go(to))}>
                {name}
              </a>
            );
          })}
        </nav>
      )}
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
  const frequency = Array.from(run.values("frequency")).filter((value) => value > 0);
  const share = frequency.length ? frequency.reduce((a, b) => a + b, 0) / facts.nLatents : 0;
  const rest = facts.columns.some(({ all }) => all) ? " The small figures below them are of all images." : "";
  return `${pictured}${silent}.${few} On average, a latent fires on ${percent(share)} of ${count(facts.nTokens, "token")}. Figures of latents are of ${facts.side}.${rest}`;
}

/** SAEs to choose from, by dataset if there are several: each was measured on each. */
function Choices({ runs }: { runs: Summary[] }) {
  const datasets = [...new Set(runs.map(({ dataset }) => dataset))];
  const options = (some: Summary[]) => some.map((one) => <option value={one.id}>{one.title}</option>);
  if (datasets.length < 2) return <>{options(runs)}</>;
  return <>{datasets.map((one) => <optgroup label={one}>{options(runs.filter(({ dataset }) => dataset === one))}</optgroup>)}</>;
}
