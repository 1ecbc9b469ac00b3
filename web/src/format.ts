// Numbers as a person writes them, as in the picture book.

export function number(value: number): string {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e5) {
    const digits = Math.max(0, 2 - Math.floor(Math.log10(size)));
    return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  }
  return value.toExponential(1).replace("e+", "e");
}

export const percent = (share: number) => `${number(100 * share)}%`;
export const whole = (value: number) => value.toLocaleString("en");
export const count = (n: number, one: string, many = `${one}s`) => `${whole(n)} ${n === 1 ? one : many}`;
