import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { figure } from "./format";
import { usePromise } from "./hooks";
import type { PageProps } from "./pages";
import { highest } from "./panels";
import { Picture } from "./picture";
import type { Column, Run } from "./source";
import { shownColumns } from "./toolbar";

const OVERSCAN = 6;
/** Pictures come this many milliseconds after a scroll that leaves no row in the window. */
const SETTLED = 80;
const THUMBS = 4;
/** Widths in pixels: of a column, and of all before the columns on a wide and on a narrow list. */
const [COLUMN, WIDE, NARROW] = [86, 350, 190];

/** Only rows near the window are in the document. */
export function List({ run, shown, filter, address, notes, narrow, open, href }: PageProps) {
  const body = useRef<HTMLDivElement>(null);
  const [range, setRange] = useState<[number, number]>([0, 20]);
  const [focused, setFocused] = useState<number | null>(null);
  const [isFast, setFast] = useState(false);
  const [width, setWidth] = useState(900);
  const height = useRef(64);
  const firstRow = useRef(0);
  const timer = useRef(0);

  const look = () => {
    const element = body.current;
    if (!element) return;
    const above = -element.getBoundingClientRect().top / height.current;
    const n = Math.ceil(innerHeight / height.current);
    const first = Math.max(0, Math.floor(above) - OVERSCAN);
    const last = Math.min(shown.length, Math.ceil(above) + n + OVERSCAN);
    if (Math.abs(first - firstRow.current) >= n) {
      setFast(true);
      clearTimeout(timer.current);
      timer.current = setTimeout(() => setFast(false), SETTLED);
    }
    firstRow.current = first;
    setRange((old) => (old[0] === first && old[1] === last ? old : [first, Math.max(first, last)]));
  };
  const measure = () => {
    if (!body.current) return;
    height.current = parseFloat(getComputedStyle(body.current).getPropertyValue("--row")) || 64;
    setWidth(body.current.clientWidth);
    look();
  };
  useLayoutEffect(measure, [shown]);
  useEffect(() => {
    addEventListener("scroll", look, { passive: true });
    addEventListener("resize", measure);
    return () => {
      removeEventListener("scroll", look);
      removeEventListener("resize", measure);
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

  const room = Math.floor((width - (width > 620 ? WIDE : NARROW)) / COLUMN);
  const { cols, sort: sorted } = address.words;
  const columns = useMemo(() => shownColumns(run, address.words, room), [run, cols, sorted, room]);
  const rows = [];
  for (let place = range[0]; place < Math.min(range[1], shown.length); place++)
    rows.push(
      <Row key={shown[place]} run={run} latent={shown[place]} place={place} columns={columns} bare={isFast} tags={notes.here[shown[place]]?.tags} href={href(shown[place])} open={open} onFocus={setFocused} />,
    );
  const sorts = (name: string) =>
    filter.sort === name ? "ascending" : filter.sort === `-${name}` ? "descending" : undefined;
  const sort = (name: string) => narrow({ sort: filter.sort === `-${name}` ? name : `-${name}` });
  return (
    <div role="table" aria-label="Latents" aria-rowcount={shown.length + 1} class="list" style={{ "--columns": columns.length }} onKeyDown={onKey}>
      <div role="rowgroup">
        <div role="row" aria-rowindex={1} class="row heads">
          <div role="columnheader">Strongest</div>
          <div role="columnheader" aria-sort={sorts("latent")}>
            <button type="button" onClick={() => narrow({ sort: filter.sort === "latent" ? "-latent" : "latent" })}>Latent</button>
          </div>
          {columns.map(({ key, name, hint }) => (
            <div key={key} role="columnheader" class="n" aria-sort={sorts(key)} title={hint}>
              <button type="button" onClick={() => sort(key)}>{name}</button>
            </div>
          ))}
        </div>
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
  tags: string[] | undefined;
  href: string;
  open: (latent: number) => void;
  onFocus: (place: number) => void;
}

function Row({ run, latent, place, columns, bare, tags, href, open, onFocus }: RowProps) {
  const high = highest(run, latent);
  const name = run.nameOf(latent);
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
      <div role="cell" class="thumbs">{!bare && <Thumbs run={run} latent={latent} high={high} />}</div>
      <div role="cell" class="name">
        <a href={href} onFocus={() => onFocus(place)}>
          {latent}
          {run.has("chosen") && run.values("chosen")[latent] > 0 && <abbr title="chosen"> ★</abbr>}
        </a>
        <span title={name}>
          {tags?.map((tag) => <em key={tag}>{tag}</em>)}
          {run.values("tokens")[latent] === 0 ? "never fires" : name}
        </span>
      </div>
      {columns.map(({ key, name, unit, all }) => (
        <div key={key} role="cell" class="n" data-column={key} data-name={name}>
          {figure(run.values(key)[latent], unit)}
          {all && <small>{figure(run.values(all)[latent], unit)}</small>}
        </div>
      ))}
    </div>
  );
}

function Thumbs({ run, latent, high }: { run: Run; latent: number; high: number }) {
  const examples = usePromise(() => run.examples(latent, THUMBS), [run, latent]) ?? [];
  return (
    <>
      {examples.filter(({ kind }) => kind === "top").map((e) => (
        <Picture key={e.example} run={run} image={e.example} marks={e.patches && e} high={high}
          alt={`${e.label || e.file}${e.patches ? `, marked where latent ${latent} fires` : ""}`} />
      ))}
    </>
  );
}
