import { useMemo, useState } from "preact/hooks";
import { follow } from "./address";
import { noFilter } from "./filter";
import { figure, number, percent, whole } from "./format";
import { usePromise } from "./hooks";
import type { PageProps } from "./pages";
import type { Finding } from "./source";

/** On a narrow screen, the list comes first: the map and the classes are opened by a click. */
export const WIDE = matchMedia("(min-width: 861px)").matches;
const N_FOUND = 4;
/** Classes of a kind that are shown at first: a thousand rows take a second to draw. */
const N_CLASSES = 60;

const KINDS = [
  { kind: "image", name: "Classes of images", things: "Images" },
  { kind: "mask", name: "Classes of patches", things: "Patches" },
] as const;

/** The classes of images and of patches, with the latents that find them. */
export function Classes({ run, filter, narrow, href, open }: PageProps) {
  const { classes, side } = run.facts;
  const findings = usePromise(() => run.findings(), [run]);
  const found = useMemo(() => best(findings ?? []), [findings]);
  const [isWhole, setWhole] = useState(false);
  const all = (kind: string) => classes.flatMap((one, i) => (one.kind === kind ? [i] : []));
  const listed = (kind: string) => {
    const some = all(kind);
    return isWhole ? some : some.filter((i, place) => place < N_CLASSES || i === filter.class);
  };
  const shown = KINDS.filter(({ kind }) => classes.some((one) => one.kind === kind));
  if (!shown.length) return null;
  return (
    <section class="card classes" aria-label="Classes">
      {shown.map(({ kind, name, things }, place) => (
        <details key={kind} open={WIDE && place === 0}>
          <summary>
            <h2>{name}</h2>
          </summary>
          <div class="scroll" tabIndex={0} role="region" aria-label={name}>
            <table>
              <thead>
                <tr>
                  <th scope="col">Class</th>
                  <th scope="col" class="n">{things}</th>
                  <th scope="col" class="n" title={`Average precision of the first latent, of ${side}`}>AP</th>
                  <th scope="col">Latents that find it</th>
                </tr>
              </thead>
              <tbody>
                {listed(kind).map((i) => [classes[i], i] as const).map(([one, i]) => (
                  <tr key={i}>
                    <th scope="row">
                      <button type="button" aria-pressed={filter.class === i} onClick={() => narrow({ ...noFilter(filter), class: filter.class === i ? "" : String(i) })}>
                        {one.name}
                      </button>
                    </th>
                    <td class="n">{whole(one.support)}</td>
                    <td class="n">{figure(found.get(i)?.[0]?.ap ?? NaN, "ratio")}</td>
                    <td class="links">
                      {(found.get(i) ?? []).map((f) => (
                        <a key={f.latent} href={href(f.latent)} title={said(f)} onClick={(event) => follow(event, () => open(f.latent))}>
                          {f.latent}
                        </a>
                      ))}
                    </td>
                  </tr>
                ))}
              </tbody>
            </table>
            {listed(kind).length < all(kind).length && (
              <button type="button" onClick={() => setWhole(true)}>Show all {whole(all(kind).length)} classes</button>
            )}
          </div>
          <p class="hint">A class lists the latents of which it is the best class. The latents that find it are those with the highest average precision.</p>
        </details>
      ))}
    </section>
  );
}

/** The first latents that find each class. */
function best(findings: Finding[]): Map<number, Finding[]> {
  const found = new Map<number, Finding[]>();
  for (const one of findings) {
    if (!found.has(one.class)) found.set(one.class, []);
    const mine = found.get(one.class)!;
    if (mine.length < N_FOUND && one.apAll > 0) mine.push(one);
  }
  return found;
}

const said = ({ ap, inside, outside }: Finding) =>
  `AP ${number(Number.isNaN(ap) ? 0 : ap)}. Fires on ${percent(inside || 0)} of the class and on ${percent(outside || 0)} of all others`;
