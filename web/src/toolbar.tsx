import { useEffect, useRef } from "preact/hooks";
import { isFiltered, noFilter, rangeWords, type Range } from "./filter";
import { count, whole } from "./format";
import type { PageProps } from "./pages";
import type { Column, Run } from "./source";

/** What lists show first, where there is room for some columns only. */
const FIRST = ["frequency", "images", "mean", "class_ap", "mask_ap", "mono", "purity"];

/** The columns of a list: those that the address names, or else as many as there is room for. */
export function shownColumns(run: Run, words: Record<string, string>, room: number): Column[] {
  const all = run.facts.columns;
  const named = words.cols?.split(",") ?? [];
  const sorted = words.sort?.replace(/^-/, "");
  const chosen = all.filter(({ key }) => named.includes(key));
  if (chosen.length) return chosen.slice(0, Math.max(1, room));
  const first = [...FIRST.filter((key) => run.has(key)), ...all.map(({ key }) => key)];
  const wanted = [...new Set([...(sorted && run.has(sorted) && sorted !== "latent" ? [sorted] : []), ...first])].slice(0, Math.max(1, room));
  return all.filter(({ key }) => wanted.includes(key));
}

/** Closes an open menu at a click outside of it and at Esc. */
function Menu({ name, children }: { name: string; children: preact.ComponentChildren }) {
  const box = useRef<HTMLDetailsElement>(null);
  useEffect(() => {
    const close = (event: Event) => {
      if (!box.current?.open) return;
      const isEscape = event instanceof KeyboardEvent && event.key === "Escape";
      if (!isEscape && (event.type === "keydown" || box.current.contains(event.target as Node))) return;
      box.current.open = false;
      if (isEscape) (box.current.firstElementChild as HTMLElement).focus();
    };
    for (const kind of ["pointerdown", "keydown"]) addEventListener(kind, close);
    return () => {
      for (const kind of ["pointerdown", "keydown"]) removeEventListener(kind, close);
    };
  }, []);
  return (
    <details class="menu" ref={box} data-menu={name}>
      <summary>{name}</summary>
      <div class="panel">{children}</div>
    </details>
  );
}

export function Toolbar({ run, router, address, filter, shown, narrow, open }: PageProps) {
  const { columns } = run.facts;
  const all = run.facts.nLatents;
  const n = shown.length;
  const sort = address.words.sort || "rank";
  const isChosen = (filter.ranges.chosen?.[0] ?? 0) > 0;
  const named = address.words.cols?.split(",") ?? [];
  const toggle = (key: string, on: boolean) => {
    const keys = columns.map((one) => one.key).filter((one) => (one === key ? on : named.includes(one)));
    router.say({ cols: keys.join(",") });
  };
  return (
    <div class="bar">
      <input
        id="search"
        type="search"
        placeholder="Class, file name or number"
        aria-label="Search latents by class, file name or number"
        value={filter.query}
        onInput={(e) => narrow({ q: e.currentTarget.value })}
      />
      <label class="sort">
        Sort{" "}
        <select value={sort} onChange={(e) => narrow({ sort: e.currentTarget.value })}>
          <option value="rank">strong and rare</option>
          <option value="latent">number</option>
          {columns.map(({ key, name }) => (
            <>
              <option value={`-${key}`}>{name}, high first</option>
              <option value={key}>{name}, low first</option>
            </>
          ))}
          {sort === "-latent" && <option value="-latent">number, high first</option>}
        </select>
      </label>
      <button type="button" onClick={() => open(shown[Math.floor(Math.random() * n)])} disabled={!n}>
        Random
      </button>
      {run.has("chosen") && (
        <button type="button" id="chosen" aria-pressed={isChosen} title="Latents that were asked for" onClick={() => narrow({ chosen: isChosen ? "" : "1..1" })}>
          Chosen
        </button>
      )}
      <Menu name="Filter">
        {columns.map((one) => <Ranges key={one.key} column={one} range={filter.ranges[one.key]} narrow={narrow} />)}
      </Menu>
      <Menu name="Columns">
        {columns.map(({ key, name, hint }) => (
          <label class="choice" title={hint}>
            <input type="checkbox" checked={named.includes(key)} onChange={(e) => toggle(key, e.currentTarget.checked)} /> {name}
          </label>
        ))}
        <p class="hint">None chosen: as many as fit.</p>
      </Menu>
      <output aria-live="polite" id="count">
        {n === all ? count(all, "latent") : `${whole(n)} of ${count(all, "latent")}`}
      </output>
      {filter.class !== null && run.facts.classes[filter.class] && (
        <button type="button" class="chip" onClick={() => narrow({ class: "" })} aria-label={`Show all classes, not ${run.facts.classes[filter.class].name} only`}>
          {run.facts.classes[filter.class].name} ×
        </button>
      )}
      {isFiltered(filter) && (
        <button type="button" id="reset" onClick={() => narrow(noFilter(filter))}>
          Show all
        </button>
      )}
    </div>
  );
}

interface RangesProps {
  column: Column;
  range: Range | undefined;
  narrow: PageProps["narrow"];
}

function Ranges({ column, range, narrow }: RangesProps) {
  const [low, high] = range ?? [-Infinity, Infinity];
  const { key, name, hint } = column;
  const set = (side: 0 | 1, text: string) => {
    const found: Range = [low, high];
    found[side] = text === "" || Number.isNaN(Number(text)) ? (side ? Infinity : -Infinity) : Number(text);
    narrow({ [key]: rangeWords(found) });
  };
  const shown = (value: number) => (Number.isFinite(value) ? String(Number(value.toPrecision(4))) : "");
  return (
    <fieldset title={hint}>
      <legend>{name}</legend>
      <input inputMode="decimal" placeholder="from" aria-label={`${name} from`} value={shown(low)} onChange={(e) => set(0, e.currentTarget.value)} />
      <input inputMode="decimal" placeholder="to" aria-label={`${name} to`} value={shown(high)} onChange={(e) => set(1, e.currentTarget.value)} />
    </fieldset>
  );
}
