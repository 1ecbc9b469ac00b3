import { useEffect, useState } from "preact/hooks";

/** The value of a promise; the last one until a new one is there; null at first. An error is thrown
 *  where the page draws. */
export function usePromise<T>(make: () => Promise<T> | null, needs: unknown[]): T | null {
  const [state, setState] = useState<{ value: T | null; error: unknown }>({ value: null, error: null });
  useEffect(() => {
    let isOver = false;
    make()?.then(
      (value) => isOver || setState({ value, error: null }),
      (error) => isOver || setState({ value: null, error }),
    );
    return () => {
      isOver = true;
    };
  }, needs);
  if (state.error) throw state.error;
  return state.value;
}

/** Size of an element in CSS pixels; drawn anew, too, when the colour scheme changes. */
export function useSize(element: { current: HTMLElement | null }): [width: number, height: number] {
  const [size, setSize] = useState<[number, number]>([0, 0]);
  useEffect(() => {
    const look = () => element.current && setSize([element.current.clientWidth, element.current.clientHeight]);
    const observer = new ResizeObserver(look);
    observer.observe(element.current!);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    scheme.addEventListener("change", look); // a new array, so what uses it is drawn again
    return () => {
      observer.disconnect();
      scheme.removeEventListener("change", look);
    };
  }, []);
  return size;
}
