"""Writes the status of pods as a kubelet would, for a Kubernetes without nodes."""

import contextlib
import threading
import time
import typing as tp
from collections.abc import Callable, Iterator

from kubernetes import client

Json = dict[str, tp.Any]

SUCCEEDED: Json = {"phase": "Succeeded", "conditions": [{"type": "Ready", "status": "False"}]}
RUNNING: Json = {
    "phase": "Running",
    "startTime": "2026-01-01T00:00:00Z",
    "conditions": [{"type": "Ready", "status": "True"}],
}
DISRUPTED: Json = {
    "phase": "Failed",
    "reason": "Evicted",
    "message": "The node was low on resource: memory.",
    "conditions": [
        {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"},
        {"type": "Ready", "status": "False"},
    ],
}


def exited(code: int, message: str = "", container: str = "main") -> Json:
    """The status of a pod whose container ended with an error."""
    ended = {"exitCode": code, "message": message, "reason": "OOMKilled" if code == 137 else ""}
    status = {
        "name": container, "image": "x", "imageID": "", "ready": False, "restartCount": 0,
        "state": {"terminated": ended},
    }  # fmt: skip
    conditions = [{"type": "Ready", "status": "False"}]
    return {"phase": "Failed", "conditions": conditions, "containerStatuses": [status]}


class Kubelet:
    """Ends each pod of a namespace as it is told.

    Attributes:
        started: names of the pods that it has seen, in their order.
    """

    def __init__(self, api: client.ApiClient, namespace: str, become: Callable[[Json], Json]):
        self._core, self._namespace, self._become = client.CoreV1Api(api), namespace, become
        self._api = api
        self.started: list[str] = []

    def look(self) -> None:
        """Give every pod that has no status yet its status."""
        for pod in self._core.list_namespaced_pod(self._namespace).items:
            name = pod.metadata.name
            if name in self.started or pod.metadata.deletion_timestamp:
                continue
            self.started.append(name)
            status = self._become(self._api.sanitize_for_serialization(pod))
            with contextlib.suppress(client.ApiException):  # it was deleted meanwhile
                self._core.patch_namespaced_pod_status(name, self._namespace, {"status": status})

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Look all the time while the block runs."""
        return looking(self.look)


@contextlib.contextmanager
def looking(look: Callable[[], None]) -> Iterator[None]:
    """Call a function ten times a second while the block runs."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.1):
            look()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def until(ready: Callable[[], bool], seconds: float = 60.0) -> None:
    """Return once something holds, which it has to within a minute."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.1)
