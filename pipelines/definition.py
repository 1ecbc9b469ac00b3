"""Defines and compiles the pipelines.

    saev            discover → plan → extract × slots → publish → train × slots → infer × slots
                    → summarise × slots → report
    saev-incoming   fire, which starts a run of saev for each new dataset below a prefix

A loop runs over the slots that an earlier step planned. There are at most ``n_parts`` slots,
however much work there is. If all work is done, the list is empty, and the loop starts no pods.
KFP's cache is switched off, because it does not look at storage. Every step itself finds in storage
what is done.
"""

import collections.abc
import contextlib
import hashlib
import json
import tempfile
import typing as tp
import warnings
from pathlib import Path

import yaml
from kfp import compiler, dsl, kubernetes
from kfp.dsl import base_component, pipeline_task

from components import component
from pipelines import kfp_pods
from pipelines.compact import LOADER, compact
from pipelines.options import CompileOptions, PipelineName
from saev.config.steps import SMALL
from saev.launch.pods import SUPERVISOR, PodParameters, PodSettings

KILL_COMMAND = (
    "workflows.argoproj.io/kill-cmd-main",
    json.dumps([*SUPERVISOR, "--signal", "%d"], separators=(",", ":")),
)
"""The annotation with the command by which Argo stops a step. By default, Argo signals process 1.
This ends its child, KFP's launcher, and the step with it."""

_RETRIES = CompileOptions.model_fields["retries"].default
"""The supervisor's number of retries if its environment does not set one."""
JOBS, TRAIN_JOBS = "jobs", "trainjobs"
"""The objects that launching steps make in Kubernetes, as `saev step outcome` names them."""
_FOREVER = "315360000s"
"""Ten years. A step that launches pods may wait for a queue, and its pods have their own limits."""

Channel = tp.Any
"""A value that is known only when the pipeline runs."""


class Parameter(tp.NamedTuple):
    """One parameter of a compiled pipeline."""

    kind: str
    """STRING, NUMBER_INTEGER, NUMBER_DOUBLE, BOOLEAN, LIST or STRUCT."""
    default: tp.Any
    required: bool
    description: str


class Compiled(tp.NamedTuple):
    """A pipeline as it is uploaded."""

    name: str
    text: str
    """YAML: the pipeline's specification and the Kubernetes part of it."""
    digest: str
    """Twelve hex digits of the text's SHA-256: equal pipelines are one version."""
    parameters: dict[str, Parameter]
    is_launched: bool
    """Whether slots are pods of Jobs. These do not make the run's Workflow larger."""


def compile_pipeline(name: PipelineName, options: CompileOptions) -> Compiled:
    """Compile one of the pipelines.

    Args:
        name: its name.
        options: its constants.
    """
    pipeline = build(name, options)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder, "pipeline.yaml")
        compiler.Compiler().compile(pipeline, str(path))
        text = compact(path.read_text(encoding="utf-8"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    # Training on several machines is always a loop. Its pods launch TrainJobs and wait for them.
    is_launched = options.launch == "job" and int(options.pods.train_nodes) == 1
    return Compiled(name, text, digest, _parameters(text), is_launched)


def build(name: PipelineName, options: CompileOptions) -> base_component.BaseComponent:
    """A pipeline that is not compiled. With `kfp.local`, a call runs it."""
    return {"saev": _one, "saev-incoming": _incoming}[name](options)


@contextlib.contextmanager
def _quiet() -> collections.abc.Iterator[None]:
    """Suppress kfp's warnings, which do not concern a compiled pipeline."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _parameters(text: str) -> dict[str, Parameter]:
    spec = next(yaml.load_all(text, LOADER))
    found = spec["root"]["inputDefinitions"]["parameters"]
    return {
        name: Parameter(
            raw["parameterType"],
            raw.get("defaultValue"),
            not raw.get("isOptional", False) and "defaultValue" not in raw,
            " ".join(raw.get("description", "").split()),
        )
        for name, raw in found.items()
    }


# --- The two pipelines -------------------------------------------------------------------------


def _one(options: CompileOptions) -> base_component.BaseComponent:
    @dsl.pipeline(
        name="saev",
        description="Images → activations → sparse autoencoders → metrics and picture books.",
    )
    def saev(
        root: str,
        config: dict,
        dataset: str = "",
        n_parts: int = 4,
        claim_hours: float = 24.0,
        claim: dict = {},  # noqa: B006
    ) -> None:
        """Process one dataset.

        Args:
            root: URL of the storage root, such as s3://bucket/saev or /data/saev on a volume.
            config: what `saev run --config` takes, as JSON, with its sweep in the table `sweep`.
            dataset: URL of the folder of images; empty takes the config's [data] as it is.
            n_parts: most pods of each step; a pod does several parts one after the other.
            claim_hours: how long a dataset stays claimed when its run is not heard of any more.
            claim: what the firing of a schedule that started this run has claimed for it.
        """
        graph = Graph(options)
        with dsl.ExitHandler(graph.outcome(root), name="pipeline"):
            task = component("discover")(
                root=root,
                config=config,
                owner=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
                dataset=dataset,
                claim=claim,
                claim_hours=claim_hours,
            )
            graph.process(graph.pod(task, "discover").outputs["job"], n_parts)

    return saev


def _incoming(options: CompileOptions) -> base_component.BaseComponent:
    @dsl.pipeline(
        name="saev-incoming",
        description="Start a run of saev for every complete and new dataset below a prefix.",
    )
    def saev_incoming(
        dataset: str,
        root: str,
        config: dict,
        start: dict = {},  # noqa: B006 - KFP reads it
        marker: str = "",
        settle_minutes: float = 60.0,
        claim_hours: float = 24.0,
        max_datasets: int = 4,
        max_retries: int = 2,
    ) -> list:
        """Start what is new below a prefix.

        Args:
            dataset: URL of the folder whose folders are the datasets.
            root: URL of the storage root, such as s3://bucket/saev or /data/saev on a volume.
            config: what `saev run --config` takes, as JSON, with its sweep in the table `sweep`.
            start: what is started for each dataset, and where; `make schedule` fills it in.
            marker: name of the object that a writer puts into a dataset last, such as _SUCCESS;
                empty goes by settle_minutes.
            settle_minutes: a dataset is complete when nothing in it has changed for so long.
            claim_hours: how long a dataset stays claimed when its run is not heard of any more.
            max_datasets: most runs of datasets that are unfinished at a time; others wait.
            max_retries: how often later firings retry a run whose pods were lost or that failed
                for a reason that may pass.
        """
        task = component("fire")(
            dataset=dataset,
            root=root,
            config=config,
            owner=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            marker=marker,
            settle_minutes=settle_minutes,
            claim_hours=claim_hours,
            max_datasets=max_datasets,
            max_retries=max_retries,
            start=start,
        )
        return Graph(options).pod(task, "fire").outputs["runs"]

    return saev_incoming


# --- Their steps -------------------------------------------------------------------------------


class Graph:
    """Makes the steps of one pipeline, with the settings of their pods."""

    def __init__(self, options: CompileOptions):
        self._options = options

    def outcome(self, root: Channel) -> pipeline_task.PipelineTask:
        """The last step. It also runs if another step fails."""
        launched = [JOBS] if self._options.launch == "job" else []
        if int(self._options.pods.train_nodes) > 1:
            launched.append(TRAIN_JOBS)
        task = component("outcome")(
            root=root, owner=dsl.PIPELINE_JOB_ID_PLACEHOLDER, launched=",".join(launched)
        )
        return self.pod(task, "outcome")

    def process(self, job: Channel, n_parts: Channel) -> None:
        """All steps that process one dataset."""
        pods = self._options.pods
        planned = self.pod(component("plan")(job=job, n_parts=n_parts), "plan")
        extracted = self._slots("extract", job, planned, gpus=pods.gpu_count)
        task = component("publish")(job=job, n_parts=n_parts).after(extracted)
        published = self.pod(task, "publish")
        trained = self._slots("train", job, published, gpus=pods.train_gpus)
        inferred = self._slots("infer", job, published, trained, gpus=pods.gpu_count)
        summarised = self._slots("summarise", job, published, inferred)
        self.pod(component("report")(job=job).after(summarised), "report")

    def _slots(
        self,
        step: str,
        job: Channel,
        planned: pipeline_task.PipelineTask,
        *after: pipeline_task.PipelineTask,
        gpus: str = "",
    ) -> pipeline_task.PipelineTask:
        """All planned slots of a step."""
        options = self._options
        machines = int(options.pods.train_nodes) if step == "train" else 1
        if options.launch == "job" and machines == 1:
            make = self._launcher(step, gpus, parallelism=str(options.parallelism))
            return self.pod(make(job=job).after(planned, *after), step, launches=True)
        with dsl.ParallelFor(
            planned.outputs[step], name=f"{step}-all", parallelism=options.parallelism
        ) as slot:
            if machines > 1:
                make = self._launcher(step, gpus, machines=str(machines))
                return self.pod(make(job=job, slot=slot).after(*after), step, launches=True)
            task = component(step)(job=job, slot=slot).after(*after)
            return self.pod(task, step, gpus=gpus)

    def _launcher(self, step: str, gpus: str, **constants: str) -> base_component.BaseComponent:
        """A component with a step's name that makes pods for the step's slots."""
        settings = self._settings(step, gpus).model_dump()
        constants |= {"step": step, "pods": json.dumps(settings, separators=(",", ":"))}
        if self._options.pods.queue:
            constants["queue"] = self._options.pods.queue
        inputs = ("job", "slot") if "machines" in constants else ("job",)
        return component("launch", inputs=inputs, constants=constants, called=step)

    def _settings(self, step: str, gpus: str, *, launches: bool = False) -> PodSettings:
        """The settings of a step's pods. The arguments are those of :meth:`pod`."""
        options = self._options
        is_small = launches or step in SMALL
        return PodSettings(
            **{name: getattr(options.pods, name) for name in PodParameters.model_fields},
            step=step,
            image=options.cpu_image if is_small else options.image,
            gpus=int(gpus) if gpus else None,
            is_small=is_small,
            mounts_volume=options.storage == "pvc",
            timeout_seconds=options.timeout_seconds(step),
            retries=options.retries,
            shm_size=options.shm_size,
        )

    def pod(
        self,
        task: pipeline_task.PipelineTask,
        step: str,
        *,
        gpus: str = "",
        launches: bool = False,
    ) -> pipeline_task.PipelineTask:
        """Set image, resources, storage, labels, time limit and retries of a step's pod.

        Args:
            task: the step.
            step: its name.
            gpus: number of GPUs of a GPU pod, which may be "0"; "" makes a pod of the other kind.
            launches: whether the pod makes other pods and waits for them.
        """
        options = self._options
        settings = self._settings(step, gpus, launches=launches)
        kfp_pods.apply_template(task, settings)
        task.set_caching_options(False)
        if options.retries:
            # Argo does not retry after this time, which begins with the first attempt. With kfp's
            # default of one hour, a step that is evicted after two hours would not be run again.
            whole = (options.retries + 1) * (settings.timeout_seconds + 3600)
            task.set_retry(
                options.retries,
                backoff_duration="30s",
                backoff_factor=2.0,
                backoff_max_duration=_FOREVER if launches else f"{whole}s",
            )
        if not launches:
            kubernetes.set_timeout(task, settings.timeout_seconds)
        kubernetes.add_pod_annotation(task, *KILL_COMMAND)
        if options.retries != _RETRIES:
            task.set_env_variable("SAEV_RETRIES", str(options.retries))
        return task
