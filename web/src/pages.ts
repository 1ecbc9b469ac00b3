// The pages. A new one is one file that exports a Page, and one line in PAGES.
import type { ComponentType } from "preact";
import type { Address, Router } from "./address";
import type { Filter } from "./filter";
import { compare } from "./compare";
import { image } from "./image";
import { latent } from "./latent";
import { all } from "./run";
import type { NoteBook } from "./notes";
import type { Run, Source } from "./source";

export interface PageProps {
  source: Source;
  run: Run;
  address: Address;
  router: Router;
  filter: Filter;
  /** The latents that fit it, in its order. */
  shown: Uint32Array;
  notes: NoteBook;
  /** Change the filter, by words of the address, and show the list. */
  narrow: (words: Address["words"]) => void;
  open: (latent: number) => void;
  /** Address of a latent, with the filter of now. */
  href: (latent: number) => string;
  /** Go some latents on in the filter's order. */
  step: (by: number) => void;
}

export interface Page {
  /** Its word in the address, "" for the first page of an SAE. */
  path: string;
  /** In the navigation; none: it is reached by links only. */
  name?: string;
  /** Whether there is something to show. */
  can?: (source: Source, run: Run) => boolean;
  View: ComponentType<PageProps>;
}

export const PAGES: Page[] = [all, latent, image, compare];
