"""The page that `saev run` ends with: every SAE of a root, its figures, and its report."""

import typing as tp

import jinja2

from saev import storage
from saev.config import TrainConfig


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
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("saev.visuals"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    ordered = sorted(rows, key=lambda row: (row.metrics["l0"], row.run))
    url = storage.join(root, "index.html")
    html = environment.get_template("overview.html").render(
        rows=[(i, row, _relative(root, row)) for i, row in enumerate(ordered, start=1)],
        points=_points(ordered),
        shards=storage.name(shards),
        best=min((row.metrics["normalized_mse"] for row in ordered), default=0.0),
        x_max=max((row.metrics["l0"] for row in ordered), default=1.0),
        y_max=max((row.metrics["normalized_mse"] for row in ordered), default=1.0),
    )
    storage.write_text(url, html)
    return url


def _relative(root: str, row: Row) -> tuple[str, str]:
    base = storage.normalize(root).rstrip("/") + "/"
    return row.run.removeprefix(base), row.report.removeprefix(base)


def _points(rows: tp.Sequence[Row]) -> list[_Point]:
    x_max = max((row.metrics["l0"] for row in rows), default=1.0) or 1.0
    y_max = max((row.metrics["normalized_mse"] for row in rows), default=1.0) or 1.0
    return [
        _Point(
            100 * row.metrics["l0"] / x_max,
            100 - 100 * row.metrics["normalized_mse"] / y_max,
            i,
        )
        for i, row in enumerate(rows, start=1)
    ]
