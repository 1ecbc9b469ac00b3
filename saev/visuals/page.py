"""The report: one static HTML file over the pictures, which works from a disk without a server.

It loads nothing but the pictures beside it: style and script are inside it, and its content
security policy forbids everything else, including scripts that a hostile label might bring.
"""

import base64
import collections
import dataclasses
import functools
import hashlib
import importlib.resources
import math
import typing as tp

import jinja2
import markupsafe
import numpy as np
from jaxtyping import Float

from saev.visuals import pages, render
from saev.visuals.records import Histogram, LatentRecord, folder_name

FREQUENCY_BINS = 48
MAX_LEGEND = 8
"""Classes named under a picture."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number of the page's header."""

    label: str
    text: str
    hint: str
    """What it means, in a sentence."""


FIGURES: tuple[tuple[str, str, str, str], ...] = (
    ("normalized_mse", "NMSE", "{:.4f}", "Squared error over the variance; 0 is perfect."),
    ("l0", "L0", "{:.1f}", "Latents that fire per token, on average."),
    ("n_dead", "Dead", "{:,.0f}", "Latents that never fire."),
)
"""Of one side: of held-out images, or of those of training."""
_METRICS: tuple[tuple[str, str, str, str], ...] = (
    ("d_sae", "Latents", "{:,.0f}", "Size of the dictionary."),
    (
        "dense_share", "Dense (> 10 × mean)", "{:.1%}",
        "Share of the latents that fire more than ten times as often as the mean of all latents "
        "(L0 ÷ number of latents), or on more than half of the tokens.",
    ),
    ("n_tokens", "Tokens", "{:,.0f}", "Tokens that this page's pictures were chosen from."),
)  # fmt: skip


def metrics(raw: tp.Mapping[str, tp.Any]) -> list[Metric]:
    """The header's numbers, as far as `raw` (an inference's metrics.json) has them."""
    shown = []
    for key, label, form, hint in _METRICS:
        value = raw.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            shown.append(Metric(label, form.format(value), hint))
    return shown


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that the page shows besides the pictures."""

    title: str
    subtitle: str
    metrics: tp.Sequence[Metric]
    records: tp.Sequence[LatentRecord]
    explicit: frozenset[int]
    """Latents that were asked for by number."""
    frequency: Float[np.ndarray, " d_sae"]
    other_model: tp.Sequence[str] = ()
    """How the activations differ from those that the SAE was trained on; shown as a warning."""
    activations: str = ""
    """What the activations are, in words, shown below everything."""
    note: str = ""
    """Shown above the latents, for example why there are few."""
    home: str = ""
    """Link to the page of all SAEs; "" if there is none."""


def build(report: Report, source: tp.Callable[[str], str] = str) -> str:
    """The HTML text of a report.

    Args:
        report: what it shows.
        source: where a picture is, from its path in the report's folder.
    """
    frequencies = _log_frequencies(report.frequency)
    script, style = _template_text("report.js"), _template_text("report.css")
    latents = [_latent(r, r.latent in report.explicit, frequencies) for r in report.records]
    classes = {c.label: c.name for r in report.records for e in r.examples for c in e.classes}
    return _environment().get_template("report.html").render(
        report=report,
        source=source,
        latents=latents,
        has_classes=any(e.segmentation for r in report.records for e in r.examples),
        n_classes=len(classes),
        frequencies=frequencies,
        frequency_bars=_bars(frequencies),
        ticks=_ticks(frequencies),
        scale=[render.hex_colour(c) for c in render.colours(np.linspace(0, 1, 9))],
        script=markupsafe.Markup(script),
        style=markupsafe.Markup(style + _class_style(classes)),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


# --- What the template shows ---------------------------------------------------------------


def _latent(
    record: LatentRecord, explicit: bool, frequencies: Histogram | None
) -> dict[str, tp.Any]:
    names = [e.firing_label or e.label for e in record.examples]
    counted = collections.Counter(name for name in names if name)
    top = sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))[:4]
    position = None
    if frequencies is not None and not record.dead:
        span = frequencies.high - frequencies.low
        position = 100 * (math.log10(record.frequency) - frequencies.low) / span
    return {
        "record": record,
        "id": record.latent,
        "explicit": explicit,
        "folder": folder_name(record.latent),
        "top_labels": top,
        "search": " ".join([str(record.latent), *sorted(counted)]).lower(),
        "position": position,
        "value_bars": _bars(record.values) if record.values else "",
    }


def _log_frequencies(frequency: np.ndarray) -> Histogram | None:
    """Histogram of log10(frequency) of the living latents; None if there are none."""
    alive = np.log10(frequency[frequency > 0])
    if not len(alive):
        return None
    low, high = math.floor(alive.min()), max(math.ceil(alive.max()), math.floor(alive.min()) + 1)
    counts, _ = np.histogram(alive, bins=FREQUENCY_BINS, range=(low, high))
    return Histogram(low=low, high=high, counts=tuple(int(c) for c in counts), source="latents")


def _bars(histogram: Histogram | None) -> str:
    """A histogram as the path of an SVG whose view box is 100 wide and 40 high.

    Heights go with the square root of the count, so that single latents stay visible beside
    hundreds.
    """
    if histogram is None or not any(histogram.counts):
        return ""
    heights = np.sqrt(np.asarray(histogram.counts, dtype=np.float64))
    heights *= 38 / heights.max()
    width = 100 / len(heights)
    return "".join(
        f"M{i * width:.2f} 40V{40 - max(h, 1.0):.2f}h{width * 0.86:.2f}V40Z"
        for i, h in enumerate(heights)
        if h
    )


def _ticks(histogram: Histogram | None) -> list[tuple[float, str]]:
    """Position in percent and power of ten of the labels under the histogram of frequencies."""
    if histogram is None:
        return []
    low, high = round(histogram.low), round(histogram.high)
    step = max(1, math.ceil((high - low) / 6))
    return [(100 * (p - low) / (high - low), str(p)) for p in range(low, high + 1, step)]


def _class_style(classes: tp.Mapping[int, str]) -> str:
    """One rule per class, so that the markup needs no style attribute."""
    rules = (
        f".c{label}{{--c:{render.hex_colour(render.class_colour(label))}}}"
        for label in sorted(classes)
    )
    return "\n" + "".join(rules)


def number(value: float | None) -> str:
    """Three significant digits, without an exponent where a person would not write one."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{digits}f}"
    return f"{value:.1e}"


def percent(value: float) -> str:
    """A share as a percentage with three significant digits."""
    return f"{number(100 * value)}%"


# --- Templates -----------------------------------------------------------------------------


@functools.cache
def _environment() -> jinja2.Environment:
    environment = pages.environment()
    environment.filters["number"] = number
    environment.filters["percent"] = percent
    environment.globals["max_legend"] = MAX_LEGEND
    return environment


def _template_text(name: str) -> str:
    return importlib.resources.files("saev.visuals").joinpath("templates", name).read_text("utf-8")
