"""What the page of all SAEs says of each: figures, config, curves."""

import contextlib
import json
import math
import typing as tp

from saev import names, storage
from saev.errors import SaevError
from saev.inference.results import Results
from saev.secrets import redact
from saev.visuals.rows import SIDES, Figures, Row

MAX_POINTS = 200
"""Points of a curve."""


def of(run: str, results: Results) -> dict[str, tp.Any]:
    """Name, figures, config and curves of one SAE, as JSON.

    Args:
        run: URL of the run folder; of one that was imported, there is no config and no curve.
        results: what inference measured.
    """
    row = None
    with contextlib.suppress(SaevError):
        row = Row.find(run)
    if row is None:
        found, side, config, title = Figures.of(results.metrics), "", {}, storage.name(run)
    else:
        row = row.on(results)
        found, side = row.headline, SIDES[row.side].images
        config, title = dict(_flat(row.config.to_dict())), names.of([row.config])[0]
    figures: dict[str, float | None] = {
        **found._asdict(),
        "dense_share": results.metrics.get("dense_share"),
        "d_sae": results.d_sae,
    }
    return {
        "title": redact(title),
        "figures": {k: v for k, v in figures.items() if v is not None and math.isfinite(v)},
        "side": side,
        "config": config,
        "curves": _curves(run),
    }


def _flat(config: tp.Mapping[str, tp.Any], prefix: str = "") -> tp.Iterator[tuple[str, str]]:
    """Entries of a config under dotted keys, as text."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, redact(value if isinstance(value, str) else json.dumps(value))


def _curves(run: str) -> dict[str, list[list[float]]]:
    """Steps and values by name; empty if there are none, or if they are damaged."""
    place = storage.join(run, "metrics.jsonl")
    curves: dict[str, list[list[float]]] = {}
    with contextlib.suppress(SaevError, ValueError, KeyError, TypeError):
        rows = [json.loads(line) for line in storage.read_bytes(place).splitlines()]
        for name in dict.fromkeys(key for row in rows for key in row if key != "step"):
            known = [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]
            if len(known) > 1:
                few = known[:: -(-len(known) // MAX_POINTS)]
                curves[name] = [[step for step, _ in few], [_short(v) for _, v in few]]
    return curves


def _is_number(value: tp.Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(value: float) -> float:
    """Four digits: more cannot be seen in a curve."""
    return float(f"{value:.4g}")
