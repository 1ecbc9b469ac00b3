"""What is known of an SAE as a whole: its heading, its classes, its figures."""

import dataclasses
import typing as tp

from saev import storage
from saev.config.source import ActivationSource
from saev.errors import SaevError
from saev.secrets import redact
from saev.serve import columns
from saev.serve.measured import Measured
from saev.shards.protocol import METADATA, Metadata
from saev.visuals import heading

if tp.TYPE_CHECKING:
    from saev.shards import Shards


class _Recorded(tp.NamedTuple):
    """What a heading says of shards."""

    metadata: Metadata
    n_examples: int


def facts(measured: Measured) -> dict[str, tp.Any]:
    """The facts of an SAE as JSON."""
    metrics = measured.results.metrics
    classes = measured.class_list()
    held_out = columns.has_held_out(measured)
    return {
        **measured.entry.to_dict(),
        **_heading(measured),
        "warnings": [redact(text) for text in measured.results.other_model],
        "n_latents": measured.d_sae,
        "n_tokens": metrics.get("n_tokens"),
        "n_images": metrics.get("n_examples"),
        "grid": list(measured.grid),
        "metrics": {k: v for k, v in metrics.items() if _is_figure(v)},
        "figures": columns.figures(measured).columns,
        "classes": [
            {key: one[key] for key in ("class", "kind", "value", "name", "support")}
            for one in classes
        ],
        "side": "held-out images" if held_out else "all images",
        "has_held_out": held_out,
        "has_codes": measured.has_codes,
        "columns": columns.names(measured),
        "facts": measured.facts,
    }  # fmt: skip


def _heading(measured: Measured) -> dict[str, tp.Any]:
    """Title, subtitle and main figures in words."""
    metrics, run = measured.results.metrics, measured.entry.figures["run"]
    metadata = _metadata(measured.entry.figures["shards"])
    if metadata is None:
        name = measured.entry.figures["name"]
        return {"title": redact(name), "subtitle": "", "activations": "", "headline": []}
    source: ActivationSource = metadata.source(metrics.get("layer"), metrics.get("tokens"))
    recorded = tp.cast("Shards", _Recorded(metadata, metadata.n_examples))
    title, subtitle, shown = heading.of(run, measured.results, recorded, source)
    return {
        "title": redact(title),
        "subtitle": redact(subtitle),
        "activations": redact(source.described),
        "headline": [dataclasses.astuple(metric) for metric in shown],
    }


def _metadata(shards: str) -> Metadata | None:
    """What was recorded; None if the folder is gone, or damaged."""
    try:
        has = storage.exists(storage.join(shards, METADATA))
        return Metadata.read(shards) if has else None
    except SaevError:
        return None


def _is_figure(value: tp.Any) -> bool:
    return value is None or isinstance(value, int | float | str)
