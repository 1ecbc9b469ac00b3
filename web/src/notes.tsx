// Notes and tags on latents: kept by the source, exported and imported as JSON.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { Fallback, offer } from "./download";
import { TextSearch } from "./search";
import type { Note, NoteStore, Notes, Run, Source } from "./source";
import { canStore, load, save } from "./storage";

const KEY = "saev-notes";
const SAVED = 400;
const NOTHING: Record<string, Note> = {};

/** In the browser's storage; in memory where there is none. */
export class BrowserNotes implements NoteStore {
  readonly where = canStore() ? "in this browser" : null;
  private memory: Notes = {};

  async read(): Promise<Notes> {
    return this.where ? checked(load(KEY)) : this.memory;
  }

  async write(notes: Notes): Promise<void> {
    this.memory = notes;
    if (this.where && !save(KEY, notes)) throw new Error("The browser's storage is full: export the notes.");
  }
}

/** What is a note of a JSON text that somebody else may have written. */
export function checked(found: unknown): Notes {
  const notes: Notes = {};
  if (typeof found !== "object" || found === null) return notes;
  for (const [results, latents] of Object.entries(found)) {
    if (typeof latents !== "object" || latents === null) continue;
    notes[results] = {};
    for (const [latent, note] of Object.entries(latents as Record<string, Partial<Note> | null>)) {
      if (!/^\d+$/.test(latent) || !note) continue;
      const tags = Array.isArray(note.tags) ? note.tags.filter((tag) => typeof tag === "string") : [];
      notes[results][latent] = { text: typeof note.text === "string" ? note.text : "", tags };
    }
  }
  return notes;
}

/** The notes of all SAEs, as a page changes them. */
export interface NoteBook {
  all: Notes;
  /** Of this SAE, by latent. */
  here: Record<string, Note>;
  where: string | null;
  problem: string;
  set: (latent: number, note: Note) => void;
  /** Add notes; they replace those of the same latents. */
  merge: (more: unknown) => number;
  /** Latents whose text or tags have these words. */
  find: (query: string) => number[];
}

export function useNotes(source: Source, run: Run): NoteBook {
  const [all, setAll] = useState<Notes>({});
  const [problem, setProblem] = useState("");
  const fail = (error: unknown) => setProblem(error instanceof Error ? error.message : String(error));
  useEffect(() => {
    source.notes.read().then(setAll, fail);
  }, [source]);
  const key = run.facts.results;
  const here: Record<string, Note> = all[key] ?? NOTHING;
  const change = (notes: Notes) => {
    setAll(notes);
    source.notes.write(notes).then(() => setProblem(""), fail);
  };
  const search = useMemo(() => {
    const latents = Object.keys(here);
    const text = new TextSearch(latents.map((i) => `${here[i].text} ${here[i].tags.join(" ")}`));
    return (query: string) => text.find(query).map((i) => Number(latents[i]));
  }, [here]);
  return {
    all, here, where: source.notes.where, problem,
    set(latent, note) {
      const mine: Record<string, Note> = { ...here, [latent]: note };
      if (!note.text && !note.tags.length) delete mine[latent];
      change({ ...all, [key]: mine });
    },
    merge(more) {
      const found = checked(more);
      const merged = { ...all };
      for (const [results, notes] of Object.entries(found)) merged[results] = { ...merged[results], ...notes };
      change(merged);
      return Object.values(found).reduce((n, notes) => n + Object.keys(notes).length, 0);
    },
    find: search,
  };
}

/** The card of a latent's page. */
export function NotesCard({ latent, notes }: { latent: number; notes: NoteBook }) {
  const note = notes.here[latent] ?? { text: "", tags: [] };
  const [draft, setDraft] = useState<{ text: string; tags: string } | null>(null);
  const [said, setSaid] = useState("");
  const [shown, setShown] = useState("");
  const timer = useRef(0);
  const file = useRef<HTMLInputElement>(null);
  const text = draft?.text ?? note.text;
  const tags = draft?.tags ?? note.tags.join(", ");
  const write = useRef(() => {});
  write.current = () => {
    if (draft) notes.set(latent, { text: draft.text.trim(), tags: draft.tags.split(",").map((tag) => tag.trim()).filter(Boolean) });
  };
  const edit = (change: { text?: string; tags?: string }) => {
    setDraft({ text, tags, ...change });
    clearTimeout(timer.current);
    timer.current = setTimeout(() => write.current(), SAVED);
  };
  useEffect(() => () => {
    clearTimeout(timer.current);
    write.current(); // what was typed last
  }, []);
  const read = async (chosen: File | undefined) => {
    if (!chosen) return;
    try {
      const n = notes.merge(JSON.parse(await chosen.text()));
      setDraft(null);
      setSaid(n ? `Took ${n} ${n === 1 ? "note" : "notes"}.` : "There are no notes in this file.");
    } catch {
      setSaid("This file is not JSON.");
    }
  };
  const exported = () => {
    const json = JSON.stringify(notes.all, null, 1);
    setShown(offer("saev-notes.json", new Blob([json], { type: "application/json" })) ? "" : json);
  };
  return (
    <section class="card notes" aria-label="Notes">
      <h3>Notes <small>{notes.where ? `kept ${notes.where}` : "not kept here: export them before you leave"}</small></h3>
      <textarea id="note" rows={3} aria-label="Note" placeholder="What does it mean?" value={text} onInput={(e) => edit({ text: e.currentTarget.value })} />
      <label class="tags">
        Tags <input id="tags" placeholder="texture, birds" value={tags} onInput={(e) => edit({ tags: e.currentTarget.value })} />
      </label>
      <div class="bar">
        <button type="button" id="export" onClick={exported}>Export all</button>
        <button type="button" onClick={() => file.current?.click()}>Import</button>
        <input ref={file} id="import" type="file" accept=".json,application/json" aria-label="Notes to import" hidden onChange={(e) => void read(e.currentTarget.files?.[0])} />
        <output aria-live="polite">{notes.problem || said}</output>
      </div>
      {shown && <Fallback name="Notes" text={shown} />}
    </section>
  );
}
