import { useEffect, useRef } from "preact/hooks";
import { draw, want } from "./pictures";
import type { Example, Run } from "./source";

interface Props {
  run: Run;
  /** Row of the shards' examples. */
  image: number;
  /** Marks its patches; null shows the image as it is. */
  marks?: Example | null;
  /** The value that has the last colour. */
  high?: number;
  /** Smaller values are not marked. */
  threshold?: number;
  alt: string;
}

const PIXELS = Math.min(2, globalThis.devicePixelRatio || 1);

/** A picture, drawn in the size that the style gives it. */
export function Picture({ run, image, marks = null, high = 1, threshold = 0, alt }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null);
  useEffect(
    () =>
      want(run, image, (bitmap) => {
        const element = canvas.current;
        if (!element) return;
        const width = Math.round(element.clientWidth * PIXELS) || bitmap.width;
        element.width = width;
        element.height = Math.round((width * bitmap.height) / bitmap.width);
        draw(element, bitmap, run.facts.grid, marks, high, threshold);
        element.dataset.drawn = String(image);
        element.dataset.marks = marks ? String(threshold / high) : "off";
      }),
    [run, image, marks, high, threshold],
  );
  const named = alt ? { role: "img" as const, "aria-label": alt } : { "aria-hidden": true as const };
  return <canvas ref={canvas} width={64} height={Math.round(64 / run.facts.aspect)} {...named} />;
}
