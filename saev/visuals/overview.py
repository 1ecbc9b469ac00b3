"""The page that a root ends with: every SAE in it, its figures, and its picture book.

It is made from what is on storage, so whoever writes it last writes all of it.
"""

import concurrent.futures
import dataclasses
import logging
import math
import typing as tp

from saev import storage
from saev.config import TrainConfig
from saev.errors import CorruptDataError
from saev.inference import files
from saev.inference.results import Results
from saev.shards.protocol import METADATA, Metadata
from saev.visuals import pages
from saev.visuals.records import DONE

logger = logging.getLogger(__name__)

INDEX = "index.html"
_N_READERS = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """One SAE, measured on one shards folder."""

    run: str
    """URL of the run folder."""
    report: str
    """URL of the report's first page, "" if the report is not complete."""
    config: TrainConfig
    """The resolved training config."""
    metrics: dict[str, tp.Any]
    """What inference measured."""
    other_model: tp.Sequence[str] = ()
    """How the activations differ from those of training, if such a difference was allowed."""
    on_front: bool = False
    """Whether no other SAE of the section has both a lower L0 and a lower NMSE."""


@dataclasses.dataclass(frozen=True)
class Section:
    """The SAEs that were measured on one shards folder, by L0."""

    shards: str
    """The folder's name."""
    dataset: str
    """Where its images are, as recorded; "" if the folder is gone."""
    rows: tuple[Row, ...]


class _Point(tp.NamedTuple):
    """A row's place in the plot, in percent of its width and height."""

    x: float
    y: float
    number: int
    on_front: bool


def write(root: str, sections: tp.Sequence[Section] | None = None) -> str:
    """Write root/index.html from everything that is complete below a root.

    Args:
        root: URL of the folder that holds `shards` and `runs`.
        sections: what :func:`collect` found there, if it was asked before.

    Returns:
        URL of the page.
    """
    url = storage.join(root, INDEX)
    storage.write_text(url, render(collect(root) if sections is None else sections, base=root))
    return url


def collect(root: str, runs: tp.Sequence[str] | None = None) -> list[Section]:
    """What was measured below a root.

    Args:
        root: URL of the folder that holds `shards` and `runs`.
        runs: URLs of run folders, to look at these only.
    """
    folder = storage.join(root, "runs")
    if runs is None:
        entries = storage.list_dir(folder) if storage.exists(folder) else []
        runs = [entry.url for entry in entries if entry.is_dir]
    with concurrent.futures.ThreadPoolExecutor(_N_READERS) as pool:
        rows = [row for found in pool.map(_rows_of, runs) for row in found]
    by_shards: dict[str, list[Row]] = {}
    for row in rows:
        by_shards.setdefault(str(row.metrics["shards_hash"]), []).append(row)
    return [
        Section(shards, _dataset(root, shards), tuple(_ordered(by_shards[shards])))
        for shards in sorted(by_shards)
    ]


def _rows_of(run: str) -> list[Row]:
    folder = storage.join(run, "inference")
    if not storage.exists(storage.join(run, "run.json")) or not storage.exists(folder):
        return []
    config = TrainConfig.of_run(run)
    rows = []
    for entry in storage.list_dir(folder):
        if entry.is_dir and storage.exists(storage.join(entry.url, files.METRICS)):
            report = _report_of(storage.join(entry.url, "report"))
            results = Results.open(entry.url)
            rows.append(Row(run, report, config, results.metrics, results.other_model))
    return rows


def _report_of(folder: str) -> str:
    """URL of a report's page, "" if the report is not complete."""
    try:
        done = storage.find_sealed(storage.join(folder, DONE))
    except CorruptDataError as err:
        logger.warning("%s Run `saev visuals` again, which writes it anew.", err)
        done = None
    return "" if done is None else storage.join(folder, INDEX)


def _dataset(root: str, shards: str) -> str:
    if not storage.is_file_name(shards):  # a result names the folder, so its name is not trusted
        return ""
    url = storage.join(root, "shards", shards)
    return Metadata.read(url).dataset if storage.exists(storage.join(url, METADATA)) else ""


def _ordered(rows: tp.Sequence[Row]) -> tp.Iterator[Row]:
    """By L0, with the Pareto front marked: each of its members has a lower NMSE than all before."""
    lowest = float("inf")
    for row in sorted(rows, key=lambda r: (r.metrics["l0"], nmse_of(r.metrics), r.run)):
        nmse = nmse_of(row.metrics)
        yield dataclasses.replace(row, on_front=nmse < lowest)
        lowest = min(lowest, nmse)


def render(sections: tp.Sequence[Section], base: str = "") -> str:
    """The page.

    Args:
        sections: from :func:`collect`.
        base: URL of the folder that the page will be in, for links to the picture books; without
            it there are none.
    """
    prefix = storage.normalize(base).rstrip("/") + "/" if base else ""
    return (
        pages.environment()
        .get_template("overview.html")
        .render(
            n_rows=sum(len(section.rows) for section in sections),
            sections=[(section, _plot(section.rows)) for section in sections],
            links=bool(base),
            relative=lambda url: url.removeprefix(prefix),
        )
    )


class _Plot(tp.NamedTuple):
    points: list[_Point]
    x_max: float
    y_max: float
    best: float


def _plot(rows: tp.Sequence[Row]) -> _Plot:
    x_max = max(row.metrics["l0"] for row in rows) or 1.0
    known = [v for row in rows if math.isfinite(v := nmse_of(row.metrics))]
    y_max = max(known, default=0.0) or 1.0
    points = [
        _Point(
            100 * row.metrics["l0"] / x_max,
            100 - 100 * nmse_of(row.metrics) / y_max,
            i,
            row.on_front,
        )
        for i, row in enumerate(rows, start=1)
        if math.isfinite(nmse_of(row.metrics))
    ]
    return _Plot(points, x_max, y_max, min(known, default=math.nan))


def nmse_of(metrics: tp.Mapping[str, tp.Any]) -> float:
    """NMSE, infinite where it is not a number (see docs/metrics): such an SAE is never the best."""
    value = metrics["normalized_mse"]
    return math.inf if value is None else float(value)
