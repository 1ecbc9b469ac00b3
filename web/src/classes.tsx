import type { Run } from "./data";
import { number, percent, whole } from "./format";
import type { View } from "./route";

/** On a narrow screen, the list comes first: the map and the classes are opened by a click. */
export const WIDE = matchMedia("(min-width: 861px)").matches;

interface Props {
  run: Run;
  view: View;
  filter: (change: Partial<View>) => void;
  href: (latent: number) => string;
  open: (latent: number) => void;
}

/** The classes of images and of patches, with the latents that find them. */
export function Classes({ run, view, filter, href, open }: Props) {
  const { facts } = run;
  const found = new Map(facts.found);
  const withImages = facts.classes.map((_, i) => i).filter((i) => facts.imagesByClass[i] > 0);
  if (!withImages.length && !facts.concepts.length) return null;
  const link = (latent: number, hint: string) => (
    <a href={href(latent)} title={hint} onClick={(event) => follow(event, () => open(latent))}>
      {latent}
    </a>
  );
  return (
    <section class="card classes" aria-label="Classes">
      {withImages.length > 0 && (
        <details open={WIDE}>
          <summary>
            <h2>Classes of images</h2>
          </summary>
          <div class="scroll">
            <table>
              <thead>
                <tr>
                  <th scope="col">Class</th>
                  <th scope="col" class="n">Images</th>
                  <th scope="col">Latents that find it</th>
                </tr>
              </thead>
              <tbody>
                {withImages.map((i) => (
                  <tr>
                    <th scope="row">
                      <button type="button" aria-pressed={view.classNumber === i} onClick={() => filter({ classNumber: view.classNumber === i ? null : i })}>
                        {facts.classes[i]}
                      </button>
                    </th>
                    <td class="n">{whole(facts.imagesByClass[i])}</td>
                    <td class="links">
                      {(found.get(i) ?? []).slice(0, 4).map(([latent, inside, outside]) =>
                        link(latent, `Fires on ${percent(inside)} of the images of this class, and on ${percent(outside)} of all others`),
                      )}
                    </td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
          <p class="hint">A class lists the latents whose strongest images are mostly of it. Latents find a class if they fire on its images and on few others.</p>
        </details>
      )}
      {facts.concepts.length > 0 && (
        <details>
          <summary>
            <h2>Classes of patches</h2>
          </summary>
          <div class="scroll">
            <table>
              <thead>
                <tr>
                  <th scope="col">Class</th>
                  <th scope="col" class="n">Patches</th>
                  <th scope="col" class="n">Best latent</th>
                  <th scope="col" class="n" title="Average precision of the latent's values as a ranking of all labelled patches">AP</th>
                </tr>
              </thead>
              <tbody>
                {facts.concepts.map(([name, n, latent, ap]) => (
                  <tr>
                    <th scope="row">{name}</th>
                    <td class="n">{whole(n)}</td>
                    <td class="n links">{link(latent, `Open latent ${latent}`)}</td>
                    <td class="n">{number(ap)}</td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
        </details>
      )}
    </section>
  );
}

/** Follow a link inside the page. In a srcdoc iframe the browser would leave the page for it. */
export function follow(event: MouseEvent, go: () => void): void {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go();
}
