"""The constants of a compiled pipeline. KFP accepts these values only at compile time."""

import typing as tp

import pydantic

from saev.config import Config
from saev.launch.pods import PodParameters

PipelineName = tp.Literal["saev", "saev-incoming"]
"""The pipelines: `saev` processes one dataset, `saev-incoming` new datasets below a prefix."""

_HOURS: dict[str, float] = {
    "fire": 1, "discover": 1, "plan": 2, "extract": 48, "publish": 6, "train": 168, "infer": 48,
    "summarise": 24, "report": 2, "outcome": 1,
}  # fmt: skip


class PodOptions(PodParameters):
    """How pods are made. Users set these constants of the compiled pipeline like parameters.

    As parameters of a run, they would be repeated for each pod in the object in which Kubernetes
    keeps the run. :mod:`pipelines.parameters` checks the values.
    """

    gpu_count: str = "1"
    """GPUs of a pod that records or measures, which uses one; 0 runs on the CPU."""
    train_gpus: str = "1"
    """GPUs of a pod that trains, which uses all; 0 runs on the CPU. By default gpu_count."""
    train_nodes: str = "1"
    """Machines that train one group together, each with train_gpus; more than 1 needs Kubeflow
    Trainer (docs/multi-node.md)."""
    queue: str = ""
    """Queue of Kueue in which Jobs (launch = job) and TrainJobs (train_nodes) wait; empty starts
    them at once."""

    @classmethod
    def of(cls, values: tp.Mapping[str, tp.Any]) -> tp.Self:
        """Take the pod options from checked parameters, and ignore other parameters."""
        given = {key: value for key, value in values.items() if key in cls.model_fields}
        if "gpu_count" in given:
            given.setdefault("train_gpus", given["gpu_count"])
        return cls.from_dict(given, source="parameters")


class CompileOptions(Config):
    """Constants of a compiled pipeline that `cluster.toml` sets under [compile]."""

    image: str
    """The runtime image, by an immutable tag or a digest."""
    cpu_image: str
    """The small image for steps that need no torch; may be the runtime image."""
    storage: tp.Literal["object", "pvc"] = "object"
    """object: datasets and results are on object storage. pvc: a volume is mounted at /data."""
    parallelism: int = pydantic.Field(default=8, ge=1)
    """Most pods of one loop at the same time."""
    retries: int = pydantic.Field(default=3, ge=0)
    """How often a step is run again: by its supervisor in an hour, and by Argo in new pods, for
    those failures that the installation retries."""
    timeout_hours: dict[str, float] = pydantic.Field(default_factory=dict)
    """Hours after which a step is stopped, where the defaults do not fit."""
    shm_size: str = "2Gi"
    """Size limit of /dev/shm in GPU pods; it counts as memory of the pod."""
    launch: tp.Literal["loop", "job"] = "loop"
    """loop: KFP starts a pod for each slot. job: one pod of each step makes a Job of Kubernetes for
    them, for which the component jobs of k8s/ gives the rights."""
    pods: PodOptions = PodOptions()
    """How pods are made; not under [compile], but among the parameters."""

    @pydantic.field_validator("timeout_hours")
    @classmethod
    def _known_steps(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = value.keys() - _HOURS.keys()
        if unknown or any(hours <= 0 for hours in value.values()):
            raise ValueError(f"expected positive hours of steps among {', '.join(_HOURS)}")
        return value

    def timeout_seconds(self, step: str) -> int:
        """How long a pod of a step may run."""
        return round(3600 * {**_HOURS, **self.timeout_hours}[step])
