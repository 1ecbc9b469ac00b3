// The page of images: any of the dataset, or one's own. Choose patches, and see which latents fire
// there; point at a latent, and see where it fires; of several images, what they share.
import { useEffect, useMemo, useState } from "preact/hooks";
import { follow, toHash } from "./address";
import { number, percent, whole } from "./format";
import { usePromise } from "./hooks";
import { Patches } from "./image-patches";
import { add, find, nearest, peaks, prepare, see, type Named, type Peak, type Ref, type Seen } from "./own";
import type { Page, PageProps } from "./pages";
import { Picture } from "./picture";
import type { Run } from "./source";

const MOST_IMAGES = 4;
const MOST_ROWS = 24;
const MOST_NEAR = 12;
/** Latents that choose the nearest images, if none is chosen. */
const USUAL = 3;

interface Entry {
  doing: string;
  seen?: Seen;
  error?: string;
}

/** What is known of images, by SAE and image. It outlives the page, so that going back is quick. */
const entries = new Map<string, Entry>();
const listeners = new Set<() => void>();

function look(run: Run, ref: Ref): void {
  const key = `${run.id}/${ref}`;
  if (entries.get(key) && !entries.get(key)!.error) return;
  const change = (entry: Entry) => {
    entries.set(key, entry);
    for (const listen of listeners) listen();
  };
  change({ doing: "look at the image" });
  see(run, ref, (doing) => change({ doing })).then(
    (seen) => change({ doing: "", seen }),
    (error: Error) => change({ doing: "", error: error.message }),
  );
}

function useSeen(run: Run, refs: Ref[]): Entry[] {
  const [, redraw] = useState(0);
  useEffect(() => {
    const listen = () => redraw((n) => n + 1);
    listeners.add(listen);
    for (const ref of refs) look(run, ref);
    return () => void listeners.delete(listen);
  }, [run, refs.join()]);
  return refs.map((ref) => entries.get(`${run.id}/${ref}`) ?? { doing: "look at the image" });
}

const numbers = (text: string | undefined) => (text ? text.split(",").filter((one) => /^\d+$/.test(one)).map(Number) : []);

function Images(props: PageProps) {
  return props.source.kind === "file" ? <NeedsServer {...props} /> : <OfServer {...props} />;
}

function NeedsServer({ run }: PageProps) {
  return (
    <main class="one images">
      <h2>Images of your own</h2>
      <p class="nothing">
        This file holds the latents, and no model to run. To see which latents fire on an image of your own, or on any image of the dataset,
        start <code>saev serve --root URL</code> with the folder of the runs, or <code>saev look IMAGE --run URL</code> in a terminal.
      </p>
      <p class="hint">The results are at {run.facts.results}.</p>
    </main>
  );
}

function OfServer({ run, address, router, href, open }: PageProps) {
  const refs = useMemo(() => address.item.split(",").filter((ref) => /^(own)?\d+$/.test(ref)).slice(0, MOST_IMAGES), [address.item]);
  const found = useSeen(run, refs);
  const [pointed, point] = useState<number | null>(null);
  const [isOver, setOver] = useState(false);

  const show = (next: Ref[], words: Record<string, string> = {}) =>
    router.go({ run: run.id, page: "image", item: next.slice(-MOST_IMAGES).join(","), words });
  const take = (files: Iterable<File>) => {
    const added = [...files].map(add);
    if (added.length) show([...refs, ...added]);
  };
  useEffect(() => {
    const over = (event: DragEvent) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      setOver(event.type === "dragover");
      if (event.type === "drop") take(event.dataTransfer.files);
    };
    const leave = (event: DragEvent) => event.relatedTarget === null && setOver(false);
    const paste = (event: ClipboardEvent) => {
      if (event.clipboardData?.files.length) take(event.clipboardData.files);
    };
    addEventListener("dragover", over);
    addEventListener("drop", over);
    addEventListener("dragleave", leave);
    addEventListener("paste", paste);
    return () => {
      removeEventListener("dragover", over);
      removeEventListener("drop", over);
      removeEventListener("dragleave", leave);
      removeEventListener("paste", paste);
    };
  });

  const chosen = refs.map((_, i) => new Set(numbers(address.words[`p${i}`])));
  const choose = (i: number, patches: Set<number>) => router.say({ [`p${i}`]: [...patches].sort((a, b) => a - b).join(",") });
  const without = (i: number) => show(refs.filter((_, j) => j !== i));
  const seen = found.map((one) => one.seen);
  return (
    <main class={isOver ? "one images over" : "one images"}>
      <h2>Images</h2>
      <Chooser run={run} take={take} show={(example) => show([...refs, String(example)])} />
      {refs.length === 0 && (
        <div class="drop">
          <p>Drop an image here, paste one, or choose one above. It goes to the server for the time of one answer, and is stored nowhere.</p>
          <Model run={run} />
        </div>
      )}
      <div class={refs.length > 2 ? "looking many" : "looking"}>
        <div class="looked">
          {refs.map((ref, i) => (
            <figure key={ref}>
              {seen[i] ? (
                <Patches run={run} seen={seen[i]} pointed={pointed} chosen={chosen[i]} choose={(patches) => choose(i, patches)} />
              ) : (
                <div class="waiting" role={found[i].error ? "alert" : "status"}>
                  {found[i].error ?? `${found[i].doing[0].toUpperCase()}${found[i].doing.slice(1)} …`}
                </div>
              )}
              <figcaption>
                <b>{seen[i]?.name ?? ref}</b>
                <button type="button" aria-label={`Take ${seen[i]?.name ?? "the image"} away`} onClick={() => without(i)}>✕</button>
                <small>{seen[i]?.about ?? ""}</small>
                {chosen[i].size > 0 && (
                  <small>
                    {whole(chosen[i].size)} patches chosen. <button type="button" class="plain" onClick={() => choose(i, new Set())}>Take all</button>
                  </small>
                )}
              </figcaption>
            </figure>
          ))}
        </div>
        {refs.length > 0 && seen.every((one) => one) && (
          <Latents run={run} seen={seen as Seen[]} chosen={chosen} address={address} router={router} point={point} href={href} open={open}
            show={(example) => show([...refs, String(example)])} looked={refs} />
        )}
      </div>
    </main>
  );
}

/** Loads the model while somebody looks for an image, and says what is missing. */
function Model({ run }: { run: Run }) {
  const [state, setState] = useState({ doing: "look for the model", error: "" });
  useEffect(() => {
    prepare(run, (doing) => setState({ doing, error: "" })).then(
      () => setState({ doing: "", error: "" }),
      (error: Error) => setState({ doing: "", error: error.message }),
    );
  }, [run]);
  if (state.error) return <p class="warning" role="alert">{state.error}</p>;
  return <p role="status">{state.doing ? `${state.doing[0].toUpperCase()}${state.doing.slice(1)} …` : "The model is ready."}</p>;
}

interface ChooserProps {
  run: Run;
  take: (files: Iterable<File>) => void;
  show: (example: number) => void;
}

/** Where images come from. */
function Chooser({ run, take, show }: ChooserProps) {
  const [query, setQuery] = useState("");
  const [found, setFound] = useState<{ query: string; images: Named[]; error: string }>({ query: "", images: [], error: "" });
  useEffect(() => {
    if (!query.trim()) return;
    const timer = setTimeout(() => {
      find(run, query).then(
        (images) => setFound({ query, images, error: "" }),
        (error: Error) => setFound({ query, images: [], error: error.message }),
      );
    }, 150);
    return () => clearTimeout(timer);
  }, [run, query]);
  const files = (event: Event & { currentTarget: HTMLInputElement }) => {
    take(event.currentTarget.files ?? []);
    event.currentTarget.value = "";
  };
  return (
    <div class="bar">
      <label class="file">
        Choose an image …
        <input type="file" id="own" accept="image/*" multiple onChange={files} />
      </label>
      <label class="file camera">
        Photograph …
        <input type="file" accept="image/*" capture="environment" onChange={files} />
      </label>
      <label>
        or one of the dataset <input type="search" id="find" placeholder="name or number" value={query} onInput={(e) => setQuery(e.currentTarget.value)}
          onKeyDown={(e) => e.key === "Enter" && /^\d+$/.test(query.trim()) && show(Number(query))} />
      </label>
      {query.trim() && found.query === query && (
        <span class="found" role="status">
          {/^\d+$/.test(query.trim()) && <button type="button" onClick={() => show(Number(query))}>image {query.trim()}</button>}
          {found.images.slice(0, 8).map(({ example, path }) => (
            <button key={example} type="button" data-example={example} onClick={() => show(example)}>{path ?? example}</button>
          ))}
          {found.error || (found.images.length === 0 && !/^\d+$/.test(query.trim()) ? "No image has this name." : "")}
        </span>
      )}
    </div>
  );
}

interface Row {
  latent: number;
  /** On each image; null where it does not fire. */
  on: (Peak | null)[];
  /** The smallest of its values, as a share of its largest one on the dataset. */
  share: number;
}

/** What lists are ordered by, from the largest down. */
const ORDERS = {
  share: ({ share }: Row) => share,
  value: ({ on }: Row) => Math.max(...on.map((one) => one?.value ?? -Infinity)),
  patches: ({ on }: Row) => Math.max(...on.map((one) => one?.n ?? 0)),
};
type Order = keyof typeof ORDERS;

interface LatentsProps extends Pick<PageProps, "run" | "address" | "router" | "href" | "open"> {
  seen: Seen[];
  chosen: Set<number>[];
  point: (latent: number | null) => void;
  show: (example: number) => void;
  looked: Ref[];
}

/** The latents that fire on all images, and on each alone, or on the chosen patches. */
function Latents({ run, seen, chosen, address, router, point, href, open, show, looked }: LatentsProps) {
  const high = run.values(run.has("max_all") ? "max_all" : "max");
  const order: Order = address.words.by && address.words.by in ORDERS ? (address.words.by as Order) : "share";
  const rows = useMemo(() => {
    const found = seen.map(({ codes }, i) => peaks(codes, chosen[i].size ? chosen[i] : null));
    const all = [...new Set(found.flatMap((one) => [...one.keys()]))];
    return all
      .map((latent): Row => {
        const on = found.map((one) => one.get(latent) ?? null);
        const values = on.flatMap((one) => (one ? [one.value] : []));
        return { latent, on, share: Math.min(...values) / (high[latent] || 1) };
      })
      .sort((a, b) => ORDERS[order](b) - ORDERS[order](a) || b.share - a.share || a.latent - b.latent);
  }, [run, seen.map(({ name }) => name).join(), seen.length, address.words, address.item]);
  const picked = numbers(address.words.l);
  const groups = useMemo(() => grouped(rows, seen), [rows]);
  const usual = groups[0].rows.slice(0, USUAL).map(({ latent }) => latent);
  const latents = picked.length ? picked : usual;
  const pick = (latent: number) => {
    const next = picked.includes(latent) ? picked.filter((one) => one !== latent) : [...picked, latent];
    router.say({ l: next.join(",") });
  };
  return (
    <div class="sides">
      <div>
        {groups.map(({ title, rows: mine }) => (
          <section class="card" key={title} aria-label={title}>
            <h3>{title} <small>{whole(mine.length)} {mine.length === 1 ? "latent" : "latents"}{chosen.some(({ size }) => size) ? " on the chosen patches" : ""}</small></h3>
            <Table run={run} rows={mine} seen={seen} picked={picked} pick={pick} point={point} href={href} open={open}
              order={order} sort={(by) => router.say({ by: by === "share" ? "" : by })} />
          </section>
        ))}
      </div>
      <Nearest run={run} latents={latents} isUsual={!picked.length} looked={looked} show={show} href={(example) => toHash({ ...address, run: run.id, page: "image", item: [...looked, example].slice(-MOST_IMAGES).join(","), words: {} })} />
    </div>
  );
}

function grouped(rows: Row[], seen: Seen[]): { title: string; rows: Row[] }[] {
  if (seen.length === 1) return [{ title: "Latents that fire here", rows }];
  const alone = seen.map((one, i) => ({
    title: `Only on ${one.name}`,
    rows: rows.filter(({ on }) => on[i] && on.every((peak, j) => j === i || !peak)),
  }));
  return [{ title: `On all ${seen.length} images`, rows: rows.filter(({ on }) => on.every((one) => one)) }, ...alone];
}

interface TableProps extends Pick<PageProps, "run" | "href" | "open"> {
  rows: Row[];
  seen: Seen[];
  picked: number[];
  pick: (latent: number) => void;
  point: (latent: number | null) => void;
  order: Order;
  sort: (order: Order) => void;
}

function Table({ run, rows, seen, picked, pick, point, href, open, order, sort }: TableProps) {
  const [most, setMost] = useState(MOST_ROWS);
  const frequency = run.values(run.has("frequency_all") ? "frequency_all" : "frequency");
  const head = (key: Order, name: string, hint: string) => (
    <th scope="col" class="n" title={hint} aria-sort={order === key ? "descending" : undefined}>
      <button type="button" onClick={() => sort(key)}>{name}</button>
    </th>
  );
  if (!rows.length) return <p class="hint">None.</p>;
  return (
    <>
      <div class="scroll tall">
        <table class="fires" onMouseLeave={() => point(null)}>
          <thead>
            <tr>
              <th scope="col"><span class="unseen">For the nearest images</span></th>
              <th scope="col">Latent</th>
              {seen.length === 1 ? head("value", "Value", "Its largest value here") : seen.map(({ name }, i) => <th key={i} scope="col" class="n" title={name}>{name}</th>)}
              {seen.length === 1 && head("patches", "Patches", "On how many it fires")}
              {head("share", "Of its largest", `As a share of its largest value on the dataset${seen.length > 1 ? "; the smallest of the images" : ""}`)}
              <th scope="col" class="n" title="Share of the dataset's tokens on which it fires">Fires on</th>
            </tr>
          </thead>
          <tbody>
            {rows.slice(0, most).map(({ latent, on, share }) => (
              <tr key={latent} data-latent={latent} onMouseEnter={() => point(latent)}>
                <td>
                  <input type="checkbox" aria-label={`Latent ${latent} for the nearest images`} checked={picked.includes(latent)} onChange={() => pick(latent)} />
                </td>
                <th scope="row">
                  <a href={href(latent)} onFocus={() => point(latent)} onBlur={() => point(null)} onClick={(event) => follow(event, () => open(latent))}>{latent}</a>{" "}
                  <small>{run.nameOf(latent)}</small>
                </th>
                {on.map((peak, i) => (
                  <td key={i} class="n" data-value={peak?.value}>
                    {peak ? number(peak.value) : "–"}
                    {peak && seen.length > 1 && <small title={`on ${peak.n} patches`}> ×{whole(peak.n)}</small>}
                  </td>
                ))}
                {seen.length === 1 && <td class="n">{whole(on[0]?.n ?? 0)}</td>}
                <td class="n">{percent(share)}</td>
                <td class="n">{percent(frequency[latent])}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {rows.length > most && <button type="button" onClick={() => setMost(most * 4)}>Show more of {whole(rows.length)}</button>}
    </>
  );
}

interface NearestProps {
  run: Run;
  latents: number[];
  isUsual: boolean;
  looked: Ref[];
  show: (example: number) => void;
  href: (example: number) => string;
}

/** Images of the dataset on which the chosen latents are strongest together. */
function Nearest({ run, latents, isUsual, looked, show, href }: NearestProps) {
  const found = usePromise(() => (latents.length ? nearest(run, latents, MOST_NEAR + MOST_IMAGES) : null), [run, latents.join()]);
  const shown = found?.filter(({ example }) => !looked.includes(String(example))).slice(0, MOST_NEAR) ?? [];
  return (
    <section class="card nearest" aria-label="Nearest images">
      <h3>Nearest images <small>{isUsual ? "by the first latents of the list" : "by the chosen latents"}</small></h3>
      <p class="hint">
        Images of the dataset on which {latents.length === 1 ? "latent" : "latents"} {latents.join(", ")} {latents.length === 1 ? "is" : "are together"} strongest. Each counts by its value as a share of its largest one.
      </p>
      <div class="near">
        {shown.map(({ example, path, label, score }) => (
          <a key={example} href={href(example)} data-example={example} title={path ?? ""} onClick={(event) => follow(event, () => show(example))}>
            <Picture run={run} image={example} alt={label || path || `image ${example}`} />
            <b>{label || (path ?? "").split("/").at(-1)}</b>
            <small>{percent(score)}</small>
          </a>
        ))}
      </div>
    </section>
  );
}

export const image: Page = { path: "image", name: "Images", View: Images };
