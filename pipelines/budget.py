"""Estimates how large a run becomes in Kubernetes, and refuses runs that are too large.

Argo keeps a run in one object, the Workflow. Kubernetes limits objects to 1 MiB. Above that, Argo
compresses the part that grows. Kubeflow 2.17 cannot read the compressed part, so it shows old
states of the steps. The figures were measured with this pipeline on Kubeflow Pipelines 2.17.0 and
Argo 4.0.5 (docs/pipeline.md). `make conformance` measures them again.
"""

import json
import re
import typing as tp

from pipelines.definition import Compiled
from saev.errors import ConfigError

MOST = 900_000
"""Most bytes of JSON. The rest of 1 MiB is left for pods that are started again, 4 to 6 kB each."""

_RUN = 285_000
"""Bytes of the parts that every run has once: specification, loops, and steps outside of loops."""
_SLOT = 105_000
"""Bytes of one slot of each of the loops over extract, train and infer."""
_SUMMARY = 41_000
"""Bytes of one slot of summarise, which has half as many slots."""
_ROOT, _IMAGE = 43, 11
"""Characters of the storage root's URL and of the image's name in the measured runs."""
_LOOPS, _STEPS = 3, 5
"""Loops over slots, without summarise, and steps outside of loops."""
_PATCHES, _DRIVERS = 6, 2
"""How often the backend stores a pod's patch, and how often the input of the pod's driver. A patch
contains the root twice: as the step's argument, and in KFP's own list of inputs."""

FOR_MORE = 'For more pods, set launch = "job" in cluster.toml, under [compile].'
"""The remedy if a run needs more pods than its Workflow can hold."""


def n_bytes(pipeline: Compiled, values: tp.Mapping[str, tp.Any]) -> int:
    """About how many bytes of Kubernetes' 1 MiB a run takes at its end, when it is largest.

    Args:
        pipeline: the pipeline of the run.
        values: its parameters, including n_parts.
    """
    # The pods of a Job are no part of the Workflow. Only the step that launches them is.
    n_parts = 1 if pipeline.is_launched else int(values["n_parts"])
    n_summaries = max(1, n_parts // 2)
    size = _RUN + n_parts * _SLOT + n_summaries * _SUMMARY
    n_pods = _STEPS + n_parts * _LOOPS + n_summaries
    images = re.findall(r"^ +image: (\S+)$", pipeline.text, re.MULTILINE)
    longer = 2 * _PATCHES * (len(str(values.get("root", ""))) - _ROOT)
    longer += (_PATCHES + _DRIVERS) * (max(map(len, images)) - _IMAGE)
    return size + n_pods * longer + _of_config(values.get("config", {}))


def _of_config(config: tp.Any) -> int:
    """Bytes of the config. Patches contain it twelve times, as JSON in JSON, other parts three
    times."""
    once = json.dumps(json.dumps(config, separators=(",", ":")))
    return 2 * _PATCHES * len(json.dumps(once)) + 3 * len(once)


def most_parts(pipeline: Compiled, values: tp.Mapping[str, tp.Any]) -> int:
    """The largest n_parts that fits; 0 if none does. The arguments are those of :func:`n_bytes`."""
    smaller = range(MOST // _SLOT, 0, -1)
    fits = (n for n in smaller if n_bytes(pipeline, {**values, "n_parts": n}) <= MOST)
    return next(fits, 0)


def check(pipeline: Compiled, values: tp.Mapping[str, tp.Any]) -> None:
    """Raise ConfigError if a run could become too large. Arguments are as in :func:`n_bytes`."""
    size = n_bytes(pipeline, values)
    if size <= MOST:
        return
    most = most_parts(pipeline, values)
    fits = f"n_parts = {most} fits: a pod does several parts one after the other."
    remedy = fits if most else "Split the sweep into several runs."
    more = "" if pipeline.is_launched else f" {FOR_MORE}"
    raise ConfigError(
        f"With n_parts = {values['n_parts']}, a run may take {size / 1e3:.0f} kB in Kubernetes, "
        f"which keeps it in one object of 1 MiB; {MOST // 1000} kB leave room for retries. "
        f"{remedy}{more}"
    )
