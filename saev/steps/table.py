"""The Markdown page of a run in Kubeflow's UI: a table of its SAEs, places and commands.

Links in Markdown open in a new tab; links in the UI's frame for HTML do not work. An address that
begins with ``#`` is a page of the UI itself. The UI shows at most 400,000 characters, and no HTML
inside Markdown.
"""

import os
import re
import shlex
import typing as tp
import urllib.parse

from saev import storage
from saev.secrets import redact
from saev.visuals.overview import Section
from saev.visuals.rows import SIDES, TRAINING, Row, number

_MOST_ROWS = 500
_ROOM = "\u2002"
_NO_BREAK = "\u00a0"
_NO_BREAK_HYPHEN = "\u2011"
_FRONT = "◆"
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")
_OTHER_CLOUDS = ("cn-", "us-gov-", "us-iso")
"""Regions of AWS whose consoles are elsewhere."""
_COPY = {"s3": "aws s3 sync", "gs": "gcloud storage rsync -r"}
"""The command that copies a folder from a store to the disk, by the scheme of its URL."""


def render(section: Section, page: str, owner: str) -> str:
    """Render the page.

    Args:
        section: the SAEs of the run.
        page: URL of the root's index.html.
        owner: id of the pipeline run; "" if there is none.
    """
    rows = section.best_first()
    n = len(rows)
    side = SIDES[section.side]
    lines = [
        f"## {n} sparse autoencoder{'s' * (n != 1)} of {_plain(dataset_of(section))}",
        "",
        *_table(section, rows[:_MOST_ROWS]),
        "",
    ]
    if n > _MOST_ROWS:
        lines += [f"The best {_MOST_ROWS} of {n}; all of them are on the page below.", ""]
    lines += [
        "Best first, by the normalised mean squared error (NMSE); 0 is perfect. "
        f"*{side.name.capitalize()}*: of {side.images}. *Training*: of {SIDES[TRAINING].images}. "
        f"The error falls as L0 rises, so compare SAEs of about the same L0. {_FRONT}: on the "
        "Pareto front, no other has both a lower L0 and a lower NMSE.",
        "",
        "### Where it is",
        "",
        *_places(section, rows[0], page, owner),
        "",
        "### On your own machine",
        "",
        *_commands(rows[0], page),
    ]
    return redact("\n".join(lines)) + "\n"


def dataset_of(section: Section) -> str:
    """A short name of the dataset that the SAEs were measured on."""
    place = redact(section.dataset).rstrip("/")  # an untrusted text of the shards folder
    return place.rsplit("/", 1)[-1] or f"activations {section.shards}"


def _table(section: Section, rows: tp.Sequence[Row]) -> tp.Iterator[str]:
    side = SIDES[section.side].name.replace(" ", _NO_BREAK)
    columns = [f"NMSE, {side}", f"L0, {side}", f"dead, {side}", "NMSE, training", "L0, training"]
    yield _line(["", "SAE", *columns, "run"])
    yield "|--:|:--|--:|--:|--:|--:|--:|:--|"
    for place, row in enumerate(rows, start=1):
        best = place == 1 and len(rows) > 1
        name = _plain(row.name).replace("-", _NO_BREAK_HYPHEN)
        found = section.headline(row)
        yield _line(
            [
                f"{_FRONT * row.on_front}{_NO_BREAK}{place}",
                f"**{name}** (best)" if best else name,
                number(found.nmse, ".4f"),
                number(found.l0, ".1f"),
                f"{number(found.n_dead, ',')}/{row.config.sae.d_sae}",
                number(row.training.nmse, ".4f"),
                number(row.training.l0, ".1f"),
                _code(storage.name(row.run)),
            ]
        )


def _line(cells: tp.Sequence[str]) -> str:
    """A row. Its spaces do not collapse, because the UI puts no room beside the cells."""
    return "| " + " | ".join(f"{cell}{_ROOM}" for cell in cells) + " |"


def _places(section: Section, best: Row, page: str, owner: str) -> tp.Iterator[str]:
    """Lines with places, relative to the root: long addresses do not fit into the UI's frame."""
    root = storage.parent(page)
    yield from _place("root", root, root)
    yield from _place("all SAEs on one page", page, root)
    if best.report:
        yield from _place("picture book of the best", storage.parent(best.report), root)
    yield from _place("weights of the best", storage.join(best.run, "checkpoint"), root)
    yield from _place("activations", storage.join(root, "shards", section.shards), root)
    if owner:
        yield f"- [this run in Kubeflow](#/runs/details/{urllib.parse.quote(owner)})"


def _place(name: str, url: str, root: str) -> tp.Iterator[str]:
    found = console(url)
    link = f" ([console]({found}))" if found else ""
    yield f"- {name}: {_code(url.removeprefix(root + '/'))}{link}"


def console(url: str) -> str:
    """Address of a URL in the web console of its store; "" if it has no known console.

    AWS and Google Cloud have one console for all buckets. A store with an own endpoint has none.
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


def _commands(best: Row, page: str) -> tp.Iterator[str]:
    root = storage.parent(page)
    run = best.run.removeprefix(root + "/")
    yield "```"
    yield f"ROOT={shlex.quote(root)}"
    yield f"RUN={shlex.quote(run)}"
    copy = _COPY.get(root.partition("://")[0])
    if best.report:
        book = storage.parent(best.report).removeprefix(best.run + "/")
        if copy:
            yield f"{copy} \\"
            yield f'  "$ROOT/$RUN/{book}" book'
        elif "://" not in root:
            yield f'cp -r "$ROOT/$RUN/{book}" book    # where the volume is mounted'
        yield "open book/index.html    # Linux: xdg-open"
    yield "python -c \"import saev; print(saev.load_sae('$ROOT/$RUN'))\""
    yield "```"


def _plain(text: str) -> str:
    """A text with Markdown's special characters escaped."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return f"`{text.replace('`', '').replace('|', '%7C')}`"
