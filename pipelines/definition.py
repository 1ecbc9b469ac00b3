"""The pipelines, and how they are compiled.

    saev            discover → plan → extract × slots → publish → train × slots → infer × slots
                    → summarise × slots → report
    saev-incoming   discover → the same for each new dataset below a prefix

A loop runs over the slots that a step before it planned, of which there are at most ``n_parts``
however much there is to do; an empty list is a loop of no pods, which is how work that is done
already costs nothing. Nothing is cached by KFP: every step looks at storage, which the cache does
not, and finds there by itself what is done.
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

import components
from components.step import CPU_IMAGE, SUPERVISOR
from pipelines.compact import compact
from pipelines.options import CompileOptions, PipelineName

GPU_TOLERATIONS = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]

STORAGE_SECRET = "saev-storage"
CONFIG_MAP = "saev-config"
PVC_NAME = "saev-data"
IMAGE_PULL_SECRET = "saev-registry"
DATA_MOUNT = "/data"

SECRET_ENV = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
CONFIG_ENV = (
    "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE",
    "HF_ENDPOINT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "SAEV_LOG_LEVEL",
)  # fmt: skip
"""Keys of the secret and of the config map that become environment of the steps. All may be
missing: on AWS, the service account's role brings credentials of its own."""

LABELS = {"app.kubernetes.io/name": "saev", "app.kubernetes.io/part-of": "saev"}

KILL_COMMAND = (
    "workflows.argoproj.io/kill-cmd-main",
    json.dumps([*SUPERVISOR, "--signal", "%d"]),
)
"""How Argo stops a step. By default it signals process 1, whose child, KFP's launcher, dies of it
and takes the step with it."""

Channel = tp.Any
"""A value that is known when the pipeline runs."""


class Settings(tp.NamedTuple):
    """The parameters of a run that say how its pods are made."""

    gpu_type: Channel
    gpu_count: Channel
    train_gpus: Channel
    cpu: Channel
    memory: Channel
    node_selector: Channel
    tolerations: Channel
    storage_secret: Channel
    config_map: Channel
    pvc_name: Channel
    image_pull_secret: Channel


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


def compile_pipeline(name: PipelineName, options: CompileOptions) -> Compiled:
    """Compile one of the pipelines.

    Args:
        name: which one.
        options: its constants.
    """
    pipeline = build(name, options)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder, "pipeline.yaml")
        compiler.Compiler().compile(pipeline, str(path))
        text = compact(path.read_text(encoding="utf-8"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Compiled(name, text, digest, _parameters(text))


def build(name: PipelineName, options: CompileOptions) -> base_component.BaseComponent:
    """A pipeline that is not compiled: under `kfp.local`, a call of it runs it."""
    return {"saev": _one, "saev-incoming": _incoming}[name](options)


@contextlib.contextmanager
def _quiet() -> collections.abc.Iterator[None]:
    """Without kfp's warnings of what a compiled pipeline does not concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _parameters(text: str) -> dict[str, Parameter]:
    spec = next(yaml.safe_load_all(text))
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
        n_parts: int = 8,
        gpu_type: str = "nvidia.com/gpu",
        gpu_count: str = "1",
        train_gpus: str = "1",
        cpu: str = "4",
        memory: str = "32Gi",
        node_selector: dict = {},  # noqa: B006 - KFP reads it
        tolerations: list = GPU_TOLERATIONS,
        storage_secret: str = STORAGE_SECRET,
        config_map: str = CONFIG_MAP,
        pvc_name: str = PVC_NAME,
        image_pull_secret: str = IMAGE_PULL_SECRET,
        claim_hours: float = 24.0,
    ) -> None:
        """Process one dataset.

        Args:
            root: URL of the storage root, such as s3://bucket/saev or /data/saev on a volume.
            config: what `saev run --config` takes, as JSON, with its sweep in the table `sweep`.
            dataset: URL of the folder of images; empty takes the config's [data] as it is.
            n_parts: most pods of each step; a pod does several parts one after the other.
            gpu_type: resource name of the GPUs.
            gpu_count: GPUs of a pod that records or measures, which uses one; 0 runs on the CPU.
            train_gpus: GPUs of a pod that trains, which uses all; 0 runs on the CPU.
            cpu: CPU cores of a GPU pod.
            memory: memory of a GPU pod; other pods get at most 8Gi.
            node_selector: labels that the nodes of GPU pods must have.
            tolerations: tolerations of GPU pods.
            storage_secret: Secret with the storage's keys; may be missing.
            config_map: ConfigMap with environment of the steps; may be missing.
            pvc_name: PersistentVolumeClaim that is mounted at /data (pipelines for a volume only).
            image_pull_secret: Secret for a private registry; may be missing.
            claim_hours: how long a dataset stays claimed when its run is not heard of any more.
        """
        pods = Settings(
            gpu_type, gpu_count, train_gpus, cpu, memory, node_selector, tolerations,
            storage_secret, config_map, pvc_name, image_pull_secret,
        )  # fmt: skip
        graph = _Graph(options, pods)
        with dsl.ExitHandler(graph.outcome(root), name="pipeline"):
            found = graph.discover(root, config, dataset, "one", "", 0.0, claim_hours, 1)
            graph.process(found.outputs["job"], n_parts)

    return saev


def _incoming(options: CompileOptions) -> base_component.BaseComponent:
    @dsl.pipeline(name="process-dataset")
    def process_dataset(
        job: str,
        n_parts: int,
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
        pods = Settings(
            gpu_type, gpu_count, train_gpus, cpu, memory, node_selector, tolerations,
            storage_secret, config_map, pvc_name, image_pull_secret,
        )  # fmt: skip
        _Graph(options, pods).process(job, n_parts)

    @dsl.pipeline(
        name="saev-incoming",
        description="The same as saev, for every complete and new dataset below a prefix.",
    )
    def saev_incoming(
        dataset: str,
        root: str,
        config: dict,
        marker: str = "",
        settle_minutes: float = 60.0,
        claim_hours: float = 24.0,
        max_datasets: int = 4,
        n_parts: int = 8,
        gpu_type: str = "nvidia.com/gpu",
        gpu_count: str = "1",
        train_gpus: str = "1",
        cpu: str = "4",
        memory: str = "32Gi",
        node_selector: dict = {},  # noqa: B006 - KFP reads it
        tolerations: list = GPU_TOLERATIONS,
        storage_secret: str = STORAGE_SECRET,
        config_map: str = CONFIG_MAP,
        pvc_name: str = PVC_NAME,
        image_pull_secret: str = IMAGE_PULL_SECRET,
    ) -> None:
        """Process what is new below a prefix.

        Args:
            dataset: URL of the folder whose folders are the datasets.
            root: URL of the storage root, such as s3://bucket/saev or /data/saev on a volume.
            config: what `saev run --config` takes, as JSON, with its sweep in the table `sweep`.
            marker: name of the object that a writer puts into a dataset last, such as _SUCCESS;
                empty goes by settle_minutes.
            settle_minutes: a dataset is complete when nothing in it has changed for so long.
            claim_hours: how long a dataset stays claimed when its run is not heard of any more.
            max_datasets: most datasets of one firing; the others wait for the next.
            n_parts: most pods of each step; a pod does several parts one after the other.
            gpu_type: resource name of the GPUs.
            gpu_count: GPUs of a pod that records or measures, which uses one; 0 runs on the CPU.
            train_gpus: GPUs of a pod that trains, which uses all; 0 runs on the CPU.
            cpu: CPU cores of a GPU pod.
            memory: memory of a GPU pod; other pods get at most 8Gi.
            node_selector: labels that the nodes of GPU pods must have.
            tolerations: tolerations of GPU pods.
            storage_secret: Secret with the storage's keys; may be missing.
            config_map: ConfigMap with environment of the steps; may be missing.
            pvc_name: PersistentVolumeClaim that is mounted at /data (pipelines for a volume only).
            image_pull_secret: Secret for a private registry; may be missing.
        """
        pods = Settings(
            gpu_type, gpu_count, train_gpus, cpu, memory, node_selector, tolerations,
            storage_secret, config_map, pvc_name, image_pull_secret,
        )  # fmt: skip
        graph = _Graph(options, pods)
        with dsl.ExitHandler(graph.outcome(root), name="pipeline"):
            found = graph.discover(
                root, config, dataset, "incoming", marker, settle_minutes, claim_hours, max_datasets
            )
            jobs = found.outputs["jobs"]
            with dsl.ParallelFor(jobs, name="datasets", parallelism=options.parallelism) as job:
                process_dataset(job=job, n_parts=n_parts, **pods._asdict()).set_caching_options(
                    False
                )

    return saev_incoming


# --- Their steps -------------------------------------------------------------------------------


class _Graph:
    """Makes the steps of one pipeline, each with its pod's settings."""

    def __init__(self, options: CompileOptions, pods: Settings):
        self._options, self._pods = options, pods

    def outcome(self, root: Channel) -> pipeline_task.PipelineTask:
        """The step that runs whatever becomes of the others."""
        task = components.outcome(root=root, owner=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
        return self._pod(task, "outcome")

    def discover(
        self,
        root: Channel,
        config: Channel,
        dataset: Channel,
        mode: str,
        marker: Channel,
        settle_minutes: Channel,
        claim_hours: Channel,
        max_datasets: Channel,
    ) -> pipeline_task.PipelineTask:
        """Which datasets."""
        task = components.discover(
            root=root,
            config=config,
            owner=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            dataset=dataset,
            mode=mode,
            marker=marker,
            settle_minutes=settle_minutes,
            claim_hours=claim_hours,
            max_datasets=max_datasets,
        )
        return self._pod(task, "discover")

    def process(self, job: Channel, n_parts: Channel) -> None:
        """Everything that is done with one dataset."""
        pods = self._pods
        planned = self._pod(components.plan(job=job, n_parts=n_parts), "plan")
        with self._loop(planned, "extract") as slot:
            task = components.extract(job=job, slot=slot)
            extracted = self._pod(task, "extract", gpus=pods.gpu_count)
        task = components.publish(job=job, n_parts=n_parts).after(extracted)
        published = self._pod(task, "publish")
        with self._loop(published, "train") as slot:
            trained = self._pod(components.train(job=job, slot=slot), "train", gpus=pods.train_gpus)
        with self._loop(published, "infer") as slot:
            task = components.infer(job=job, slot=slot).after(trained)
            inferred = self._pod(task, "infer", gpus=pods.gpu_count)
        with self._loop(published, "summarise") as slot:
            task = components.summarise(job=job, slot=slot).after(inferred)
            summarised = self._pod(task, "summarise")
        self._pod(components.report(job=job).after(summarised), "report")

    def _loop(self, planned: pipeline_task.PipelineTask, step: str) -> dsl.ParallelFor:
        return dsl.ParallelFor(
            planned.outputs[step], name=f"{step}-all", parallelism=self._options.parallelism
        )

    def _pod(
        self, task: pipeline_task.PipelineTask, step: str, *, gpus: Channel | None = None
    ) -> pipeline_task.PipelineTask:
        """Image, resources, storage and labels of a step's pod; ``gpus`` says how many it gets."""
        options, pods = self._options, self._pods
        is_small = task.container_spec.image == CPU_IMAGE
        task.set_container_image(options.cpu_image if is_small else options.image)
        task.set_caching_options(False)
        if options.retries:
            # Argo counts this from the start of the first attempt and does not retry after it: with
            # kfp's default of an hour, a step that is evicted after two would not be run again.
            whole = (options.retries + 1) * (options.timeout_seconds(step) + 3600)
            task.set_retry(
                options.retries,
                backoff_duration="30s",
                backoff_factor=2.0,
                backoff_max_duration=f"{whole}s",
            )
        kubernetes.set_timeout(task, options.timeout_seconds(step))
        if gpus is not None:
            # Inside loops, kfp hands on the parameters of kubernetes.* by itself, but not these.
            task.register_pipeline_channels([pods.gpu_type, gpus, pods.cpu, pods.memory])
            task.set_accelerator_type(pods.gpu_type).set_accelerator_limit(gpus)
            task.set_cpu_request(pods.cpu).set_cpu_limit(pods.cpu)
            task.set_memory_request(pods.memory).set_memory_limit(pods.memory)
            kubernetes.add_node_selector_json(task, pods.node_selector)
            kubernetes.add_toleration_json(task, pods.tolerations)
            kubernetes.empty_dir_mount(
                task, "shm", "/dev/shm", medium="Memory", size_limit=options.shm_size
            )
        else:
            task.set_cpu_request("250m").set_cpu_limit("2")
            task.set_memory_request("1Gi" if is_small else "4Gi").set_memory_limit("8Gi")
        self._storage(task)
        kubernetes.set_image_pull_secrets(task, [pods.image_pull_secret])
        kubernetes.set_security_context(task, run_as_non_root=True)
        kubernetes.add_pod_annotation(task, *KILL_COMMAND)
        task.set_env_variable("SAEV_RETRIES", str(options.retries))
        for key, value in {**LABELS, "app.kubernetes.io/component": step}.items():
            kubernetes.add_pod_label(task, key, value)
        return task

    def _storage(self, task: pipeline_task.PipelineTask) -> None:
        pods = self._pods
        kubernetes.empty_dir_mount(task, "tmp", "/tmp")
        kubernetes.use_secret_as_env(
            task, pods.storage_secret, {key: key for key in SECRET_ENV}, optional=True
        )
        kubernetes.use_config_map_as_env(
            task, pods.config_map, {key: key for key in CONFIG_ENV}, optional=True
        )
        if self._options.storage == "pvc":
            kubernetes.mount_pvc(task, pvc_name=pods.pvc_name, mount_path=DATA_MOUNT)
