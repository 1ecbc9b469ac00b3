// The first page of an SAE: the map, the classes, and the list of all latents.
import { Classes } from "./classes";
import { List } from "./list";
import { LatentMap } from "./map";
import type { Page, PageProps } from "./pages";
import { Toolbar } from "./toolbar";

function All(props: PageProps) {
  return (
    <main>
      <div class="beside">
        <LatentMap {...props} />
        <Classes {...props} />
      </div>
      <section class="all" aria-label="Latents">
        <Toolbar {...props} />
        <List {...props} />
      </section>
    </main>
  );
}

export const all: Page = { path: "", name: "Latents", View: All };
