"""A step's pod: what its container may use, where it finds its storage, whom it belongs to.

`pipelines/kfp_pods.py` says the same to KFP in the words of its SDK; tests/launch compares the pods
that come out.
"""

import typing as tp

import pydantic

from saev.config.base import Config
from saev.config.environment import CONFIG_MOUNT, SECRET_MOUNT

Json = dict[str, tp.Any]

LABELS = {"app.kubernetes.io/name": "saev", "app.kubernetes.io/part-of": "saev"}
STEP_LABEL = "app.kubernetes.io/component"
RUN_LABEL = "pipeline/runid"
"""KFP's label of the pods of a run; `make logs` finds them by it."""
OUTSIDE_THE_MESH = ("sidecar.istio.io/inject", "false")
"""Annotation that KFP gives its pods: an Istio sidecar would go on when the step has ended."""

SUPERVISOR = ("python", "-m", "saev.steps.supervisor")
"""The command of every step. It runs `saev` as its child, and runs it again after failures that may
pass.

The command is complete: on a cluster, KFP's launcher replaces the image's entry point.
"""
MAIN = "main"
"""Name of the container, as Argo calls it."""
DATA_MOUNT = "/data"


class Resources(tp.NamedTuple):
    """What a container without a GPU asks for, and what it may use."""

    cpu: str
    memory: str
    most_cpu: str = "2"
    most_memory: str = "8Gi"


LOOKING = Resources("250m", "1Gi")
"""Of steps in the small image."""
READING = Resources("250m", "4Gi")
"""Of steps in the runtime image that use no GPU."""

GRACE_SECONDS = 300
"""How long a pod that is deleted may take to write its resume points."""


class PodParameters(Config):
    """How pods are made: what users set, and what is the same for all pods of a run.

    A pod parameter is declared here and nowhere else. `pipelines.options` adds what the client
    alone reads, :class:`PodSettings` what differs between steps.
    """

    gpu_type: str = "nvidia.com/gpu"
    """Resource name of the GPUs."""
    cpu: str = "4"
    """CPU cores of a GPU pod."""
    memory: str = "32Gi"
    """Memory of a GPU pod; other pods get at most 8Gi."""
    node_selector: dict[str, str] = pydantic.Field(default_factory=dict)
    """Labels that the nodes of GPU pods must have."""
    tolerations: list[dict[str, tp.Any]] = pydantic.Field(
        default_factory=lambda: [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    )
    """Tolerations of GPU pods."""
    storage_secret: str = "saev-storage"
    """Secret with the storage's keys; may be missing."""
    config_map: str = "saev-config"
    """ConfigMap with environment of the steps; may be missing."""
    pvc_name: str = "saev-data"
    """PersistentVolumeClaim that is mounted at /data (pipelines for a volume only)."""
    image_pull_secret: str = "saev-registry"
    """Secret for a private registry; may be missing."""


class PodSettings(PodParameters):
    """How the pods of one step are made."""

    step: str
    """The step's name."""
    image: str
    gpus: int | None = pydantic.Field(default=None, ge=0)
    """GPUs of a GPU pod, which gets `cpu` and `memory`; None is a pod without."""
    is_small: bool = False
    """Of pods without GPUs: whether the image is the small one, so `LOOKING` and not `READING`."""
    mounts_volume: bool = False
    """Whether the claim is mounted."""
    timeout_seconds: int = pydantic.Field(ge=1)
    """How long a pod may run."""
    retries: int = pydantic.Field(default=3, ge=0)
    shm_size: str = "2Gi"


def labels(step: str, run_id: str) -> dict[str, str]:
    """Labels of a step's pod, and of the object that makes it."""
    return {**LABELS, STEP_LABEL: step, **({RUN_LABEL: run_id} if run_id else {})}


def template(
    settings: PodSettings, command: tp.Sequence[str], run_id: str, service_account: str
) -> Json:
    """A pod template.

    It differs from KFP's pods in three things: it has no rights in Kubernetes, which steps do not
    need; it has more time to end; and the end of a failed one's log is a part of its status.

    Args:
        settings: of the run.
        command: of the container.
        run_id: id of the pipeline run; "" for a pod of no run, and where KFP labels the pods.
        service_account: whose pod it is.
    """
    spec: Json = {
        "restartPolicy": "Never",
        "serviceAccountName": service_account,
        "automountServiceAccountToken": False,
        "activeDeadlineSeconds": settings.timeout_seconds,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "imagePullSecrets": [{"name": settings.image_pull_secret}],
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": MAIN,
                "image": settings.image,
                "command": list(command),
                "env": [{"name": "SAEV_RETRIES", "value": str(settings.retries)}],
                "resources": _resources(settings),
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                    "runAsNonRoot": True,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "volumeMounts": [
                    {"name": name, "mountPath": path} for name, path, _ in _volumes(settings)
                ],
            }
        ],
        "volumes": [{"name": name, **source} for name, _, source in _volumes(settings)],
    }
    if settings.gpus is not None:
        spec |= {"nodeSelector": settings.node_selector, "tolerations": settings.tolerations}
    metadata = {
        "labels": labels(settings.step, run_id),
        "annotations": dict([OUTSIDE_THE_MESH]),
    }
    return {"metadata": metadata, "spec": spec}


def _resources(settings: PodSettings) -> Json:
    if settings.gpus is None:
        some = LOOKING if settings.is_small else READING
        return {
            "requests": {"cpu": some.cpu, "memory": some.memory},
            "limits": {"cpu": some.most_cpu, "memory": some.most_memory},
        }
    gpus = {settings.gpu_type: str(settings.gpus)} if settings.gpus else {}
    # Kubernetes takes the limits for the requests, which are not given.
    return {"limits": {"cpu": settings.cpu, "memory": settings.memory, **gpus}}


def _volumes(settings: PodSettings) -> list[tuple[str, str, Json]]:
    """Name, mount path and source of each."""
    secret = {"secret": {"secretName": settings.storage_secret, "optional": True}}
    config = {"configMap": {"name": settings.config_map, "optional": True}}
    volumes: list[tuple[str, str, Json]] = []
    if settings.gpus is not None:
        memory = {"medium": "Memory", "sizeLimit": settings.shm_size}
        volumes.append(("shm", "/dev/shm", {"emptyDir": memory}))
    volumes += [
        ("tmp", "/tmp", {"emptyDir": {}}),
        ("secret", SECRET_MOUNT, secret),
        ("config", CONFIG_MOUNT, config),
    ]
    if settings.mounts_volume:
        claim = {"persistentVolumeClaim": {"claimName": settings.pvc_name}}
        volumes.append(("data", DATA_MOUNT, claim))
    return volumes
