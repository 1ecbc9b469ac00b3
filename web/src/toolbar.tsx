import type { Run } from "./data";
import { values } from "./filter";
import { count, whole } from "./format";
import { COLUMNS, type Column, type View } from "./route";

export const NAMES: Record<Column, [name: string, hint: string]> = {
  frequency: ["Frequency", "Share of tokens on which the latent fires"],
  mean: ["Mean", "Mean value on the tokens on which it fires"],
  max: ["Max", "Largest value"],
  images: ["Images", "Images on which it fires"],
  purity: ["Purity", "Share of the most common class among its strongest images"],
};

export function columns(run: Run): Column[] {
  return COLUMNS.filter((c) => values(run, c) !== null && (c !== "purity" || run.facts.classes.length > 0));
}

interface Props {
  run: Run;
  view: View;
  n: number;
  filter: (change: Partial<View>) => void;
  random: () => void;
}

export function Toolbar({ run, view, n, filter, random }: Props) {
  const all = run.facts.nLatents;
  const isFiltered = view.query !== "" || view.classNumber !== null || Object.keys(view.ranges).length > 0;
  return (
    <div class="bar">
      <input
        id="search"
        type="search"
        placeholder="Class, file name or number"
        aria-label="Search latents by class, file name or number"
        value={view.query}
        onInput={(e) => filter({ query: e.currentTarget.value })}
      />
      <label class="sort">
        Sort{" "}
        <select value={view.sort} onChange={(e) => filter({ sort: e.currentTarget.value })}>
          <option value="rank">strong and rare</option>
          <option value="latent">number</option>
          {columns(run).map((c) => (
            <>
              <option value={`-${c}`}>{NAMES[c][0].toLowerCase()}, high first</option>
              <option value={c}>{NAMES[c][0].toLowerCase()}, low first</option>
            </>
          ))}
          {view.sort === "-latent" && <option value="-latent">number, high first</option>}
        </select>
      </label>
      <button type="button" onClick={random} disabled={!n}>
        Random
      </button>
      <details class="filters">
        <summary>Filter</summary>
        <div class="panel">
          {columns(run).map((c) => (
            <Ranges column={c} view={view} filter={filter} />
          ))}
        </div>
      </details>
      <output aria-live="polite" id="count">
        {n === all ? count(all, "latent") : `${whole(n)} of ${count(all, "latent")}`}
      </output>
      {view.classNumber !== null && (
        <button type="button" class="chip" onClick={() => filter({ classNumber: null })} aria-label={`Show all classes, not ${run.className(view.classNumber)} only`}>
          {run.className(view.classNumber)} ×
        </button>
      )}
      {isFiltered && (
        <button type="button" id="reset" onClick={() => filter({ query: "", ranges: {}, classNumber: null })}>
          Show all
        </button>
      )}
    </div>
  );
}

function Ranges({ column, view, filter }: { column: Column; view: View; filter: Props["filter"] }) {
  const [low, high] = view.ranges[column] ?? [-Infinity, Infinity];
  const [name, hint] = NAMES[column];
  const set = (side: 0 | 1, text: string) => {
    const range: [number, number] = [low, high];
    range[side] = text === "" || Number.isNaN(Number(text)) ? (side ? Infinity : -Infinity) : Number(text);
    const ranges = { ...view.ranges, [column]: range };
    if (range[0] === -Infinity && range[1] === Infinity) delete ranges[column];
    filter({ ranges });
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
