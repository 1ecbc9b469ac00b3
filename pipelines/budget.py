"""How large a run is in Kubernetes, and what fits.

Argo keeps a run in one object, the Workflow, which Kubernetes limits to 1 MiB; above that, Argo
compresses the part that grows, and ends the run if this is not enough. The figures were measured
with this pipeline on Kubeflow Pipelines 2.17.0 and Argo 4.0.5 (docs/pipeline.md).
"""

import json
import typing as tp

from saev.errors import ConfigError

_FIXED = 136_000
"""Bytes of what is no iteration: specification, the steps outside loops."""
_ITERATION = 3_700
"""Bytes of an iteration of a loop, compressed."""
_CONFIG = 4
"""Bytes per byte of the config, which is stored about sixteen times, compressed."""
_MOST = 750_000
"""Bytes; what is left of 1 MiB is for pods that are started again, which are nodes of their own."""
_USUAL_DATASETS = 10
_LOOPS = 4
"""Loops over slots in the work on one dataset."""
_DATASET = 6
"""What else the work on one dataset is stored as, in iterations."""


def n_iterations(pipeline: str, values: tp.Mapping[str, tp.Any]) -> int:
    """Most iterations of all loops of a run, or what is stored like one."""
    slots = _LOOPS * values["n_parts"]
    return slots if pipeline == "saev" else values["max_datasets"] * (slots + _DATASET)


def n_bytes(pipeline: str, values: tp.Mapping[str, tp.Any]) -> int:
    """About what a run takes of Kubernetes' 1 MiB at its end."""
    config = len(json.dumps(values.get("config", {})))
    return _FIXED + _CONFIG * config + _ITERATION * n_iterations(pipeline, values)


def check(pipeline: str, values: tp.Mapping[str, tp.Any]) -> None:
    """Raise ConfigError if a run could become too large.

    Args:
        pipeline: its name.
        values: its parameters, among them n_parts and, of saev-incoming, max_datasets.
    """
    if n_bytes(pipeline, values) <= _MOST:
        return
    names = ["n_parts"] if pipeline == "saev" else ["n_parts", "max_datasets"]
    given = " and ".join(f"{name} = {values[name]}" for name in names)
    fitting = [f"{name} = {most}" for name in names if (most := _most(pipeline, values, name))]
    remedy = f"What fits is {' or '.join(fitting)}." if fitting else "Split the sweep."
    raise ConfigError(
        f"With {given}, the loops of a run may have {n_iterations(pipeline, values)} iterations. "
        f"Such a run is about {n_bytes(pipeline, values) / 1e3:.0f} kB in Kubernetes, which holds "
        f"1 MiB; {_MOST // 1000} kB leaves room for retries. Argo ends a run that is too large. "
        f"{remedy} A pod does several parts one after the other."
    )


def usual_datasets(values: tp.Mapping[str, tp.Any]) -> int:
    """max_datasets where nobody sets it: as many as fit beside n_parts, at least 1, at most 10."""
    return _most("saev-incoming", {**values, "max_datasets": _USUAL_DATASETS}, "max_datasets") or 1


def _most(pipeline: str, values: tp.Mapping[str, tp.Any], name: str) -> int:
    """The largest value of one parameter that fits beside the others; 0 if none does."""
    smaller = range(values[name], 0, -1)
    fits = (n for n in smaller if n_bytes(pipeline, {**values, name: n}) <= _MOST)
    return next(fits, 0)
