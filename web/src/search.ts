// Text search over a few ten thousand short texts. They are one long text, in which each word of the
// query is looked for behind a space: that takes a millisecond or two, and needs no index.

export const plain = (text: string) => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();

/** What parts words, in texts and in queries. */
const words = (text: string) => plain(text).split(/[^\p{L}\p{N}]+/u).filter(Boolean);

export class TextSearch {
  private readonly text: string;
  private readonly starts: Uint32Array;

  constructor(texts: string[]) {
    this.starts = new Uint32Array(texts.length);
    const lines: string[] = [];
    let length = 0;
    texts.forEach((text, i) => {
      const line = ` ${words(text).join(" ")}\n`;
      this.starts[i] = length;
      length += line.length;
      lines.push(line);
    });
    this.text = lines.join("");
  }

  /** Numbers of the texts in which each word of the query is the beginning of a word. */
  find(query: string): number[] {
    const wanted = words(query).sort((a, b) => b.length - a.length);
    if (!wanted.length) return [];
    const found: number[] = [];
    let line = 0;
    const [first, ...others] = wanted.map((word) => ` ${word}`);
    for (let at = this.text.indexOf(first); at >= 0; at = this.text.indexOf(first, at)) {
      line = this.lineAt(at, line);
      const end = line + 1 < this.starts.length ? this.starts[line + 1] : this.text.length;
      const text = others.length ? this.text.slice(this.starts[line], end) : "";
      if (others.every((word) => text.includes(word))) found.push(line);
      at = end;
    }
    return found;
  }

  /** The line that holds a place, at or behind a known line. */
  private lineAt(place: number, low: number): number {
    let high = this.starts.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.starts[middle] <= place) low = middle;
      else high = middle;
    }
    return low;
  }
}
