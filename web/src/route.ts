// What is looked at, and its address. In an iframe with a srcdoc a page may set its hash, but not
// replace an address in the history: then the filter is kept in memory only.

export type Range = [low: number, high: number];
export const COLUMNS = ["frequency", "mean", "max", "images", "purity"] as const;
export type Column = (typeof COLUMNS)[number];

export interface View {
  run: number;
  latent: number | null;
  query: string;
  /** A column, or "rank" (strong and rare first) or "latent"; with "-" in front from high to low. */
  sort: string;
  ranges: Partial<Record<Column, Range>>;
  classNumber: number | null;
}

export const START: View = { run: 0, latent: null, query: "", sort: "rank", ranges: {}, classNumber: null };

/** Four digits, rounded outwards, so that what lies on the edge stays inside. */
function short(value: number, up: boolean): string {
  if (!Number.isFinite(value) || value === 0) return value === 0 ? "0" : "";
  const unit = 10 ** (Math.floor(Math.log10(Math.abs(value))) - 3);
  return String(Number(((up ? Math.ceil(value / unit) : Math.floor(value / unit)) * unit).toPrecision(4)));
}

export function toHash(view: View): string {
  const words = new URLSearchParams();
  if (view.query) words.set("q", view.query);
  if (view.sort !== "rank") words.set("sort", view.sort);
  if (view.classNumber !== null) words.set("class", String(view.classNumber));
  for (const column of COLUMNS) {
    const range = view.ranges[column];
    if (range) words.set(column, `${short(range[0], false)}..${short(range[1], true)}`);
  }
  const path = `#/${view.run}${view.latent === null ? "" : `/latent/${view.latent}`}`;
  return String(words) ? `${path}?${words}` : path;
}

export function fromHash(hash: string): View {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const [run, kind, latent] = path.split("/");
  const words = new URLSearchParams(query);
  const view: View = { ...START, ranges: {} };
  view.run = /^\d+$/.test(run ?? "") ? Number(run) : 0;
  if (kind === "latent" && /^\d+$/.test(latent ?? "")) view.latent = Number(latent);
  view.query = words.get("q") ?? "";
  view.sort = words.get("sort") ?? "rank";
  if (/^\d+$/.test(words.get("class") ?? "")) view.classNumber = Number(words.get("class"));
  for (const column of COLUMNS) {
    const found = words.get(column)?.split("..");
    if (found?.length !== 2) continue;
    const low = found[0] === "" ? -Infinity : Number(found[0]);
    const high = found[1] === "" ? Infinity : Number(found[1]);
    if (!Number.isNaN(low) && !Number.isNaN(high)) view.ranges[column] = [low, high];
  }
  return view;
}

/** Show a view. `replace` keeps the history as it is, for changes of the filter. */
export class Router {
  view: View;
  private set: (view: View) => void = () => {};

  constructor() {
    this.view = fromHash(location.hash);
    addEventListener("hashchange", () => {
      if (location.hash === toHash(this.view)) return;
      this.view = fromHash(location.hash);
      this.set(this.view);
    });
  }

  listen(set: (view: View) => void): void {
    this.set = set;
  }

  go(change: Partial<View>, replace = false): void {
    this.view = { ...this.view, ...change };
    const hash = toHash(this.view);
    if (!replace) location.hash = hash;
    else
      try {
        history.replaceState(null, "", hash);
      } catch {
        // The address stays as it is.
      }
    this.set(this.view);
  }
}
