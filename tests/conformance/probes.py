"""A pipeline of two steps that meets faults, with the pod settings of the product's steps."""

import tempfile
import typing as tp
import warnings
from pathlib import Path

from kfp import compiler, dsl

from components.step import GPU_IMAGE, SUPERVISOR
from conformance.inside import code
from pipelines import definition, prepare
from pipelines.options import CompileOptions
from pipelines.settings import Settings

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


class Pipeline(tp.NamedTuple):
    """The compiled probe."""

    text: str
    values: dict[str, tp.Any]
    """Parameters of a run: small, on the CPU, else as `cluster.toml` says. Fault and folder
    are missing."""


def compiled(settings: Settings) -> Pipeline:
    """The probe for a cluster."""
    image = settings.cpu_image or settings.image
    constants = {"storage": settings.storage, **settings.compile}
    options = CompileOptions.from_dict(
        {**constants, "image": image, "cpu_image": image}, source="cluster.toml [compile]"
    )

    @dsl.pipeline(name="saev-conformance-probe")
    def probe(
        fault: str,
        folder: str,
        gpu_type: str,
        gpu_count: str,
        train_gpus: str,
        cpu: str,
        memory: str,
        node_selector: dict,
        tolerations: list,
        storage_secret: str,
        config_map: str,
        pvc_name: str,
        image_pull_secret: str,
    ) -> None:
        pods = definition.Settings(
            gpu_type, gpu_count, train_gpus, cpu, memory, node_selector, tolerations,
            storage_secret, config_map, pvc_name, image_pull_secret,
        )  # fmt: skip
        graph = definition._Graph(options, pods)
        task = graph._pod(first(fault=fault, folder=folder), FIRST, gpus=pods.gpu_count)
        graph._pod(second(given=task.outputs["given"]), SECOND, gpus=pods.gpu_count)

    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(temporary, "probe.yaml")
        compiler.Compiler().compile(probe, str(path))
        text = path.read_text(encoding="utf-8")
    usual = prepare.compiled("saev", settings).parameters
    found = {name: usual[name].default for name in definition.Settings._fields}
    found |= {key: value for key, value in settings.parameters.items() if key in found}
    found |= {"gpu_count": "0", "train_gpus": "0", "cpu": "250m", "memory": "512Mi"}
    return Pipeline(text, found)
