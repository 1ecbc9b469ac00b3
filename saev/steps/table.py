"""The Markdown page that Kubeflow's UI shows of a run: its SAEs, and where to go from here.

The UI opens links of Markdown in a new tab, which its frame for HTML does not. It takes an address
that begins with ``#`` for one of its own pages. It shows no HTML that stands in Markdown, and at
most 400,000 characters.
"""

import os
import re
import shlex
import typing as tp
import urllib.parse

from saev import storage
from saev.secrets import redact
from saev.visuals.overview import Row, Section

_MOST_ROWS = 500
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")
_OTHER_CLOUDS = ("cn-", "us-gov-", "us-iso")
"""Regions of AWS whose consoles are elsewhere."""
_COPY = {"s3": "aws s3 sync", "gs": "gcloud storage rsync -r"}
"""How a folder is copied from a store to the disk, by the scheme of its URL."""


def render(section: Section, page: str, owner: str) -> str:
    """The page.

    Args:
        section: the SAEs of the run.
        page: URL of the root's index.html.
        owner: id of the pipeline run; "" if there is none.
    """
    rows = section.best_first()
    n = len(rows)
    lines = [
        f"## {n} sparse autoencoder{'s' * (n != 1)} of {_plain(dataset_of(section))}",
        "",
        *_table(rows[:_MOST_ROWS]),
        "",
    ]
    if n > _MOST_ROWS:
        lines += [f"The best {_MOST_ROWS} of {n}; all of them are on the page below.", ""]
    lines += [
        "Best first, by the normalised mean squared error (NMSE); 0 is perfect. *Held-out*: of "
        "images that training has not seen. All else is of all images. The error falls as L0 "
        "rises, so compare SAEs of about the same L0, or those on the Pareto front: no other has "
        "both a lower L0 and a lower NMSE.",
        "",
        "### Where it is",
        "",
        *_places(section, rows[0], page, owner),
        "",
        "### On your own machine",
        "",
        *_commands(rows[0]),
    ]
    return redact("\n".join(lines)) + "\n"


def dataset_of(section: Section) -> str:
    """A short name of what the SAEs were measured on."""
    place = section.dataset.rstrip("/")
    return storage.name(place) if place else f"activations {section.shards}"


def _table(rows: tp.Sequence[Row]) -> tp.Iterator[str]:
    yield (
        "| | SAE | run | held-out NMSE | NMSE | L0 | explained variance | dead latents "
        "| Pareto front |"
    )
    yield "|:--|:--|:--|--:|--:|--:|--:|--:|:-:|"
    for i, row in enumerate(rows):
        best = i == 0 and len(rows) > 1
        cells = [
            "**best**" if best else str(i + 1),
            f"**{_plain(row.name)}**" if best else _plain(row.name),
            _code(storage.name(row.run)),
            _number(row.held_out_nmse, ".4f"),
            _number(row.metrics["normalized_mse"], ".4f"),
            _number(row.metrics["l0"], ".1f"),
            _number(row.metrics["explained_variance"], ".2%"),
            f"{row.metrics['n_dead']:,} of {row.metrics['d_sae']:,}",
            "yes" if row.on_front else "",
        ]
        # Browsers join spaces, and the UI gives cells no room.
        yield "| " + " | ".join(f"{cell}\u2003" for cell in cells) + " |"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _places(section: Section, best: Row, page: str, owner: str) -> tp.Iterator[str]:
    root = storage.parent(page)
    yield from _place("all SAEs, one page", page)
    if best.report:
        yield from _place("picture book of the best", best.report)
    yield from _place("the best SAE", storage.join(best.run, "checkpoint"))
    yield from _place("all runs", storage.join(root, "runs"))
    yield from _place("activations", storage.join(root, "shards", section.shards))
    if owner:
        yield f"- [this run in Kubeflow](#/runs/details/{urllib.parse.quote(owner)})"


def _place(name: str, url: str) -> tp.Iterator[str]:
    found = console(url)
    link = f" ([open in the console]({found}))" if found else ""
    yield f"- {name}: {_code(url)}{link}"


def console(url: str) -> str:
    """Address of the web console of the store that a URL is in; "" where none is known.

    AWS and Google Cloud have one address for all. A store with an endpoint of its own has none.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    bucket, key = urllib.parse.quote(bucket), urllib.parse.quote(key)
    if scheme == "gs":
        return f"https://console.cloud.google.com/storage/browser/{bucket}/{key}"
    region = os.environ.get("AWS_DEFAULT_REGION", "")
    if scheme != "s3" or os.environ.get("AWS_ENDPOINT_URL") or region.startswith(_OTHER_CLOUDS):
        return ""
    kind = "object" if storage.name(url).count(".") else "buckets"
    folder = "" if kind == "object" else "/"
    return f"https://console.aws.amazon.com/s3/{kind}/{bucket}?prefix={key}{folder}"


def _commands(best: Row) -> tp.Iterator[str]:
    copy = _COPY.get(best.run.partition("://")[0])
    yield "```"
    if best.report and copy:
        yield f"{copy} {shlex.quote(storage.parent(best.report))} picture-book"
        yield "open picture-book/index.html    # Linux: xdg-open"
    elif best.report and "://" not in best.report:
        yield f"# on a machine or pod that mounts the volume: open {best.report}"
    load = f"import saev; print(saev.load_sae({best.run!r}))"
    yield f"python -c {shlex.quote(load)}"
    yield "```"


def _plain(text: str) -> str:
    """A text that shows as it is."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return f"`{text.replace('`', '').replace('|', '%7C')}`"
