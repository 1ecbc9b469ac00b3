"""The heading of a report: the SAE, its model, images, tag and date, and its figures."""

import dataclasses
import datetime
import math
import typing as tp

from saev import names, storage
from saev.config.source import ActivationSource
from saev.errors import SaevError
from saev.inference.results import Results
from saev.secrets import redact
from saev.visuals.rows import ALL, SIDES, TRAINING, Row, last_logged

if tp.TYPE_CHECKING:
    from saev.shards import Shards  # needs torch, which `saev serve` does without


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number of the page's header."""

    label: str
    text: str
    hint: str
    """One sentence that explains it."""


_FIGURES: tuple[tuple[str, str, str, str], ...] = (
    ("normalized_mse", "NMSE", "{:.4f}", "Squared error over the variance; 0 is perfect."),
    ("l0", "L0", "{:.1f}", "Latents that fire per token, on average."),
    ("n_dead", "Dead", "{:,.0f}", "Latents that never fire."),
)
"""Numbers of one side: of held-out images, or of images of training."""
_METRICS: tuple[tuple[str, str, str, str], ...] = (
    ("d_sae", "Latents", "{:,.0f}", "Size of the dictionary."),
    (
        "dense_share", "Dense (> 10 × mean)", "{:.1%}",
        "Share of the latents that fire more than ten times as often as the mean of all latents "
        "(L0 ÷ number of latents), or on more than half of the tokens.",
    ),
    ("n_tokens", "Tokens", "{:,.0f}", "Tokens that were measured."),
)  # fmt: skip


def _of_all(raw: tp.Mapping[str, tp.Any]) -> list[Metric]:
    """Those of the header's numbers that ``raw``, the metrics.json of inference, has."""
    shown = []
    for key, label, form, hint in _METRICS:
        value = raw.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            shown.append(Metric(label, form.format(value), hint))
    return shown


class Heading(tp.NamedTuple):
    """The texts of a report's header."""

    title: str
    subtitle: str
    metrics: list[Metric]


def of(run: str, results: Results, shards: "Shards", activations: ActivationSource) -> Heading:
    """The heading of the report of an SAE on a shards folder.

    Args:
        run: URL of the SAE, mostly a run folder.
        results: what inference measured.
        shards: what it was measured on.
        activations: what these are.
    """
    metrics = results.metrics
    row = _row(run, results)
    layer = metrics.get("layer")
    where = "" if layer is None else f", layer {layer}"
    dataset = storage.name(redact(shards.metadata.dataset).rstrip("/"))
    words = [dataset, f"{shards.n_examples:,} images", f"shards {shards.metadata.hash}"]
    if row is None:
        name = storage.name(run)
    else:
        (name,) = names.of([row.config])
        words += [f"run {storage.name(run)}"]
        words += [f"tag {row.config.tag}"] if row.config.tag else []
        words += [f"trained {day}"] if (day := _day(run)) else []
    title = f"{name} of {activations.model}{where}"
    return Heading(title, " · ".join(filter(None, words)), _figures(metrics, row))


def _row(run: str, results: Results) -> Row | None:
    """The row of a run; None if it is no run folder."""
    try:
        trained = Row.find(run)
    except SaevError:
        return None
    return None if trained is None else trained.on(results)


def _day(run: str) -> str:
    """The day on which the run was trained, by its curves; "" if it is not known."""
    seconds = last_logged(run, "timings.jsonl").get("wall_time")
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def _figures(metrics: tp.Mapping[str, tp.Any], row: Row | None) -> list[Metric]:
    """The header's numbers: those of images that training has not seen first."""
    side = ALL if row is None else row.side
    sides = [(SIDES[side], metrics if row is None else row.of_side(side))]
    if row is not None and row.trained_on:
        sides.append((SIDES[TRAINING], row.trained_on))
    shown = []
    for number, ((side, images), figures) in enumerate(sides):
        for key, label, form, hint in _FIGURES:
            value = figures.get(key)
            if (
                isinstance(value, int | float)
                and math.isfinite(value)
                and not (
                    number and key == "n_dead"  # said once
                )
            ):
                hint_of_side = f"{hint.rstrip('.')}, of {images}."
                shown.append(Metric(f"{label}, {side}", form.format(value), hint_of_side))
    return shown + _of_all(metrics)
