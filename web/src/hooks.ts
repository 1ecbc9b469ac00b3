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
