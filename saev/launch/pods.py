"""The template of a step's pod: resources, volumes, labels and restrictions.

`pipelines/kfp_pods.py` translates the template into calls of KFP's SDK. tests/launch compares the
pods of both ways.
"""

import typing as tp

import pydantic

from saev.config.base import Config
from saev.config.environment import CONFIG_MOUNT, SECRET_MOUNT

Json = dict[str, tp.Any]

LABELS = {"app.kubernetes.io/name": "saev", "app.kubernetes.io/part-of": "saev"}
STEP_LABEL = "app.kubernetes.io/component"
RUN_LABEL = "pipeline/runid"
"""KFP's label for the pods of a run. `make logs` finds pods by it."""
NO_ISTIO_SIDECAR = ("sidecar.istio.io/inject", "false")
"""KFP's annotation for its pods. An Istio sidecar would keep running when the step has ended."""

SUPERVISOR = ("python", "-m", "saev.steps.supervisor")
"""The command of every step. It runs `saev` as its child, and runs it again after failures that may
pass.

The command is complete: on a cluster, KFP's launcher replaces the image's entry point.
"""
MAIN = "main"
"""Argo's name for the container."""
DATA_MOUNT = "/data"


class Resources(tp.NamedTuple):
    """Requests and limits of a container without a GPU."""

    cpu: str
    memory: str
    most_cpu: str = "2"
    most_memory: str = "8Gi"


SMALL_IMAGE_RESOURCES = Resources("250m", "1Gi")
"""For steps in the small image."""
RUNTIME_IMAGE_RESOURCES = Resources("250m", "4Gi")
"""For steps in the runtime image that use no GPU."""

GRACE_SECONDS = 300
"""How long a deleted pod may take to write its resume points."""


class PodParameters(Config):
    """How pods are made: the values that users set and that all pods of a run share.

    This class is the only place where a pod parameter is declared. `pipelines.options` adds the
    values that only the client reads. :class:`PodSettings` adds those that differ between steps.
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
    """GPUs of a GPU pod, which also gets `cpu` and `memory`; None makes a pod of the other kind."""
    is_small: bool = False
    """For pods that are no GPU pods: whether the image is the small one, which needs less."""
    mounts_volume: bool = False
    """Whether the volume claim is mounted."""
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

    It differs from KFP's pods in three things. It has no token for the Kubernetes API, which steps
    do not need. It has more time to end. When it fails, the end of its log is a part of its status.

    Args:
        settings: the step's settings.
        command: the container's command.
        run_id: id of the pipeline run; "" for a pod of no run, and where KFP labels the pods.
        service_account: the pod's service account.
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
        "annotations": dict([NO_ISTIO_SIDECAR]),
    }
    return {"metadata": metadata, "spec": spec}


def _resources(settings: PodSettings) -> Json:
    if settings.gpus is None:
        some = SMALL_IMAGE_RESOURCES if settings.is_small else RUNTIME_IMAGE_RESOURCES
        return {
            "requests": {"cpu": some.cpu, "memory": some.memory},
            "limits": {"cpu": some.most_cpu, "memory": some.most_memory},
        }
    gpus = {settings.gpu_type: str(settings.gpus)} if settings.gpus else {}
    # Kubernetes uses the limits as requests where no requests are given.
    return {"limits": {"cpu": settings.cpu, "memory": settings.memory, **gpus}}


def _volumes(settings: PodSettings) -> list[tuple[str, str, Json]]:
    """Name, mount path and source of each volume."""
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
