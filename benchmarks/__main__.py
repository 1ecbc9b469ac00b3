"""Run the benchmarks one after another and put their tables together: `make bench`.

    python benchmarks [NAME …] [--out bench-out] [--small]

Each script runs in a process of its own; its rows go to OUT/NAME.json and all tables to
OUT/benchmarks.md. A script that fails is reported at the end. Nothing else should run meanwhile.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import harness
import torch

HERE = Path(__file__).parent
SCRIPTS = {
    "loader": "Reading activations from a disk",
    "loader_s3": "Reading activations from an object store",
    "node_cache": "The node's cache",
    "training": "Training",
    "inference": "Inference",
    "many": "Many SAEs, measured and shown",
    "extraction": "Recording activations",
    "planning": "Planning and opening",
    "explorer": "The explorer's file",
    "serve": "The live explorer",
    "own_image": "An image of one's own",
    "gpu": "On a GPU",
    "sparsity": "L0 on images not trained on",
}
"""In the order of the page, with their headings."""


def available() -> list[str]:
    """Scripts that can run here."""
    needs = {"gpu": torch.cuda.is_available(), "sparsity": torch.cuda.is_available(),
             "explorer": shutil.which("chromium") is not None}  # fmt: skip
    return [name for name in SCRIPTS if needs.get(name, True)]


def run(name: str, out: Path, small: bool) -> bool:
    """Run a script; returns whether it succeeded."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(out / f"{name}.json")]
    print(f"# {name}", file=sys.stderr, flush=True)
    start = time.monotonic()
    code = subprocess.run([*command, *(["--small"] if small else [])]).returncode
    print(f"# {name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return code == 0


def page(out: Path) -> str:
    """Markdown of all results that are there."""
    parts = []
    for name, heading in SCRIPTS.items():
        place = out / f"{name}.json"
        if not place.exists():
            continue
        found = json.loads(place.read_text())
        m = found["machine"]
        gpu = "" if m["gpu"] == "none" else f", {m['gpu']}"
        rows = [
            harness.Row(**{k: v for k, v in row.items() if k != "median"}) for row in found["rows"]
        ]
        parts.append(
            f"## {heading}\n\n`{found['command']}`: {m['date']}, {m['processor']}, {m['cores']} "
            f"cores, {m['memory_gb']} GB{gpu}, torch {m['torch']}.\n\n{harness.table(rows)}\n"
        )
    return "\n".join(parts)


def main() -> None:
    """Run and write."""
    made = argparse.ArgumentParser(
        prog="python benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCRIPTS)}; all that "
                      "can run here if none is given")  # fmt: skip
    made.add_argument("--out", type=Path, default=Path("bench-out"))
    made.add_argument("--small", action="store_true", help="a trial: the numbers mean nothing")
    args = made.parse_args()
    wrong = [name for name in args.names if name not in SCRIPTS]
    if wrong:
        made.error(f"There is no benchmark {wrong[0]!r}. There are {', '.join(SCRIPTS)}.")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = [n for n in args.names or available() if not run(n, args.out, args.small)]
    text = page(args.out)
    (args.out / "benchmarks.md").write_text(text)
    print(text)
    print(f"{args.out / 'benchmarks.md'}", file=sys.stderr)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}. Its own message stands above.")


if __name__ == "__main__":
    main()
