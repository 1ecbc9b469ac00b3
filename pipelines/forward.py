"""Forwards a local port to a service in the cluster, without kubectl.

Each connection to the local port gets its own connection to a ready pod. So when a pod is replaced,
only its connections end, and the forwarding goes on.
"""

import collections.abc
import contextlib
import logging
import socket
import threading
import typing as tp

import urllib3.exceptions
from kubernetes import client, stream

from pipelines.errors import ClusterError
from pipelines.kube import Kube
from saev.errors import ConfigError

logger = logging.getLogger(__name__)

_CHUNK = 1 << 16


class Target(tp.NamedTuple):
    """A service to which ports are forwarded."""

    service: str
    """Its name."""
    port: int
    """Port of the service."""
    namespace: str
    remedy: str
    """What to do if there is no such service, behind a colon."""


def kfp(kube: Kube, port: int) -> Target:
    """The API of Kubeflow Pipelines."""
    remedy = "set KFP_SYSTEM_NAMESPACE to the namespace of Kubeflow Pipelines, or KFP_ENDPOINT."
    return Target("ml-pipeline", port, kube.settings.kfp_namespace, remedy)


@contextlib.contextmanager
def to_service(kube: Kube, target: Target, local: int = 0) -> collections.abc.Iterator[str]:
    """Forward a local port to a service.

    Args:
        kube: the cluster.
        target: the service.
        local: the local port; 0 takes one that is free.

    Yields:
        URL of the local port, which ends with the block.

    Raises:
        ClusterError: there is no such service or no ready pod, or forwarding is not allowed.
        ConfigError: the local port is taken.
    """
    forwarder = _Forwarder(kube, target)
    forwarder.connect().close()  # so that a refusal is reported now, with its cause
    try:
        listener = socket.create_server(("127.0.0.1", local))
    except OSError as err:
        raise ConfigError(
            f"--port {local} cannot be used ({err.strerror}). Choose another one, or leave the "
            "flag out."
        ) from err
    thread = threading.Thread(target=forwarder.serve, args=(listener,), daemon=True)
    thread.start()
    hook, threading.excepthook = threading.excepthook, forwarder.thread_failed
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        threading.excepthook = hook
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        listener.close()
        thread.join(timeout=5)
        forwarder.close()


class _Forwarder:
    def __init__(self, kube: Kube, target: Target):
        self._kube, self._remedy = kube, target.remedy
        self._service, self._port = target.service, target.port
        self._namespace = target.namespace
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def connect(self) -> tp.Any:
        """A socket that is connected to a pod's port. Raises ClusterError."""
        pod, port = self._pod()
        # The library replaces a method of the client while it connects, so each connection has an
        # own client.
        api = client.CoreV1Api(self._kube.new_client())
        with self._kube.explained(f"forward a port to pod {pod}"):
            forwarded = stream.portforward(
                api.connect_get_namespaced_pod_portforward,
                pod,
                self._namespace,
                ports=str(port),
            )
        return forwarded.socket(port)

    def _pod(self) -> tuple[str, int]:
        """A ready pod of the service, and the port on which it answers."""
        core, where = self._kube.core, f"in namespace {self._namespace}"
        try:
            with self._kube.explained(f"find service {self._service} {where}"):
                found = core.read_namespaced_service(self._service, self._namespace)
        except ClusterError as err:
            if err.status != 404:
                raise
            raise ClusterError(
                f"There is no service {self._service} {where} of {self._kube.server.address}: "
                f"{self._remedy}",
                status=404,
            ) from err
        selector = found.spec.selector
        with self._kube.explained(f"list the pods of service {self._service} {where}"):
            labels = ",".join(f"{key}={value}" for key, value in (selector or {}).items())
            pods = core.list_namespaced_pod(self._namespace, label_selector=labels).items
        ready = [pod for pod in pods if _is_ready(pod)]
        if not ready:
            raise ClusterError(
                f"Cannot forward a port to service {self._service}: none of its {len(pods)} pods "
                f"{where} is ready. `kubectl get pods -n {self._namespace} -l {labels}` shows them."
            )
        return ready[0].metadata.name, _port_of(ready[0], found, self._port)

    def serve(self, listener: socket.socket) -> None:
        """Accept connections until the listener is closed."""
        while True:
            try:
                local, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(local,), daemon=True).start()

    def thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """End all connections. The library leaves them open when one of its threads fails."""
        name = failed.thread.name if failed.thread else ""
        if not name.startswith("Kubernetes port forward"):
            threading.__excepthook__(failed)
            return
        logger.debug("forwarding: %s", failed.exc_value)
        self.close()

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            for local in self._open:
                with contextlib.suppress(OSError):
                    local.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _opened(self, local: socket.socket) -> collections.abc.Iterator[None]:
        with self._lock:
            self._open.add(local)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(local)
            local.close()

    def _relay(self, local: socket.socket) -> None:
        with self._opened(local):
            try:
                remote = self.connect()
            except (ClusterError, urllib3.exceptions.HTTPError, OSError) as err:
                logger.debug("forwarding: %s", err)
                return  # the HTTP client reports the closed connection
            with contextlib.closing(remote):
                upward = threading.Thread(target=_copy, args=(local, remote), daemon=True)
                upward.start()
                _copy(remote, local)
                upward.join(timeout=1)


def _copy(source: tp.Any, target: tp.Any) -> None:
    """Copy until one side ends, then end the other."""
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _port_of(pod: tp.Any, service: tp.Any, port: int) -> int:
    """The port of a pod behind a port of its service. Other ports are those of the pod."""
    target = next((p.target_port for p in service.spec.ports or [] if p.port == port), None)
    if isinstance(target, str) and not target.isdigit():
        named = {p.name: p.container_port for c in pod.spec.containers for p in c.ports or []}
        target = named.get(target)
    return int(target or port)


def _is_ready(pod: tp.Any) -> bool:
    conditions = pod.status.conditions or []
    is_ready = any(c.type == "Ready" and c.status == "True" for c in conditions)
    return is_ready and pod.metadata.deletion_timestamp is None
