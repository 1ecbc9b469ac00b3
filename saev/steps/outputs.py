"""What a step tells KFP: output parameters, pages, and the metadata of its artifacts.

KFP hands a step its executor input, a JSON text that names an output file; what the step writes
there becomes the metadata of its artifacts. For an artifact of metrics, that metadata is all there
is to it. Format: kfp/v2/executor in the KFP documentation; every artifact of the step has to be
listed, or the backend drops it.
"""

import json
import math
import typing as tp

from saev import storage
from saev.errors import ConfigError
from saev.secrets import redact

_DIGITS = 5


def write_parameter(path: str, value: tp.Any) -> None:
    """An output parameter: texts as they are, everything else as JSON. No path, no output."""
    if path:
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        storage.write_text(path, text)


def write_page(path: str, text: str) -> None:
    """A page for the UI: Markdown, or HTML in a frame that can load nothing. No path, no page."""
    if path:
        storage.write_text(path, text)


def write_metrics(executor_input: str, values: tp.Mapping[str, str | float]) -> None:
    """Attach figures to the output artifact called ``metrics``.

    Args:
        executor_input: KFP's JSON; empty writes nothing.
        values: texts and finite numbers by name; other numbers are left out. The UI shows numbers
            with all their digits, so they are rounded.

    Raises:
        ConfigError: it is not an executor input.
    """
    if not executor_input:
        return
    try:
        outputs = json.loads(executor_input)["outputs"]
        place, artifacts = outputs["outputFile"], outputs["artifacts"]
        metrics = artifacts["metrics"]["artifacts"][0]
    except (KeyError, IndexError, TypeError, ValueError) as err:
        raise ConfigError(
            "--executor-input is not what KFP gives a step with an output artifact 'metrics' "
            f"({type(err).__name__}: {err})."
        ) from err
    metrics["metadata"] = {
        key: redact(value) if isinstance(value, str) else _rounded(value)
        for key, value in values.items()
        if isinstance(value, str) or math.isfinite(value)
    }
    storage.write_text(place, json.dumps({"artifacts": artifacts}))


def _rounded(value: float) -> float:
    """A number with five significant digits; integers as they are."""
    return float(value if value == int(value) else f"{value:.{_DIGITS}g}")
