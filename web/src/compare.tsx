// Two groups of images: on which share of each a latent fires, with images of both.
import { useId, useMemo } from "preact/hooks";
import { follow } from "./address";
import { percent, whole } from "./format";
import { usePromise } from "./hooks";
import type { Page, PageProps } from "./pages";
import { highest } from "./panels";
import { Picture } from "./picture";
import type { Difference, Example, Group, Run } from "./source";

const SHOWN = 12;
const EXAMPLES = 3;
/** So many images of a latent are looked at to find some of each group. */
const LOOKED_AT = 16;

/** A group as a word of the address: class:3, latent:7, images:1,2 or rest. */
function readGroup(run: Run, text: string | undefined): Group | null {
  const [kind, what = ""] = (text ?? "").split(":");
  if (!run.groups.includes(kind as Group["kind"])) return null;
  if (kind === "rest") return { kind };
  if (kind === "images" && /^\d+(,\d+)*$/.test(what)) return { kind, examples: what.split(",").map(Number) };
  if (!/^\d+$/.test(what)) return null;
  if (kind === "class" && run.facts.classes[Number(what)]?.kind === "image") return { kind, class: Number(what) };
  return kind === "latent" && Number(what) < run.facts.nLatents ? { kind, latent: Number(what) } : null;
}

function nameOf(run: Run, group: Group): string {
  if (group.kind === "class") return run.facts.classes[group.class].name;
  if (group.kind === "latent") return `images of latent ${group.latent}`;
  return group.kind === "images" ? `${whole(group.examples.length)} chosen images` : "all others";
}

function Compare({ run, address, router, open, href }: PageProps) {
  const classes = run.facts.classes.map((one, i) => ({ ...one, i })).filter(({ kind }) => kind === "image");
  const { a: textA, b: textB } = address.words;
  const [a, b] = useMemo<[Group | null, Group | null]>(() => {
    const first = readGroup(run, textA) ?? (classes.length ? { kind: "class", class: classes[0].i } : null);
    return [first, readGroup(run, textB) ?? (run.groups.includes("rest") ? { kind: "rest" } : null)];
  }, [run, textA, textB]);
  const isSame = a?.kind === b?.kind && JSON.stringify(a) === JSON.stringify(b);
  const found = usePromise(() => (a && b && !isSame ? run.compare(a, b) : null), [run, a, b, isSame]);
  const rows = found?.rows ?? [];
  const more = rows.filter((row) => row.a > row.b).slice(0, SHOWN);
  const less = rows.filter((row) => row.a < row.b).slice(-SHOWN).reverse();
  const choose = (side: "a" | "b") => (text: string) => router.say({ [side]: text });
  return (
    <main class="one compare">
      <h2>Compare two groups of images</h2>
      <p class="hint">
        For each latent the share of the images of a group on which it fires with at least a twentieth of its largest value. All images that
        were measured count, also those of training: the shares describe the latents, and test nothing.
      </p>
      <div class="bar">
        <Chooser run={run} label="First group" group={a} text={textA} choose={choose("a")} />
        <button type="button" id="swap" disabled={b?.kind === "rest"} onClick={() => router.say({ a: textB ?? "", b: textA ?? (a?.kind === "class" ? `class:${a.class}` : "") })} aria-label="Swap the groups">⇄</button>
        <Chooser run={run} label="Second group" group={b} text={textB} choose={choose("b")} rest />
      </div>
      {isSame && <p class="nothing" role="status">Both groups are the same.</p>}
      {!isSame && found && a && b && (
        <div class="sides">
          <Side title={`More on ${nameOf(run, a)}`} rows={more} {...{ run, a, b, open, href }} n={found.n} />
          <Side title={`More on ${nameOf(run, b)}`} rows={less} {...{ run, a, b, open, href }} n={found.n} />
        </div>
      )}
    </main>
  );
}

export const compare: Page = {
  path: "compare",
  name: "Compare",
  can: (_, run) => run.groups.length > 0 && run.facts.classes.some(({ kind }) => kind === "image"),
  View: Compare,
};

interface ChooserProps {
  run: Run;
  label: string;
  group: Group | null;
  text: string | undefined;
  choose: (text: string) => void;
  rest?: boolean;
}

function Chooser({ run, label, group, text, choose, rest = false }: ChooserProps) {
  const id = useId();
  const value = group?.kind === "class" ? `class:${group.class}` : (group?.kind ?? "");
  const kinds = run.groups.filter((kind) => kind === "latent" || kind === "images");
  const typed = group?.kind === "latent" || group?.kind === "images";
  return (
    <span class="chooser">
      <label for={id}>{label}</label>
      <select id={id} value={value} onChange={(e) => choose(e.currentTarget.value === "latent" ? "latent:0" : e.currentTarget.value === "images" ? "images:0" : e.currentTarget.value)}>
        {rest && run.groups.includes("rest") && <option value="rest">all others</option>}
        {kinds.includes("latent") && <option value="latent">images of a latent …</option>}
        {kinds.includes("images") && <option value="images">chosen images …</option>}
        {run.facts.classes.map(({ name, kind, support }, i) => kind === "image" && <option value={`class:${i}`}>{`${name} (${whole(support)})`}</option>)}
      </select>
      {typed && (
        <input key={group.kind} aria-label={group.kind === "latent" ? `${label}: number of the latent` : `${label}: numbers of images, with commas`}
          value={(text ?? "").split(":")[1] ?? ""} onChange={(e) => choose(`${group.kind}:${e.currentTarget.value.replace(/\s/g, "")}`)} />
      )}
    </span>
  );
}

interface SideProps extends Pick<PageProps, "run" | "open" | "href"> {
  title: string;
  rows: Difference[];
  a: Group;
  b: Group;
  n: [number, number];
}

function Side({ run, title, rows, a, b, n, open, href }: SideProps) {
  return (
    <section class="card" aria-label={title}>
      <h3>{title}</h3>
      {rows.length === 0 ? <p class="nothing">No latent.</p> : (
        <div class="scroll wide" tabIndex={0} role="region" aria-label={`${title}: table`}>
          <table>
            <thead>
              <tr>
                <th scope="col">Latent</th>
                <th scope="col" class="n" title={`Share of ${whole(n[0])} images`}>{nameOf(run, a)}</th>
                <th scope="col" class="n" title={`Share of ${whole(n[1])} images`}>{nameOf(run, b)}</th>
                <th scope="col">Images of both</th>
              </tr>
            </thead>
            <tbody>
              {rows.map((row) => (
                <tr key={row.latent}>
                  <th scope="row">
                    <a href={href(row.latent)} onClick={(event) => follow(event, () => open(row.latent))}>{row.latent}</a>{" "}
                    <small>{run.nameOf(row.latent)}</small>
                  </th>
                  <td class="n">{percent(row.a)}</td>
                  <td class="n">{percent(row.b)}</td>
                  <td><Images run={run} latent={row.latent} groups={[a, b]} /></td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </section>
  );
}

/** Images of a latent that are of each group, as far as classes tell. */
function Images({ run, latent, groups }: { run: Run; latent: number; groups: [Group, Group] }) {
  const examples = usePromise(() => run.examples(latent, LOOKED_AT), [run, latent]) ?? [];
  const isIn = (e: Example, group: Group, other: Group): boolean =>
    group.kind === "class" ? e.label === run.facts.classes[group.class].name
    : group.kind === "images" ? group.examples.includes(e.example)
    : group.kind === "rest" && !isIn(e, other, group);
  const [a, b] = groups;
  const mine = [examples.filter((e) => isIn(e, a, b)), examples.filter((e) => isIn(e, b, a))];
  const high = highest(run, latent);
  return (
    <span class="pair">
      {mine.map((some, side) => (
        <span key={side} class="thumbs">
          {some.slice(0, EXAMPLES).map((e) => (
            <Picture key={e.example} run={run} image={e.example} marks={e.patches && e} high={high} alt={`${e.label || e.file}, ${side ? "second" : "first"} group`} />
          ))}
        </span>
      ))}
    </span>
  );
}
