import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import type { Run } from "./data";
import { values } from "./filter";
import { number, percent, whole } from "./format";
import { Picture } from "./picture";
import { toHash, type Column, type View } from "./route";
import { columns, NAMES } from "./toolbar";

const OVERSCAN = 6;
/** Pictures come this many milliseconds after a scroll that leaves no row in the window. */
const SETTLED = 80;
const THUMBS = 4;

interface Props {
  run: Run;
  shown: Uint32Array;
  view: View;
  filter: (change: Partial<View>) => void;
  open: (latent: number) => void;
}

function text(run: Run, column: Column, latent: number): string {
  const value = values(run, column)![latent];
  if (run.count[latent] === 0 && column !== "frequency") return "–";
  if (column === "purity") return run.usual[latent] < 0 ? "–" : `${Math.round(100 * value)}%`;
  return column === "frequency" ? percent(value) : column === "images" ? whole(value) : number(value);
}

/** Only rows near the window are in the document. */
export function List({ run, shown, view, filter, open }: Props) {
  const body = useRef<HTMLDivElement>(null);
  const [range, setRange] = useState<[number, number]>([0, 20]);
  const [focused, setFocused] = useState<number | null>(null);
  const [isFast, setFast] = useState(false);
  const height = useRef(64);
  const first_row = useRef(0);
  const timer = useRef(0);

  const look = () => {
    const element = body.current;
    if (!element) return;
    height.current = parseFloat(getComputedStyle(element).getPropertyValue("--row")) || 64;
    const above = -element.getBoundingClientRect().top / height.current;
    const n = Math.ceil(innerHeight / height.current);
    const first = Math.max(0, Math.floor(above) - OVERSCAN);
    const last = Math.min(shown.length, Math.ceil(above) + n + OVERSCAN);
    if (Math.abs(first - first_row.current) >= n) {
      setFast(true);
      clearTimeout(timer.current);
      timer.current = setTimeout(() => setFast(false), SETTLED);
    }
    first_row.current = first;
    setRange((old) => (old[0] === first && old[1] === last ? old : [first, Math.max(first, last)]));
  };
  useLayoutEffect(look, [shown]);
  useEffect(() => {
    addEventListener("scroll", look, { passive: true });
    addEventListener("resize", look);
    return () => {
      removeEventListener("scroll", look);
      removeEventListener("resize", look);
    };
  });
  useLayoutEffect(() => {
    if (focused === null) return;
    const link = body.current?.querySelector<HTMLElement>(`[data-place="${focused}"] a`);
    if (link && document.activeElement !== link) link.focus({ preventScroll: true });
  }, [focused, range]);

  const onKey = (event: KeyboardEvent) => {
    const row = (event.target as HTMLElement).closest<HTMLElement>("[data-place]");
    if (!row || !body.current) return;
    const page = Math.max(1, Math.floor(innerHeight / height.current) - 2);
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(shown.length - 1, Number(row.dataset.place) + by));
    const top = body.current.getBoundingClientRect().top + next * height.current;
    const above = document.querySelector(".bar")!.getBoundingClientRect().bottom + 40;
    if (top < above) scrollBy(0, top - above);
    else if (top + height.current > innerHeight) scrollBy(0, top + height.current - innerHeight);
    setFocused(next);
    look();
  };

  const shownColumns = useMemo(() => columns(run), [run]);
  const rows = [];
  for (let place = range[0]; place < Math.min(range[1], shown.length); place++)
    rows.push(
      <Row key={shown[place]} run={run} latent={shown[place]} place={place} columns={shownColumns} bare={isFast} href={toHash({ ...view, latent: shown[place] })} open={open} onFocus={setFocused} />,
    );
  const sorts = (name: string) =>
    view.sort === name ? "ascending" : view.sort === `-${name}` ? "descending" : undefined;
  const sort = (name: string) => filter({ sort: view.sort === `-${name}` ? name : `-${name}` });
  return (
    <div role="table" aria-label="Latents" aria-rowcount={shown.length + 1} class={`list n${shownColumns.length}`} onKeyDown={onKey}>
      <div role="row" aria-rowindex={1} class="row heads">
        <div role="columnheader">Strongest images</div>
        <div role="columnheader" aria-sort={sorts("latent")}>
          <button type="button" onClick={() => filter({ sort: view.sort === "latent" ? "-latent" : "latent" })}>Latent</button>
        </div>
        {shownColumns.map((c) => (
          <div role="columnheader" class="n" aria-sort={sorts(c)} title={NAMES[c][1]}>
            <button type="button" onClick={() => sort(c)}>{NAMES[c][0]}</button>
          </div>
        ))}
      </div>
      <div role="rowgroup" ref={body} class="rows" style={{ height: `calc(var(--row) * ${shown.length})` }}>
        {rows}
      </div>
      {shown.length === 0 && <p class="nothing">No latent fits. “Show all” takes the filter back.</p>}
    </div>
  );
}

interface RowProps {
  run: Run;
  latent: number;
  place: number;
  columns: Column[];
  /** Without pictures. */
  bare: boolean;
  href: string;
  open: (latent: number) => void;
  onFocus: (place: number) => void;
}

function Row({ run, latent, place, columns, bare, href, open, onFocus }: RowProps) {
  const examples = useMemo(() => run.examples(latent).filter((e) => e.range === 0).slice(0, THUMBS), [run, latent]);
  const name = run.className(run.usual[latent]);
  const thumb = run.thumb[latent];
  return (
    <div
      role="row"
      aria-rowindex={place + 2}
      data-place={place}
      data-latent={latent}
      class="row"
      style={{ transform: `translateY(calc(var(--row) * ${place}))` }}
      onClick={(event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        open(latent);
      }}
    >
      <div role="cell" class="thumbs">
        {!bare && examples.map((e, i) => (
          <Picture key={i} run={run} image={e.image} example={e} alt={`${run.label(e.image) || run.facts.files[e.image]}, marked where latent ${latent} fires`} />
        ))}
        {!bare && examples.length === 0 && thumb >= 0 && (
          <Picture run={run} image={thumb} alt={run.label(thumb) || run.facts.files[thumb]} />
        )}
      </div>
      <div role="cell" class="name">
        <a href={href} onFocus={() => onFocus(place)}>{latent}</a>
        <span>{run.count[latent] === 0 ? "never fires" : name}</span>
      </div>
      {columns.map((c) => (
        <div role="cell" class={`n ${c}`}>{text(run, c, latent)}</div>
      ))}
    </div>
  );
}
