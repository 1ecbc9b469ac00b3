"""A node whose pods are processes of this machine: the part of a kubelet that training needs."""

import contextlib
import os
import signal
import subprocess
import sys
import typing as tp
from collections.abc import Iterator
from pathlib import Path

from kubelet import RUNNING, exited, looking
from kubernetes import client
from processes import free_port

Json = dict[str, tp.Any]

NODE = "machine"
_MESSAGE_BYTES = 2048
"""Of a container's log, at its end, that become its termination message."""


class Pod(tp.NamedTuple):
    """A pod that was started."""

    name: str
    index: int
    """Of the machine."""
    command: list[str]
    env: dict[str, str]
    """As the controllers made it."""
    process: subprocess.Popen[bytes]
    log: Path


class Machines:
    """Runs the pods of a namespace. They find each other at the loopback address.

    Args:
        api: a client of an administrator.
        namespace: whose pods.
        folder: for logs.

    Attributes:
        pods: all that were started, in their order.
    """

    def __init__(self, api: client.ApiClient, namespace: str, folder: Path):
        self._api, self._core = api, client.CoreV1Api(api)
        self._namespace, self._folder = namespace, folder
        self._port = free_port()
        self._running: dict[str, Pod] = {}
        self.pods: list[Pod] = []

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Look all the time while the block runs; kill in the end what is left."""
        try:
            with looking(self.look):
                yield
        finally:
            for pod in self.pods:
                for pid in [*ranks(pod), pod.process.pid]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                pod.process.wait()

    def look(self) -> None:
        """Start what is new, end what is deleted, and say what has ended."""
        for found in self._core.list_namespaced_pod(self._namespace).items:
            name = found.metadata.name
            pod = self._running.get(name)
            deleted = found.metadata.deletion_timestamp is not None
            if pod is None:
                if found.status.phase == "Pending" and not deleted:
                    self._start(self._api.sanitize_for_serialization(found))
                elif deleted:
                    self._remove(name)
                continue
            if pod.process.poll() is None:
                if deleted:
                    pod.process.terminate()
                continue
            del self._running[name]
            self._say(name, _status(pod))
            if deleted:
                self._remove(name)

    def _start(self, manifest: Json) -> None:
        name, spec = manifest["metadata"]["name"], manifest["spec"]
        (container,) = spec["containers"]
        env = {one["name"]: _value(one, manifest["metadata"]) for one in container["env"]}
        given = {key: value for key, value in env.items() if value is not None}
        here = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(self._port)}
        minimal = {"PATH": os.environ["PATH"], "HOME": str(self._folder), "OMP_NUM_THREADS": "1"}
        command = list(container["command"])
        assert command[0] == "python"
        log = self._folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, *command[1:]], env={**minimal, **given, **here},
                stdout=out, stderr=out,
            )  # fmt: skip
        index = int(manifest["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])
        pod = Pod(name, index, command, given, process, log)
        self.pods.append(pod)
        self._running[name] = pod
        target = client.V1ObjectReference(kind="Node", name=NODE)
        binding = client.V1Binding(metadata=client.V1ObjectMeta(name=name), target=target)
        with contextlib.suppress(client.ApiException):  # it was deleted meanwhile
            self._core.create_namespaced_binding(self._namespace, binding, _preload_content=False)
            self._say(name, RUNNING)

    def _say(self, name: str, status: Json) -> None:
        with contextlib.suppress(client.ApiException):
            self._core.patch_namespaced_pod_status(name, self._namespace, {"status": status})

    def _remove(self, name: str) -> None:
        with contextlib.suppress(client.ApiException):
            self._core.delete_namespaced_pod(name, self._namespace, grace_period_seconds=0)


def _status(pod: Pod) -> Json:
    status = pod.process.returncode
    if status == 0:
        return {"phase": "Succeeded", "conditions": [{"type": "Ready", "status": "False"}]}
    said = pod.log.read_bytes()[-_MESSAGE_BYTES:].decode(errors="replace")
    return exited(status if status > 0 else 128 - status, said, "node")


def _value(variable: Json, metadata: Json) -> str | None:
    """Of a variable of the environment; None for what comes from a secret that is not there."""
    if "valueFrom" not in variable:
        return str(variable.get("value", ""))
    path = variable["valueFrom"].get("fieldRef", {}).get("fieldPath", "")
    kind, _, key = path.partition("[")
    if kind not in ("metadata.annotations", "metadata.labels"):
        return None
    return str(metadata[kind.removeprefix("metadata.")][key.strip("'[]")])


def ranks(pod: Pod) -> list[int]:
    """The processes that train in a pod: the children of its torchrun."""
    found = []
    for torchrun in _children(pod.process.pid):
        found += _children(torchrun)
    return found


def _children(pid: int) -> list[int]:
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(word) for word in words]
