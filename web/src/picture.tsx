import { useEffect, useRef } from "preact/hooks";
import type { Example, Run } from "./data";
import { draw, want } from "./pictures";

interface Props {
  run: Run;
  image: number;
  /** Marks its patches; null shows the image as it is. */
  example?: Example | null;
  threshold?: number;
  alt: string;
}

const PIXELS = Math.min(2, globalThis.devicePixelRatio || 1);

/** A picture, drawn in the size that the style gives it. */
export function Picture({ run, image, example = null, threshold = 0, alt }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null);
  useEffect(
    () =>
      want(run, image, (bitmap) => {
        const element = canvas.current;
        if (!element) return;
        const width = Math.round(element.clientWidth * PIXELS) || bitmap.width;
        element.width = width;
        element.height = Math.round((width * bitmap.height) / bitmap.width);
        draw(element, bitmap, run.facts.grid, example, threshold);
        element.dataset.drawn = String(image);
        element.dataset.marks = example ? String(threshold) : "off";
      }),
    [run, image, example, threshold],
  );
  return <canvas ref={canvas} width={64} height={Math.round(64 / run.facts.aspect)} role="img" aria-label={alt} />;
}
