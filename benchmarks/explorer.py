"""The explorer's file with very many latents, in Chromium: first rows, scrolling, search, opening.

    python benchmarks/explorer.py            # 16,384 latents, 15 MB; a minute
    python benchmarks/explorer.py --small    # a trial

Numbers and pictures are made: nothing is measured but the page. The time to the first rows is from
the start of navigation, from a file in the page cache, to the frame after all rows in the window
have their pictures. The scroll goes through the whole list in steps of two windows a frame.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from browsing import FIRST, SCROLL, chromium, picture, timed, typed
from harness import Report, invocation, parser

from saev.explorer import columns, page, pictures
from saev.explorer.data import N_CLASSES, N_NEIGHBOURS

GRID, N_EXAMPLES, N_WORDS, BINS = 16, 8, 1000, 24
NUMBERS = 330
"""Bytes of one latent's numbers in the file, about."""


def part(n: int, max_bytes: float) -> page.Part:
    """An SAE with ``n`` latents: an image of each, and eight of as many as there is room for."""
    rng = np.random.default_rng(0)
    some = {size: [picture(rng, size) for _ in range(64)] for size in (48, 112)}
    each = {size: np.mean([pictures.encoded(len(p)) for p in some[size]]) for size in some}
    per_latent = each[112] * 2 + N_EXAMPLES * pictures.encoded(20 + 20 * 4)
    room = max_bytes - n * NUMBERS
    n_detailed = int(min(n, (1 - pictures.THUMB_SHARE) * room / per_latent))
    n_small = int(min(n - n_detailed, (room - n_detailed * per_latent) / (each[48] + 50)))
    images = [some[112][i % 64] for i in range(2 * n_detailed)]
    images += [some[48][i % 64] for i in range(n_small)]
    thumb = np.full(n, -1)
    thumb[:n_detailed] = np.arange(n_detailed) * 2
    thumb[n_detailed : n_detailed + n_small] = 2 * n_detailed + np.arange(n_small)
    n_shown = n_detailed * N_EXAMPLES
    patches = np.sort(rng.integers(0, GRID**2, (n_shown, 20)), axis=1)
    count = np.ceil(10 ** rng.uniform(1, 7, n))
    mean = 10 ** rng.normal(0, 0.4, n)
    scaled = page.Block.scaled
    blocks = {
        name: page.Block.of(values, kind)
        for name, (values, kind) in {
            "order": (np.arange(n), "u2"), "tokens": (count, "f8"),
            "class": (rng.integers(0, N_WORDS, n), "i2"), "mask": (np.full(n, -1), "i2"),
            "binFirst": (np.full(n, 60), "u1"), "binCount": (np.full(n, BINS), "u1"),
            "bins": (rng.integers(0, 256, (n, BINS)), "u1"),
            "findings": (np.full(n, N_CLASSES), "u1"),
            "findingClass": (rng.integers(0, N_WORDS, n * N_CLASSES), "i2"),
            "findingInside": (rng.random(n * N_CLASSES), "f4"),
            "findingOutside": (rng.random(n * N_CLASSES), "f4"),
            "neighbour": (rng.integers(0, n, (n, N_NEIGHBOURS)), "u2"),
            "coactive": (rng.integers(0, n, (n, N_NEIGHBOURS)), "u2"),
            "thumb": (thumb, "i4"), "pictureBytes": ([len(p) for p in images], "u4"),
            "row": (np.arange(len(images)), "u4"),
            "examples": (np.where(np.arange(n) < n_detailed, N_EXAMPLES, 0), "u1"),
            "image": (rng.integers(0, max(1, len(images)), n_shown), "u4"),
            "kind": (np.zeros(n_shown), "u1"), "value": (rng.random(n_shown), "f4"),
            "side": (np.zeros(n_shown), "u1"), "patches": (np.full(n_shown, 20), "u4"),
            "patch": (patches, "u2"), "level": (rng.integers(1, 256, (n_shown, 20)), "u1"),
        }.items()
    }  # fmt: skip
    blocks |= {name: scaled(rng.random(n)) for name in ("x", "y")}
    blocks |= {
        f"{k}Cosine": scaled(rng.random(n * N_NEIGHBOURS)) for k in ("neighbour", "coactive")
    }
    blocks |= {name: scaled(rng.random(n * N_CLASSES)) for name in ("findingAp", "findingApAll")}
    blocks |= {"quantile": scaled(rng.random(n_shown))}
    shown = []
    for column in columns.COLUMNS:
        if column.key in ("mask_ap", "stability"):
            continue
        values = {"frequency": count / count.max(), "mean": mean, "max": mean * 4}
        facts_of = {"key": column.key, "name": column.name, "hint": column.hint,
                    "unit": column.unit, "log": column.is_log}  # fmt: skip
        for key in (column.key, f"{column.key}_all")[: 1 + column.has_sides]:
            found = values.get(column.key, rng.random(n))
            blocks[key] = page._figure(column, found)
            facts_of |= {"all": key} if key != column.key else {}
        shown.append(facts_of)
    blocks["pictures"] = page.Block("", b"".join(images))
    words = [f"class {i} of {'æéîøü'[i % 5]}ther things" for i in range(N_WORDS)]
    facts = {
        "title": f"{n:,} generated latents", "subtitle": "made for a benchmark", "metrics": [],
        "warnings": [], "activations": "", "results": "", "nLatents": n, "nTokens": 10**8,
        "nImages": 10**6, "grid": [GRID, GRID], "columns": shown, "side": "held-out images",
        "classes": [{"name": word, "kind": "image", "support": 1000} for word in words],
        "files": [f"folder_{i % 997}/n{i:08d}.JPEG" for i in range(len(images))],
        "labelNames": words, "labels": (np.arange(len(images)) % N_WORDS).tolist(), "aspect": 1,
        "nPictured": n_detailed + n_small, "nDetailed": n_detailed, "nFiring": n,
        "dataset": "generated",
        "summary": {"title": "generated", "figures": {}, "side": "", "config": {}, "curves": {}},
    }  # fmt: skip
    return page.Part(facts, blocks)


def main() -> None:
    """Measure, print, write."""
    made = parser(__doc__, repeats=3)
    args = made.parse_args()
    n, megabytes = (1024, 3.0) if args.small else (16_384, 15.0)
    report = Report(invocation(), args.json)
    with tempfile.TemporaryDirectory() as folder, chromium.browser() as tab:
        file = Path(folder) / "explorer.html"
        file.write_text(page._frame([part(n, megabytes * 1e6)]))
        rows: dict[str, list[float]] = {}
        for _ in range(args.repeats):
            tab.open(file.as_uri(), height=900)
            rows.setdefault("first", []).append(tab.js(FIRST))
            times, most = tab.js(SCROLL)
            rows.setdefault("p95", []).append(times[int(0.95 * len(times))])
            rows.setdefault("rows", []).append(most)
            tab.js("scrollTo(0, 0)")
            count = "document.getElementById('count').textContent"
            first = tab.js(timed(typed("n0000012"), f"{count}.includes(' of ')"))
            rows.setdefault("index", []).append(first)
            before = tab.js(count)
            then = tab.js(timed(typed("aether 17"), f"{count} !== {json.dumps(before)}"))
            rows.setdefault("search", []).append(then)
            tab.js(typed(""))
            opened = (
                "document.querySelectorAll('.near a').length === 12 && [...document"
                ".querySelectorAll('main canvas')].filter(c => c.dataset.drawn).length >= 8"
            )
            rows.setdefault("latent", []).append(
                tab.js(timed("location.hash = '#/0/latent/7'", opened))
            )
        assert tab.problems() == []
        size = file.stat().st_size / 1e6
    name = f"{n:,} latents, {size:.1f} MB"
    report.add(f"first rows with pictures, {name}", rows["first"], "ms", at_most=1500)
    report.add(
        "frames of a scroll through all rows, 95th percentile", rows["p95"], "ms", at_most=33
    )
    report.add("most rows in the document", rows["rows"], "", at_most=200)
    report.add("first search, which reads all texts", rows["index"], "ms")
    report.add("later search", rows["search"], "ms", at_most=100)
    report.add("page of a latent with its pictures", rows["latent"], "ms", at_most=200)
    report.close()


if __name__ == "__main__":
    main()
