// What is looked at, and its address: #/RUN/PAGE/ITEM?words. Each page reads its own words. In an
// iframe with a srcdoc, a page may set its hash, but not replace an address in the history: then a
// change of words is kept in memory only.

export interface Address {
  /** Which SAE; null is the page of all of them. */
  run: string | null;
  /** Which of its pages (pages.ts); "" is the first one. */
  page: string;
  /** What the page shows, such as the number of a latent. */
  item: string;
  words: Record<string, string>;
}

export function toHash({ run, page, item, words }: Address): string {
  const parts = run === null ? [] : [run, page, item];
  while (parts.length && !parts.at(-1)) parts.pop();
  const path = `#/${parts.map(encodeURIComponent).join("/")}`;
  const query = new URLSearchParams(Object.entries(words).filter(([, text]) => text !== ""));
  return String(query) ? `${path}?${query}` : path;
}

export function fromHash(hash: string): Address {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const [run = "", page = "", item = ""] = path.split("/").map(decoded);
  return { run: run || null, page, item, words: Object.fromEntries(new URLSearchParams(query)) };
}

function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a stray % in an address that somebody typed
  }
}

export class Router {
  address = fromHash(location.hash);
  private set: (address: Address) => void = () => {};

  constructor() {
    addEventListener("hashchange", () => {
      if (location.hash === toHash(this.address)) return;
      this.address = fromHash(location.hash);
      this.set(this.address);
    });
  }

  listen(set: (address: Address) => void): void {
    this.set = set;
  }

  /** Show something. `replace` keeps the history as it is, for changes of words. */
  go(change: Partial<Address>, replace = false): void {
    this.address = { ...this.address, ...change };
    const hash = toHash(this.address);
    if (!replace) location.hash = hash;
    else
      try {
        history.replaceState(null, "", hash);
      } catch {
        // The address stays as it is.
      }
    this.set(this.address);
  }

  /** Change some words; "" takes one away. */
  say(words: Record<string, string>): void {
    this.go({ words: { ...this.address.words, ...words } }, true);
  }
}

/** Follow a link inside the page. In a srcdoc iframe the browser would leave the page for it. */
export function follow(event: MouseEvent, go: () => void): void {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go();
}
