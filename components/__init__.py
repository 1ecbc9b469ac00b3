"""KFP components, one for each step of `saev step …`, made from the steps' configs.

Each flag of a step is an input of its component, with the same name. A flag ``to_…`` names a file
that the step writes, and is an output. So a new input needs only a new flag in `saev.config.steps`.

A step gets the URL of its job and the number of its slot, and looks up everything else in storage
(`saev.steps.jobs`). Inputs are few, because Kubernetes repeats each input of each pod about ten
times in the object that it keeps of a run. Activations and checkpoints never become artifacts,
because KFP's launcher would copy them. A step's artifacts are its metrics, and pages for people.

The images named here are placeholders. `pipelines.definition` replaces them by the images that a
pipeline is compiled for.
"""

import collections.abc
import inspect
import typing as tp

from kfp import dsl
from kfp.dsl import base_component

from saev.config.steps import SMALL, STEPS
from saev.launch.pods import SUPERVISOR

GPU_IMAGE = "saev"
"""The runtime image: torch and all of saev."""
CPU_IMAGE = "saev-cpu"
"""The small image, for steps that read listings, JSON and pictures. It has no torch."""

_EXECUTOR_INPUT = "executor_input"
"""The flag for KFP's description of a step's inputs and outputs, which says where metrics go. It is
no input: KFP fills in the value for a placeholder."""
_TYPES: dict[str, tp.Any] = {
    "config": dict, "claim": dict, "start": dict, "status": dsl.PipelineTaskFinalStatus,
}  # fmt: skip
"""Flags that take JSON text, and their KFP types. Other flags have the type of the config."""
_TEXTS = ("to_job",)
"""Files that contain one text. Other files contain a JSON list of texts. The items must be texts,
because the compiler declares the items of a list as texts, and the backend checks the type."""
_PAGES: dict[tuple[str, str], tuple[str, type[dsl.Artifact]]] = {
    ("summarise", "to_page"): ("picture_book", dsl.HTML),
    ("report", "to_page"): ("sae_overview", dsl.HTML),
    ("report", "to_table"): ("sae_table", dsl.Markdown),
}
"""Files that Kubeflow's UI shows: (step, flag) → name and type of the artifact."""


def component(
    step: str,
    *,
    inputs: collections.abc.Container[str] | None = None,
    constants: tp.Mapping[str, tp.Any] | None = None,
    called: str = "",
) -> base_component.BaseComponent:
    """The component of a step.

    Args:
        step: the step, a key of `saev.config.steps.STEPS`.
        inputs: the flags that become inputs; by default all.
        constants: flag → value that is compiled into the pipeline.
        called: name of the component; by default the step's name.
    """
    cfg = STEPS[step]
    constants = constants or {}
    parameters: list[inspect.Parameter] = []
    named: dict[str, str] = {}
    no_inputs = {_EXECUTOR_INPUT, *constants}
    for flag, field in cfg.model_fields.items():
        if flag in no_inputs or (inputs is not None and flag not in inputs):
            continue
        if (step, flag) in _PAGES:
            named[flag], artifact = _PAGES[step, flag]
            kind: tp.Any = dsl.Output[artifact]  # type: ignore[valid-type] # a value of kfp's
        elif flag.startswith("to_"):
            named[flag] = flag.removeprefix("to_")
            kind = dsl.OutputPath(str if flag in _TEXTS else list)
        else:
            named[flag] = flag
            kind = _TYPES.get(flag, field.annotation)
        parameters.append(
            inspect.Parameter(named[flag], inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        )
    has_metrics = _EXECUTOR_INPUT in cfg.model_fields
    if has_metrics:
        metrics = inspect.Parameter(
            "metrics", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=dsl.Output[dsl.Metrics]
        )
        parameters.append(metrics)

    def run(*arguments: tp.Any) -> dsl.ContainerSpec:
        given = dict(zip((parameter.name for parameter in parameters), arguments, strict=True))
        values = {flag: given[name] for flag, name in named.items()}
        values |= {flag: given[named[flag]].path for of, flag in _PAGES if of == step}
        if has_metrics:
            values[_EXECUTOR_INPUT] = "{{$}}"
        words = [
            word
            for flag, value in {**values, **constants}.items()
            for word in (f"--{flag.replace('_', '-')}", value)
        ]
        image = CPU_IMAGE if step in SMALL else GPU_IMAGE
        return dsl.ContainerSpec(image=image, command=[*SUPERVISOR, "step", step], args=words)

    run.__name__ = called or step  # kfp takes the component's name from it
    run.__doc__ = cfg.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return dsl.container_component(run)
