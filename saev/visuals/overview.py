"""The page of a root: all of its SAEs with their figures, and links to their pages.

Each process makes the whole page from what it finds in storage. So the page that is written last is
complete.
"""

import concurrent.futures
import dataclasses
import logging
import math
import typing as tp

from saev import names, storage
from saev.config import TrainConfig
from saev.errors import ConfigError, CorruptDataError, IncompleteError
from saev.inference import files
from saev.inference.results import Results
from saev.shards.protocol import METADATA, Metadata
from saev.visuals import pages
from saev.visuals.files import DONE, REPORT
from saev.visuals.rows import ALL, SIDES, Figures, Row

logger = logging.getLogger(__name__)

INDEX = "index.html"
_MARK = "<title>saev:"
"""The beginning of the title of every page of a root, also in version 0.1.0."""
_HEAD = 1000
_N_READERS = 16


@dataclasses.dataclass(frozen=True)
class Section:
    """The SAEs that were measured on one shards folder, sorted by L0."""

    shards: str
    """The folder's name."""
    dataset: str
    """Where its images are, as recorded; "" if the folder is gone."""
    rows: tuple[Row, ...]
    model: str = ""
    """Whose activations these are; "" if the folder is gone."""

    @property
    def side(self) -> str:
        """The side of the figures: HELD_OUT or ELSEWHERE; ALL if not all SAEs have one of these.

        It is the same for all SAEs of the section, so that they are compared on the same images.
        """
        sides = {row.side for row in self.rows}
        return sides.pop() if len(sides) == 1 else ALL

    def headline(self, row: Row) -> Figures:
        """The figures of one of its SAEs on :attr:`side`."""
        return Figures.of(row.of_side(self.side))

    def best_first(self) -> list[Row]:
        """The rows by NMSE, the lowest first."""
        return sorted(self.rows, key=lambda row: (self.headline(row).order, row.run))

    def ordered(self) -> tp.Self:
        """The section sorted by L0, with the Pareto front marked: the rows with a lower NMSE than
        all rows before them."""

        def by_l0(row: Row) -> tuple[float, float, str]:
            found = self.headline(row)
            return (math.inf if found.l0 is None else found.l0), found.order, row.run

        lowest = math.inf
        rows = []
        for row in sorted(self.rows, key=by_l0):
            nmse = self.headline(row).order
            rows.append(dataclasses.replace(row, on_front=nmse < lowest))
            lowest = min(lowest, nmse)
        return dataclasses.replace(self, rows=tuple(rows))


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


def report(root: str) -> str:
    """:func:`write`, for a folder that a user has named.

    Raises:
        ConfigError: the folder is no root.
    """
    root = storage.normalize(root)
    if not any(storage.is_dir(storage.join(root, name)) for name in ("runs", "shards")):
        raise ConfigError(
            f"--root {root} has neither a folder runs nor a folder shards. Expected the folder "
            "that `saev run --root` filled, or the one that holds --runs-root and --shards-root."
        )
    return write(root)


def root_of(run: str) -> str:
    """The root that a run folder is in, ROOT/runs/ID; "" if there are no shards beside its runs."""
    runs = storage.parent(storage.normalize(run))
    root = storage.parent(runs)
    is_root = storage.name(runs) == "runs" and storage.is_dir(storage.join(root, "shards"))
    return root if is_root else ""


def home_of(report: str) -> str:
    """The link from a report to the page of its root; "" if it is in no root.

    Args:
        report: URL of the report's folder, mostly ROOT/runs/ID/inference/HASH/report.
    """
    run = storage.parent(storage.parent(storage.parent(report)))
    is_usual = report == storage.join(run, "inference", *report.rsplit("/", 2)[1:])
    return f"../../../../../{INDEX}" if is_usual and root_of(run) else ""


def update(run: str) -> str:
    """Write the page of the root that a run is in. Stages call this when they have added something.

    Returns:
        URL of the page; "" if the run is in no root, or another program's page is in its place.
    """
    root = root_of(run)
    return write(root) if root and may_write(root) else ""


def may_write(root: str) -> bool:
    """Whether the page of a root is missing, or was written by saev."""
    place = storage.join(root, INDEX)
    return not storage.exists(place) or _MARK in storage.read_text(place)[:_HEAD]


def collect(root: str, runs: tp.Sequence[str] | None = None) -> list[Section]:
    """All SAEs below a root, measured or only trained, by shards folder.

    Args:
        root: URL of the folder that holds `shards` and `runs`.
        runs: URLs of run folders, to look at these only.
    """
    folder = storage.join(root, "runs")
    if runs is None:
        entries = storage.list_dir(folder) if storage.exists(folder) else []
        runs = [entry.url for entry in entries if entry.is_dir]
    with concurrent.futures.ThreadPoolExecutor(_N_READERS) as pool:
        found = [pair for pairs in pool.map(_rows_of, runs) for pair in pairs]
    by_shards: dict[str, list[Row]] = {}
    for shards, row in found:
        by_shards.setdefault(shards, []).append(row)
    return [
        Section(shards, dataset, tuple(_named(by_shards[shards])), model).ordered()
        for shards in sorted(by_shards)
        for dataset, model in [_recorded(root, shards)]
    ]


def row(run: str, shards: str) -> Row:
    """The row of one SAE on a shards folder.

    Args:
        run: URL of the run folder.
        shards: name of the shards folder.

    Raises:
        IncompleteError: the SAE was not measured there.
    """
    for of, found in _rows_of(run):
        if of == shards:
            return found
    raise IncompleteError(f"{run} has no results on {shards}. Run `saev inference` first.")


def names_of(runs: tp.Sequence[str]) -> dict[str, str]:
    """Names that tell SAEs apart, by the names of their run folders.

    Args:
        runs: URLs of complete run folders.
    """
    with concurrent.futures.ThreadPoolExecutor(_N_READERS) as pool:
        configs = list(pool.map(TrainConfig.of_run, runs))
    return dict(zip(map(storage.name, runs), names.of(configs), strict=True))


def _named(rows: tp.Sequence[Row]) -> list[Row]:
    said = names.of([row.config for row in rows])
    return [dataclasses.replace(row, name=name) for row, name in zip(rows, said, strict=True)]


def _rows_of(run: str) -> list[tuple[str, Row]]:
    """The rows of an SAE: one for each shards folder on which it was measured. If there is none,
    one for the folder of its training."""
    trained = Row.find(run)
    if trained is None:
        return []
    by_shards: dict[str, list[Results]] = {}
    for entry in storage.list_dir(storage.join(run, "inference"), missing_ok=True):
        if entry.is_dir and storage.exists(storage.join(entry.url, files.METRICS)):
            results = Results.open(entry.url)
            by_shards.setdefault(str(results.metrics["shards_hash"]), []).append(results)
    found = [
        (shards, trained.on(one, _report_of(storage.join(one.url, REPORT))))
        for shards, several in by_shards.items()
        for one in _newest(several)
    ]
    return found or [(storage.name(trained.config.train_data.shards), trained)]


def _newest(found: list[Results]) -> list[Results]:
    """The results without those of earlier versions, if this version has measured the SAE again."""
    return [one for one in found if one.has_tables] or found


def _report_of(folder: str) -> str:
    """URL of a report's page, "" if the report is not complete."""
    try:
        done = storage.find_sealed(storage.join(folder, DONE))
    except CorruptDataError as err:
        logger.warning("%s Run `saev visuals` again, which writes it anew.", err)
        done = None
    return "" if done is None else storage.join(folder, INDEX)


def _recorded(root: str, shards: str) -> tuple[str, str]:
    """Location of a shards folder's images, and the model; "" if the folder is gone."""
    if not storage.is_file_name(shards):  # a result names the folder, so its name is not trusted
        return "", ""
    url = storage.join(root, "shards", shards)
    if not storage.exists(storage.join(url, METADATA)):
        return "", ""
    metadata = Metadata.read(url)
    return metadata.dataset, metadata.source().model


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
                (section, _plot(section), section.best_first()[0].run) for section in sections
            ],
            links=bool(base),
            sides=SIDES,
            relative=lambda url: url.removeprefix(prefix),
        )
    )


class _Plot(tp.NamedTuple):
    points: list[_Point]
    x_max: float
    y_max: float


def _plot(section: Section) -> _Plot:
    found = [section.headline(row) for row in section.rows]
    x_max = max((one.l0 for one in found if one.l0 is not None), default=0.0) or 1.0
    y_max = max((one.nmse for one in found if one.nmse is not None), default=0.0) or 1.0
    points = [
        _Point(100 * one.l0 / x_max, 100 - 100 * one.nmse / y_max, i, row.on_front)
        for i, (row, one) in enumerate(zip(section.rows, found, strict=True), start=1)
        if one.l0 is not None and one.nmse is not None
    ]
    return _Plot(points, x_max, y_max)
