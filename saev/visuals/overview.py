"""The page that `saev run` ends with: every SAE of a root, its figures, and its report."""

import typing as tp

from saev import storage
from saev.config import TrainConfig
from saev.visuals import pages


class Row(tp.NamedTuple):
    """One SAE."""

    run: str
    """URL of the run folder."""
    report: str
    """URL of the report's first page."""
    config: TrainConfig
    """The resolved training config."""
    metrics: dict[str, tp.Any]
    """What inference measured."""


class _Point(tp.NamedTuple):
    """A row's place in the plot, in percent of its width and height."""

    x: float
    y: float
    number: int


def write(root: str, shards: str, rows: tp.Sequence[Row]) -> str:
    """Write root/index.html.

    Args:
        root: URL of the folder that holds `shards` and `runs`.
        shards: URL of the shards folder.
        rows: the SAEs.

    Returns:
        URL of the page.
    """
    ordered = sorted(rows, key=lambda row: (row.metrics["l0"], row.run))
    x_max = max((row.metrics["l0"] for row in ordered), default=1.0)
    y_max = max((row.metrics["normalized_mse"] for row in ordered), default=1.0)
    url = storage.join(root, "index.html")
    html = (
        pages.environment()
        .get_template("overview.html")
        .render(
            rows=[(i, row, _relative(root, row)) for i, row in enumerate(ordered, start=1)],
            points=_points(ordered, x_max, y_max),
            shards=storage.name(shards),
            best=min((row.metrics["normalized_mse"] for row in ordered), default=0.0),
            x_max=x_max,
            y_max=y_max,
        )
    )
    storage.write_text(url, html)
    return url


def _relative(root: str, row: Row) -> tuple[str, str]:
    base = storage.normalize(root).rstrip("/") + "/"
    return row.run.removeprefix(base), row.report.removeprefix(base)


def _points(rows: tp.Sequence[Row], x_max: float, y_max: float) -> list[_Point]:
    return [
        _Point(
            100 * row.metrics["l0"] / (x_max or 1.0),
            100 - 100 * row.metrics["normalized_mse"] / (y_max or 1.0),
            i,
        )
        for i, row in enumerate(rows, start=1)
    ]
