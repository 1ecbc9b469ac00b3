"""Checks what a cluster needs for training on several machines (train_nodes).

The doctor does these checks, and `submit` before it sends a run.
"""

import collections.abc
import logging
import typing as tp

from pipelines.doctor import access
from pipelines.doctor.access import Right
from pipelines.doctor.findings import Finding, fail, ok, warn
from pipelines.errors import ClusterError
from pipelines.kube import Kube
from pipelines.options import PodOptions
from pipelines.settings import Settings
from saev.errors import ConfigError
from saev.launch.trainjobs import RUNTIME, TRAIN_JOBS

logger = logging.getLogger(__name__)

_WHAT = "Kubeflow Trainer"
_OR_ONE = "or set train_nodes to 1"
_INSTALL = "`make install OVERLAY=… NAMESPACE={} COMPONENTS='… trainer'` makes it"
_TRAINER = ("kubeflow-system", "kubeflow-trainer-public", "kubeflow_trainer_version")
"""Namespace, name and key of the ConfigMap in which Trainer publishes its version."""
RIGHTS = (
    *(Right(verb, "trainjobs", TRAIN_JOBS.group) for verb in ("create", "get", "list", "delete")),
    Right("watch", "trainjobs", TRAIN_JOBS.group),
    Right("get", "jobsets", "jobset.x-k8s.io"),
    Right("list", "pods"),
    Right("get", "pods/log"),
)
"""Further permissions that the steps' account needs; k8s/components/trainer explains them."""


def findings(
    kube: Kube, namespace: str, pods: PodOptions | None
) -> collections.abc.Iterator[Finding]:
    """Whether the cluster can train on several machines. No findings if one machine is enough.

    Args:
        kube: the cluster.
        namespace: the namespace of the runs.
        pods: how the pods of every run are made; None if a parameter is wrong.
    """
    if pods is None or int(pods.train_nodes) == 1:
        return
    trainer = _trainer(kube)
    yield trainer
    if trainer.level == "fail":
        return
    yield _runtime(kube, namespace)
    yield _rights(kube, namespace)
    if kube.settings.storage == "pvc":
        yield _claim(kube, namespace, pods)


def check(settings: Settings, namespace: str, pods: PodOptions) -> None:
    """Raise ConfigError if a run certainly cannot train on several machines.

    Without access to the Kubernetes API, nothing is checked, and the run reports the error.
    """
    if int(pods.train_nodes) == 1:
        return
    try:
        kube = Kube(settings)
    except ConfigError as err:
        logger.warning("not checked whether the cluster has %s: %s", _WHAT, err)
        return
    for found in findings(kube, namespace, pods):
        if found.level == "fail":
            raise ConfigError(
                f"train_nodes is {pods.train_nodes}, but {found.what}: {found.found}. "
                f"{found.remedy}"
            )


def _trainer(kube: Kube) -> Finding:
    group = f"{TRAIN_JOBS.group}/{TRAIN_JOBS.version}"
    try:
        with kube.explained(f"look for {_WHAT}"):
            schemas = kube.schemas(group)
    except ClusterError as err:
        if err.status == 404:
            remedy = f"An administrator installs it (docs/multi-node.md), {_OR_ONE}."
            return fail(_WHAT, f"the cluster has none, as it does not serve {group}", remedy)
        return warn(_WHAT, str(err), "")
    spec: dict[str, tp.Any] = next(
        (s["properties"]["spec"] for name, s in schemas.items() if name.endswith(".TrainJob")), {}
    )
    version = _version(kube)
    if "runtimePatches" not in spec.get("properties", {}):
        remedy = f"An administrator updates it to 2.2 or newer, {_OR_ONE}."
        return fail(_WHAT, f"{version}, is too old: its TrainJobs have no runtimePatches", remedy)
    return ok(_WHAT, version)


def _version(kube: Kube) -> str:
    namespace, name, key = _TRAINER
    for place in (namespace, kube.settings.kfp_namespace):
        try:
            with kube.explained(f"read {name}"):
                found = kube.core.read_namespaced_config_map(name, place)
        except ClusterError:  # try the next namespace
            continue
        return f"version {(found.data or {}).get(key, 'unknown').removeprefix('v')}"
    return "version unknown"


def _runtime(kube: Kube, namespace: str) -> Finding:
    what = f"training runtime {RUNTIME}"
    try:
        with kube.explained(f"look at {what}"):
            kube.custom.get_namespaced_custom_object(
                TRAIN_JOBS.group, TRAIN_JOBS.version, namespace, "trainingruntimes", RUNTIME
            )
    except ClusterError as err:
        if err.status == 404:
            remedy = f"{_INSTALL.format(namespace)}, {_OR_ONE}."
            return fail(what, f"it does not exist in {namespace}", remedy)
        return warn(what, str(err), "")
    return ok(what, f"it exists in {namespace}")


def _rights(kube: Kube, namespace: str) -> Finding:
    account = kube.settings.service_account
    what = f"service account {account} and TrainJobs"
    try:
        refused = access.refused(kube, namespace, account, RIGHTS)
    except ClusterError as err:
        if err.status == 403:
            return ok(what, "you may not ask what it is allowed to do")
        return warn(what, str(err), "")
    if refused:
        lacks = ", ".join(map(str, refused))
        return fail(what, f"it may not {lacks}", f"{_INSTALL.format(namespace)}, {_OR_ONE}.")
    return ok(what, f"it may do all {len(RIGHTS)} things that launching them needs")


def _claim(kube: Kube, namespace: str, pods: PodOptions) -> Finding:
    what = f"volume claim {pods.pvc_name} on several machines"
    try:
        with kube.explained(f"look at {what}"):
            claim = kube.core.read_namespaced_persistent_volume_claim(pods.pvc_name, namespace)
    except ClusterError as err:
        return warn(what, str(err), "")
    modes = claim.spec.access_modes or []
    if "ReadWriteMany" not in modes:
        remedy = f"A volume that several nodes mount needs ReadWriteMany, {_OR_ONE}."
        return fail(what, f"its access modes are {', '.join(modes)}", remedy)
    return ok(what, "ReadWriteMany")
