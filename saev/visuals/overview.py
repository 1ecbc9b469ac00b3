"""The page that a root ends with: every SAE in it, its figures, and its picture book.

It is made from what is on storage, so whoever writes it last writes all of it.
"""

import concurrent.futures
import dataclasses
import logging
import math
import typing as tp

from saev import names, storage
from saev.config import TrainConfig
from saev.errors import CorruptDataError
from saev.inference import files
from saev.inference.results import Results
from saev.shards.protocol import METADATA, Metadata
from saev.visuals import pages
from saev.visuals.records import DONE

logger = logging.getLogger(__name__)

INDEX = "index.html"
RUN = "run.json"
_REMEDY = "Restore the run folder from a copy, or train it again."
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
    """What inference measured, on the whole shards folder."""
    held_out: tp.Mapping[str, tp.Any] = dataclasses.field(default_factory=dict)
    """What training measured in the end, on images that it had not seen; empty if it did not."""
    name: str = ""
    """What tells the SAE from the others of its section."""
    other_model: tp.Sequence[str] = ()
    """How the activations differ from those of training, if such a difference was allowed."""
    on_front: bool = False
    """Whether no other SAE of the section has both a lower L0 and a lower NMSE."""

    @property
    def nmse(self) -> float:
        """Of the shards folder; infinite where it is not a number (see docs/metrics)."""
        return _nmse_of(self.metrics)

    @property
    def held_out_nmse(self) -> float | None:
        """Of held-out images; None if that was not measured."""
        return None if self.held_out.get("normalized_mse") is None else _nmse_of(self.held_out)


@dataclasses.dataclass(frozen=True)
class Section:
    """The SAEs that were measured on one shards folder, by L0."""

    shards: str
    """The folder's name."""
    dataset: str
    """Where its images are, as recorded; "" if the folder is gone."""
    rows: tuple[Row, ...]

    def best_first(self) -> list[Row]:
        """By NMSE: the held-out one, or that of all images if some SAE has no other."""
        if any(row.held_out_nmse is None for row in self.rows):
            return sorted(self.rows, key=lambda row: (row.nmse, row.run))
        return sorted(self.rows, key=lambda row: (row.held_out_nmse or 0.0, row.run))


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
        Section(shards, _dataset(root, shards), tuple(_ordered(_named(by_shards[shards]))))
        for shards in sorted(by_shards)
    ]


def names_of(runs: tp.Sequence[str]) -> dict[str, str]:
    """What tells SAEs apart, by the names of their run folders.

    Args:
        runs: URLs of complete run folders.
    """
    with concurrent.futures.ThreadPoolExecutor(_N_READERS) as pool:
        configs = list(pool.map(TrainConfig.of_run, runs))
    return dict(zip(map(storage.name, runs), names.of(configs), strict=True))


def _named(rows: tp.Sequence[Row]) -> list[Row]:
    said = names.of([row.config for row in rows])
    return [dataclasses.replace(row, name=name) for row, name in zip(rows, said, strict=True)]


def _rows_of(run: str) -> list[Row]:
    folder = storage.join(run, "inference")
    if not storage.exists(storage.join(run, RUN)) or not storage.exists(folder):
        return []
    config = TrainConfig.of_run(run)
    held_out = storage.Folder.open(run, RUN, _REMEDY).record.get("metrics") or {}
    rows = []
    for entry in storage.list_dir(folder):
        if entry.is_dir and storage.exists(storage.join(entry.url, files.METRICS)):
            report = _report_of(storage.join(entry.url, "report"))
            results = Results.open(entry.url)
            rows.append(
                Row(run, report, config, results.metrics, held_out, other_model=results.other_model)
            )
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
    for row in sorted(rows, key=lambda r: (r.metrics["l0"], r.nmse, r.run)):
        yield dataclasses.replace(row, on_front=row.nmse < lowest)
        lowest = min(lowest, row.nmse)


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
            sections=[
                (section, _plot(section.rows), section.best_first()[0].run) for section in sections
            ],
            links=bool(base),
            relative=lambda url: url.removeprefix(prefix),
        )
    )


class _Plot(tp.NamedTuple):
    points: list[_Point]
    x_max: float
    y_max: float


def _plot(rows: tp.Sequence[Row]) -> _Plot:
    x_max = max(row.metrics["l0"] for row in rows) or 1.0
    known = [row.nmse for row in rows if math.isfinite(row.nmse)]
    y_max = max(known, default=0.0) or 1.0
    points = [
        _Point(100 * row.metrics["l0"] / x_max, 100 - 100 * row.nmse / y_max, i, row.on_front)
        for i, row in enumerate(rows, start=1)
        if math.isfinite(row.nmse)
    ]
    return _Plot(points, x_max, y_max)


def _nmse_of(metrics: tp.Mapping[str, tp.Any]) -> float:
    value = metrics["normalized_mse"]
    return math.inf if value is None else float(value)
