"""A pipeline of two steps that meets faults, with the pod settings of the product's steps."""

import tempfile
import warnings
from pathlib import Path

from kfp import compiler, dsl

from components import GPU_IMAGE
from conformance.inside import code
from pipelines import definition, prepare
from pipelines.compact import compact
from pipelines.options import CompileOptions
from pipelines.settings import Settings
from saev.launch.pods import SUPERVISOR

FIRST, SECOND = "extract", "infer"
"""The steps of the product whose pods' settings, label and time limit the two have."""


@dsl.container_component
def first(fault: str, folder: str, given: dsl.OutputPath(str)):  # type: ignore[valid-type]
    """Meet a fault, and succeed when started again."""
    return dsl.ContainerSpec(
        image=GPU_IMAGE,
        command=[*SUPERVISOR, "--", "python", "-c", code("probe")],
        args=[fault, folder, given],
    )


@dsl.container_component
def second(given: str):
    """Say what the first step gave."""
    return dsl.ContainerSpec(
        image=GPU_IMAGE,
        command=[*SUPERVISOR, "--", "python", "-c", code("second")],
        args=[given],
    )


def compiled(settings: Settings) -> str:
    """The probe for a cluster: small pods, on the CPU, else as `cluster.toml` says."""
    image = settings.cpu_image or settings.image
    small = {"gpu_count": "0", "train_gpus": "0", "cpu": "250m", "memory": "512Mi"}
    constants = {"storage": settings.storage, **settings.compile}
    constants |= {"image": image, "cpu_image": image, "pods": prepare.pods(settings, small)}
    options = CompileOptions.from_dict(constants, source="cluster.toml [compile]")

    @dsl.pipeline(name="saev-conformance-probe")
    def probe(fault: str, folder: str) -> None:
        graph = definition.Graph(options)
        task = graph.pod(first(fault=fault, folder=folder), FIRST, gpus="0")
        graph.pod(second(given=task.outputs["given"]), SECOND, gpus="0")

    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(temporary, "probe.yaml")
        compiler.Compiler().compile(probe, str(path))
        return compact(path.read_text(encoding="utf-8"))
