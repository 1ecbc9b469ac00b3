"""A step's pod: what its container may use, where it finds its storage, whom it belongs to.

The pipeline's definition says the same to KFP in the words of its SDK, with the constants that
stand here (`pipelines/definition.py`). tests/launch compares the two.
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


class PodSettings(Config):
    """The settings of a run that say how pods of one step are made."""

    step: str
    """The step's name."""
    image: str
    gpus: int | None = pydantic.Field(default=None, ge=0)
    """GPUs of a GPU pod, which gets `cpu` and `memory`; None is a pod of `READING`."""
    gpu_type: str = "nvidia.com/gpu"
    cpu: str = "4"
    memory: str = "32Gi"
    node_selector: dict[str, str] = pydantic.Field(default_factory=dict)
    """Of GPU pods, as the next one."""
    tolerations: list[dict[str, tp.Any]] = pydantic.Field(default_factory=list)
    storage_secret: str = "saev-storage"
    config_map: str = "saev-config"
    image_pull_secret: str = "saev-registry"
    pvc_name: str = ""
    """Claim that is mounted at /data; empty mounts nothing."""
    timeout_seconds: int = pydantic.Field(ge=1)
    """How long a pod may run."""
    retries: int = pydantic.Field(default=3, ge=0)
    shm_size: str = "2Gi"


def labels(step: str, run_id: str) -> dict[str, str]:
    """Labels of a step's pod, and of what makes it."""
    return {**LABELS, STEP_LABEL: step, RUN_LABEL: run_id}


def template(
    settings: PodSettings, command: tp.Sequence[str], run_id: str, service_account: str
) -> Json:
    """A pod template.

    It differs from KFP's pods in three things: it has no rights in Kubernetes, which steps do not
    need; it has more time to end; and the end of a failed one's log is a part of its status.

    Args:
        settings: of the run.
        command: of the container.
        run_id: of the pipeline run.
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
        return {
            "requests": {"cpu": READING.cpu, "memory": READING.memory},
            "limits": {"cpu": READING.most_cpu, "memory": READING.most_memory},
        }
    gpus = {settings.gpu_type: str(settings.gpus)} if settings.gpus else {}
    # Kubernetes takes the limits for the requests, which are not given.
    return {"limits": {"cpu": settings.cpu, "memory": settings.memory, **gpus}}


def _volumes(settings: PodSettings) -> list[tuple[str, str, Json]]:
    """Name, mount path and source of each."""
    secret = {"secret": {"secretName": settings.storage_secret, "optional": True}}
    config = {"configMap": {"name": settings.config_map, "optional": True}}
    volumes: list[tuple[str, str, Json]] = [
        ("tmp", "/tmp", {"emptyDir": {}}),
        ("secret", SECRET_MOUNT, secret),
        ("config", CONFIG_MOUNT, config),
    ]
    if settings.gpus is not None:
        memory = {"medium": "Memory", "sizeLimit": settings.shm_size}
        volumes.append(("shm", "/dev/shm", {"emptyDir": memory}))
    if settings.pvc_name:
        claim = {"persistentVolumeClaim": {"claimName": settings.pvc_name}}
        volumes.append(("data", DATA_MOUNT, claim))
    return volumes
