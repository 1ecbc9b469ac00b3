"""Checks the objects that runs need: namespace, secret, config map, volume."""

import collections.abc
import re
import typing as tp

from pipelines.doctor.findings import Finding, fail, ok, warn
from pipelines.errors import ClusterError
from pipelines.kube import Kube
from pipelines.options import PodOptions
from saev.config.environment import SECRET_ENV

_FROM_ENV = re.compile(r"[\"']?fromEnv[\"']?\s*:\s*true")
_ENFORCE = "pod-security.kubernetes.io/enforce"
_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


def namespace(kube: Kube, name: str) -> Finding:
    """The namespace of the runs, and its Pod Security Standard."""
    what = f"namespace {name}"
    try:
        with kube.explained(f"look at namespace {name}"):
            labels = kube.core.read_namespace(name).metadata.labels or {}
    except ClusterError as err:
        if err.status == 404:
            return fail(what, "it does not exist", "Set KFP_NAMESPACE to one that does.")
        return warn(what, str(err), "")
    level = labels.get(_ENFORCE, "none")
    return ok(what, f"it exists; Pod Security Standard enforced: {level}")


def storage(kube: Kube, where: str) -> collections.abc.Iterator[Finding]:
    """The secret, the config map and, for volumes, the claim."""
    settings = kube.settings
    names = {**PodOptions().model_dump(), **settings.parameters}
    secret = names["storage_secret"]
    if settings.storage == "object":
        keys = _secret(kube, where, secret)
        yield keys
        if keys.level == "ok":
            yield from _launcher(kube, where, secret)
    yield _config_map(kube, where, names["config_map"])
    if settings.storage == "pvc":
        yield from _claim(kube, where, names["pvc_name"])


def _secret(kube: Kube, where: str, name: str) -> Finding:
    what = f"secret {name}"
    found = _read(kube, what, kube.core.read_namespaced_secret, name, where)
    if isinstance(found, Finding):
        return found
    if found is None:
        return warn(
            what,
            f"it does not exist in {where}",
            "That is right where pods get credentials from their service account (IRSA); else put "
            "the keys into storage.env and run `make install` (docs/cluster.md).",
        )
    missing = [key for key in SECRET_ENV[:2] if key not in (found.data or {})]
    if missing:
        return fail(what, f"it has no key {', '.join(missing)}", "Add them (docs/cluster.md).")
    return ok(what, f"it exists, with {len(found.data)} keys")


def _launcher(kube: Kube, where: str, secret: str) -> collections.abc.Iterator[Finding]:
    """Warn if KFP's launcher expects storage keys in the environment of the steps' pods.

    In these pods, the secret's keys are files, which only the step itself reads.
    """
    what = "config map kfp-launcher"
    found = _read(kube, what, kube.core.read_namespaced_config_map, "kfp-launcher", where)
    if found is None or isinstance(found, Finding):  # KFP uses its defaults, or we may not read it
        return
    if _FROM_ENV.search((found.data or {}).get("providers", "")):
        yield warn(
            what,
            f"fromEnv is true, but the keys of {secret} are no variables of the steps' pods",
            "Unless pods have a role: set fromEnv to false, with a secretRef (k8s/components/"
            "kfp-launcher).",
        )


def _config_map(kube: Kube, where: str, name: str) -> Finding:
    what = f"config map {name}"
    found = _read(kube, what, kube.core.read_namespaced_config_map, name, where)
    if isinstance(found, Finding):
        return found
    if found is None:
        return warn(what, f"it does not exist in {where}", "`make install` makes it.")
    endpoint = (found.data or {}).get("AWS_ENDPOINT_URL", "")
    return ok(what, "it exists" + (f"; object store: {endpoint}" if endpoint else ""))


def _claim(kube: Kube, where: str, name: str) -> collections.abc.Iterator[Finding]:
    what = f"volume claim {name}"
    found = _read(kube, what, kube.core.read_namespaced_persistent_volume_claim, name, where)
    if isinstance(found, Finding):
        yield found
        return
    if found is None:
        yield fail(what, f"it does not exist in {where}", "`make install OVERLAY=pvc` makes it.")
        yield _storage_class(kube, None)
        return
    size = ((found.status.capacity or found.spec.resources.requests) or {}).get("storage", "?")
    modes = ", ".join(found.spec.access_modes or [])
    state = f"{found.status.phase}, {size}, {modes}"
    if found.status.phase != "Bound":
        yield warn(
            what,
            state,
            f"`kubectl describe pvc -n {where} {name}` says what it waits for; a class that binds "
            "at first use waits for the first pod.",
        )
    elif "ReadWriteMany" not in (found.spec.access_modes or []):
        yield warn(what, state, "Pods on several nodes need ReadWriteMany; one node does without.")
    else:
        yield ok(what, state)
    yield _storage_class(kube, found.spec.storage_class_name)


def _storage_class(kube: Kube, name: str | None) -> Finding:
    what = "storage class"
    try:
        with kube.explained("list the storage classes"):
            classes = kube.storage.list_storage_class().items
    except ClusterError as err:
        return warn(what, str(err), "")
    names = [item.metadata.name for item in classes]
    if name is not None:
        if name in names:
            return ok(what, name)
        if name == "":
            return ok(what, "none: the volume was made by hand")
        shown = ", ".join(names) or "none"
        return fail(what, f"{name} does not exist", f"The cluster has: {shown}.")
    default = [
        item.metadata.name
        for item in classes
        if (item.metadata.annotations or {}).get(_DEFAULT_CLASS) == "true"
    ]
    if default:
        return ok(what, f"{default[0]} is the default")
    shown = ", ".join(names) or "none"
    return warn(what, "there is no default", f"Name one in the claim; the cluster has: {shown}.")


def _read(kube: Kube, what: str, read: tp.Callable[..., tp.Any], name: str, where: str) -> tp.Any:
    """The object; None if it is missing; a finding if it cannot be read."""
    try:
        with kube.explained(f"look at {what}"):
            return read(name, where)
    except ClusterError as err:
        return None if err.status == 404 else warn(what, str(err), "")
