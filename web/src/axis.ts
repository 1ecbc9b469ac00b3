// Axes of charts, drawn on a canvas.

export class Axis {
  readonly low: number;
  readonly high: number;

  /** @param from place of the lowest value, in pixels. @param to place of the highest one. */
  constructor(values: Iterable<number>, readonly isLog: boolean, readonly from: number, readonly to: number) {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values)
      if (Number.isFinite(value) && (!isLog || value > 0)) (low = Math.min(low, value)), (high = Math.max(high, value));
    if (!Number.isFinite(low)) [low, high] = [isLog ? 0.1 : 0, 1];
    const [a, b] = isLog ? [Math.log10(low), Math.log10(high)] : [low, high];
    const pad = a < b ? 0.04 * (b - a) : isLog ? 0.5 : Math.max(0.5, Math.abs(a) / 10);
    [this.low, this.high] = [a - pad, b + pad];
  }

  place = (value: number): number =>
    this.from + (((this.isLog ? Math.log10(value) : value) - this.low) / (this.high - this.low)) * (this.to - this.from);

  value = (place: number): number => {
    const found = this.low + ((place - this.from) / (this.to - this.from)) * (this.high - this.low);
    return this.isLog ? 10 ** found : found;
  };

  get ticks(): number[] {
    return this.isLog ? this.logTicks : this.linearTicks;
  }

  private get logTicks(): number[] {
    const steps = this.high - this.low > 2.5 ? [1] : this.high - this.low > 1 ? [1, 3] : [1, 2, 3, 5];
    const found: number[] = [];
    for (let power = Math.floor(this.low); power <= this.high; power++)
      for (const step of steps) {
        const value = Number((step * 10 ** power).toPrecision(3));
        if (Math.log10(value) >= this.low && Math.log10(value) <= this.high) found.push(value);
      }
    return found;
  }

  private get linearTicks(): number[] {
    const rough = (this.high - this.low) / 5;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * ([1, 2, 5, 10].find((one) => one * unit >= rough) ?? 10);
    const found: number[] = [];
    for (let i = Math.ceil(this.low / step); i * step <= this.high; i++) found.push(Number((i * step).toPrecision(6)));
    return found;
  }
}

export interface Frame {
  x: Axis;
  y: Axis;
  names: [x: string, y: string];
  write: [x: (value: number) => string, y: (value: number) => string];
}

/** Lines and numbers of both axes. `of` gives the value of a CSS property. */
export function drawFrame(context: CanvasRenderingContext2D, { x, y, names, write }: Frame, of: (name: string) => string): void {
  context.font = `11px ${of("--font") || "sans-serif"}`;
  context.strokeStyle = of("--line");
  context.fillStyle = of("--soft");
  context.lineWidth = 1;
  context.textAlign = "center";
  let last = -Infinity;
  for (const tick of x.ticks) {
    const place = Math.round(x.place(tick)) + 0.5;
    line(context, place, y.to, place, y.from);
    if (place - last < 46) continue;
    context.fillText(write[0](tick), place, y.from + 15);
    last = place;
  }
  context.textAlign = "right";
  for (const tick of y.ticks) {
    const place = Math.round(y.place(tick)) + 0.5;
    line(context, x.from, place, x.to, place);
    context.fillText(write[1](tick), x.from - 6, place + 4);
  }
  context.fillText(`${names[0]} →`, x.to, y.from + 31);
  context.save();
  context.translate(11, y.to);
  context.rotate(-Math.PI / 2);
  context.fillText(`${names[1]} →`, 0, 0);
  context.restore();
}

function line(context: CanvasRenderingContext2D, x0: number, y0: number, x1: number, y1: number): void {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

/** A canvas in the pixels of the screen, its context, and the values of CSS properties. */
export function prepare(element: HTMLCanvasElement): [CanvasRenderingContext2D, (name: string) => string] {
  const scale = globalThis.devicePixelRatio || 1;
  element.width = Math.round(element.clientWidth * scale);
  element.height = Math.round(element.clientHeight * scale);
  const context = element.getContext("2d")!;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  const style = getComputedStyle(element);
  return [context, (name) => style.getPropertyValue(name)];
}
