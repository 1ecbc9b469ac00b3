"""Reads storage as the pods do: with the settings of their ConfigMap and the keys of their Secret.

For `saevit-client show --from-cluster`, on a machine that has a kubeconfig, but neither keys nor a
way to a store that only the cluster sees.
"""

import base64
import collections.abc
import contextlib
import os
import typing as tp
import urllib.parse

from pipelines import forward
from pipelines.errors import ClusterError
from pipelines.kube import Kube
from pipelines.options import PodOptions
from pipelines.settings import Settings
from saev.config.environment import SECRET_ENV
from saev.errors import ConfigError

_ENDPOINT = "AWS_ENDPOINT_URL"
_REMEDY = "check AWS_ENDPOINT_URL of the config map."
_TAKEN = (*SECRET_ENV, _ENDPOINT, "AWS_DEFAULT_REGION")
"""Names that are taken into this process's environment."""


@contextlib.contextmanager
def applied(settings: Settings) -> collections.abc.Iterator[Settings]:
    """While the block runs, this process has the pods' settings and keys of storage.

    A store inside the cluster is reached over a forwarded port. Nothing is written to a file.

    Args:
        settings: the cluster.

    Yields:
        The settings, with the root of the ConfigMap if they have none.

    Raises:
        ConfigError: there is no ConfigMap, or the store cannot be reached from here.
        ClusterError: the cluster does not answer, or does not allow reading them.
    """
    kube = Kube(settings)
    found = _values(kube)
    environment = {name: text for name, text in found.items() if name in _TAKEN}
    before = dict(os.environ)
    with contextlib.ExitStack() as stack:
        endpoint = environment.get(_ENDPOINT, "")
        if inside := _inside(endpoint, _namespace(settings)):
            service, namespace, port = inside
            if endpoint.startswith("https:"):
                raise ConfigError(
                    f"The object store {endpoint} is inside the cluster and uses TLS, whose "
                    "certificate does not fit a forwarded port. Set AWS_ENDPOINT_URL to an address "
                    "that this machine reaches, and leave out --from-cluster."
                )
            environment[_ENDPOINT] = stack.enter_context(
                forward.to_service(kube, forward.Target(service, port, namespace, _REMEDY))
            )
        os.environ.update(environment)
        try:
            root = settings.root or found.get("SAEV_ROOT", "")
            yield settings.model_copy(update={"root": root})
        finally:
            for name in environment:
                os.environ.pop(name)
                if name in before:
                    os.environ[name] = before[name]


def _namespace(settings: Settings) -> str:
    """Where the pods of runs are."""
    return settings.namespace or settings.kfp_namespace


def _values(kube: Kube) -> dict[str, str]:
    """What the pods read from the ConfigMap and the Secret."""
    settings, where = kube.settings, _namespace(kube.settings)
    names = {**PodOptions().model_dump(), **settings.parameters}
    found: dict[str, str] = {}
    config = _read(kube, "config map", names["config_map"], kube.core.read_namespaced_config_map)
    if config is None:
        raise ConfigError(
            f"There is no config map {names['config_map']} in namespace {where}: set KFP_NAMESPACE "
            "to the namespace of the runs. `make install` makes the config map."
        )
    found |= config.data or {}
    secret = _read(kube, "secret", names["storage_secret"], kube.core.read_namespaced_secret)
    if secret is not None:  # there is none where pods get their keys from their service account
        for name, text in (secret.data or {}).items():
            found[name] = base64.b64decode(text).decode()
    return found


def _read(kube: Kube, what: str, name: str, read: tp.Callable[..., tp.Any]) -> tp.Any:
    """An object of the namespace of the runs; None if it does not exist."""
    where = _namespace(kube.settings)
    try:
        with kube.explained(f"read {what} {name} in namespace {where}"):
            return read(name, where)
    except ClusterError as err:
        if err.status != 404:
            raise
        return None


def _inside(endpoint: str, namespace: str) -> tuple[str, str, int] | None:
    """Service, namespace and port of an endpoint with a name that only the cluster knows."""
    parts = urllib.parse.urlsplit(endpoint)
    labels = (parts.hostname or "").split(".")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if len(labels) == 1 and labels[0] not in ("", "localhost"):
        return labels[0], namespace, port
    if len(labels) > 2 and labels[2] == "svc":
        return labels[0], labels[1], port
    return None
