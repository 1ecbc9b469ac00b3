// Numbers as a person writes them, as in the picture book.
import type { Unit } from "./source";

// A formatter takes long to make, and toLocaleString makes one each time.
const FORMATS = [0, 1, 2, 3, 4, 5].map(
  (digits) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }),
);
const WHOLE = new Intl.NumberFormat("en");

export function number(value: number): string {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e5) return FORMATS[Math.max(0, 2 - Math.floor(Math.log10(size)))].format(value);
  return value.toExponential(1).replace("e+", "e");
}

export const percent = (share: number) => `${number(100 * share)}%`;
export const whole = (value: number) => WHOLE.format(value);
export const count = (n: number, one: string, many = `${one}s`) => `${whole(n)} ${n === 1 ? one : many}`;

/** A figure of a column; a dash where it is not defined. */
export function figure(value: number, unit: Unit): string {
  if (Number.isNaN(value)) return "–";
  if (unit === "share") return percent(value);
  if (unit === "count") return whole(value);
  return unit === "ratio" ? value.toFixed(Math.abs(value) < 0.1 ? 3 : 2) : number(value);
}
