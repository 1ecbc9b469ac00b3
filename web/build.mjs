// Builds the explorer's script and style into the Python package, where the tree and the wheel have
// them: `make web`. The same sources give the same bytes.
// `--check` writes nothing, and fails if the files there are others.
import { build } from "esbuild";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { gzipSync } from "node:zlib";

const OUT = "../saev/explorer/static";
const MAX_BYTES = 150_000;
/** What would end the script element, or what the page's policy or a frame without rights refuses. */
const FORBIDDEN = ["</script", "</style", "<!--", "eval(", "new Function", "WebAssembly", "XMLHttpRequest"];
/** What throws in a frame without rights: one module guards it. */
const STORAGE = "storage.ts";
for (const name of readdirSync("src"))
  if (name !== STORAGE && /localStorage|sessionStorage|indexedDB/.test(readFileSync(`src/${name}`, "utf8")))
    throw new Error(`src/${name} touches the browser's storage: only src/${STORAGE} may`);

const common = { bundle: true, minify: true, charset: "utf8", legalComments: "none", logLevel: "warning", write: false };
const built = {
  "explorer.js": await build({ ...common, entryPoints: ["src/main.tsx"], format: "iife", target: ["es2022"] }),
  "explorer.css": await build({ ...common, entryPoints: ["src/style.css"] }),
};
for (const [name, { outputFiles }] of Object.entries(built)) {
  const { contents, text } = outputFiles[0];
  const size = gzipSync(contents).length;
  for (const word of FORBIDDEN)
    if (text.includes(word)) throw new Error(`${name} must not contain ${word}`);
  if (size > MAX_BYTES) throw new Error(`${name} has ${size} bytes gzipped, expected at most ${MAX_BYTES}`);
  if (!process.argv.includes("--check")) writeFileSync(`${OUT}/${name}`, contents);
  else if (!readFileSync(`${OUT}/${name}`).equals(contents))
    throw new Error(`saev/explorer/static/${name} is not what web/ builds: run \`make web\` and commit it`);
  console.log(`${name}: ${contents.length} bytes, ${size} gzipped`);
}
