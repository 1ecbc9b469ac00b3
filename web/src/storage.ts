// The browser's storage. In an iframe without rights, touching it throws; then nothing is kept. This
// is the only module that touches it (build.mjs looks).

function store(): Storage | null {
  try {
    return globalThis.localStorage ?? null;
  } catch {
    return null;
  }
}

export const canStore = (): boolean => store() !== null;

export function load(key: string): unknown {
  try {
    return JSON.parse(store()?.getItem(key) ?? "null");
  } catch {
    return null; // somebody else's text
  }
}

/** Keep a value; false if that is not possible, because there is no storage or it is full. */
export function save(key: string, value: unknown): boolean {
  try {
    store()!.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
