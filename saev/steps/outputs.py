"""Writes a step's outputs for KFP: parameters, pages, and the metadata of artifacts.

KFP gives a step its executor input, a JSON text that names an output file. The JSON that the step
writes into this file becomes the metadata of its artifacts. An artifact of metrics consists of its
metadata only. The file has to list every artifact of the step, or the backend drops it. The format
is that of kfp/v2/executor in the KFP documentation.
"""

import json
import math
import typing as tp

from saev import storage
from saev.errors import ConfigError
from saev.secrets import redact

_DIGITS = 5


def write_parameter(path: str, value: tp.Any) -> None:
    """Write an output parameter: a text as it is, any other value as JSON.

    An empty path writes nothing.
    """
    if path:
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        storage.write_text(path, text)


def write_page(path: str, text: str) -> None:
    """Write a page for the UI: Markdown, or HTML that loads nothing.

    An empty path writes nothing.
    """
    if path:
        storage.write_text(path, text)


def write_metrics(executor_input: str, values: tp.Mapping[str, str | float]) -> None:
    """Attach figures to the output artifact called ``metrics``.

    Args:
        executor_input: KFP's JSON; empty writes nothing.
        values: texts and numbers by name. Numbers that are not finite are left out. Numbers are
            rounded, because the UI shows all their digits.

    Raises:
        ConfigError: the text is no executor input.
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
