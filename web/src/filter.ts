// Which latents are listed, in which order. The words of the address say it.
import type { Address } from "./address";
import type { Run } from "./source";

export type Range = [low: number, high: number];

export interface Filter {
  query: string;
  /** A column, or "rank" (strong and rare first) or "latent"; with "-" in front from high to low. */
  sort: string;
  ranges: Record<string, Range>;
  /** Number of the class that latents find best. */
  class: number | null;
}

/** Four digits, rounded outwards, so that what lies on the edge stays inside. */
function short(value: number, up: boolean): string {
  if (!Number.isFinite(value) || value === 0) return value === 0 ? "0" : "";
  const unit = 10 ** (Math.floor(Math.log10(Math.abs(value))) - 3);
  return String(Number(((up ? Math.ceil(value / unit) : Math.floor(value / unit)) * unit).toPrecision(4)));
}

export function readFilter(words: Address["words"]): Filter {
  const ranges: Filter["ranges"] = {};
  for (const [key, text] of Object.entries(words)) {
    const found = text.split("..");
    if (key === "q" || found.length !== 2) continue;
    const low = found[0] === "" ? -Infinity : Number(found[0]);
    const high = found[1] === "" ? Infinity : Number(found[1]);
    if (!Number.isNaN(low) && !Number.isNaN(high)) ranges[key] = [low, high];
  }
  const one = words.class ?? "";
  return { query: words.q ?? "", sort: words.sort || "rank", ranges, class: /^\d+$/.test(one) ? Number(one) : null };
}

/** Words of a range; null takes it away. */
export const rangeWords = (range: Range | null): string =>
  range === null || (range[0] === -Infinity && range[1] === Infinity)
    ? ""
    : `${short(range[0], false)}..${short(range[1], true)}`;

/** Words that take the whole filter back. */
export function noFilter(filter: Filter): Record<string, string> {
  return { q: "", class: "", ...Object.fromEntries(Object.keys(filter.ranges).map((key) => [key, ""])) };
}

export const isFiltered = ({ query, ranges, class: one }: Filter): boolean =>
  query.trim() !== "" || one !== null || Object.keys(ranges).length > 0;

/** The latents that a filter leaves, in order.
 *
 * @param found what the text search found; null without one. */
export function listed(run: Run, filter: Filter, found: Set<number> | null): Uint32Array {
  const columns = Object.entries(filter.ranges).filter(([key]) => run.has(key));
  const ranges = columns.map(([key, range]) => [run.values(key), ...range] as const);
  const one = filter.class;
  const [bestClass, bestMask] = [run.values("class"), run.values("mask")];
  const kept = (i: number) =>
    (!found || found.has(i)) &&
    (one === null || bestClass[i] === one || bestMask[i] === one) &&
    ranges.every(([column, low, high]) => column[i] >= low && column[i] <= high);
  const shown = Uint32Array.from(run.order).filter(kept);
  const name = filter.sort.replace(/^-/, "");
  const sign = filter.sort.startsWith("-") ? -1 : 1;
  if (name === "latent") return shown.sort((a, b) => sign * (a - b));
  if (!run.facts.columns.some(({ key }) => key === name)) return shown;
  // Latents without a value come last, whatever the direction.
  const key = Float64Array.from(run.values(name), (v) => (Number.isNaN(v) ? Infinity : sign * v));
  return shown.sort((a, b) => (key[a] === key[b] ? a - b : key[a] - key[b]));
}
