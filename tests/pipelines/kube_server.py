"""The parts of the Kubernetes API that the client uses, over HTTP.

Objects live in a dictionary; those that are sent are validated by Kubernetes' own schemas.
Forwarded ports speak the WebSocket protocol of the real API (v4.channel.k8s.io). tests/e2e has the
same checks against a real kube-apiserver.
"""

import base64
import collections.abc
import contextlib
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
import typing as tp
import urllib.parse
from pathlib import Path

import k8s_schemas
import yaml

_KINDS = {
    "namespaces": ("v1", "Namespace"),
    "nodes": ("v1", "Node"),
    "pods": ("v1", "Pod"),
    "services": ("v1", "Service"),
    "secrets": ("v1", "Secret"),
    "configmaps": ("v1", "ConfigMap"),
    "serviceaccounts": ("v1", "ServiceAccount"),
    "persistentvolumeclaims": ("v1", "PersistentVolumeClaim"),
    "storageclasses": ("storage.k8s.io/v1", "StorageClass"),
    "deployments": ("apps/v1", "Deployment"),
    "jobs": ("batch/v1", "Job"),
    "workflows": ("argoproj.io/v1alpha1", "Workflow"),
    "trainingruntimes": ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"),
}
_PATH = re.compile(
    r"/apis?/(?:v1|[a-z.0-9]+/v1(?:alpha1)?)(?:/namespaces/(?P<ns>[^/]+)(?=/.))?/(?P<plural>[a-z]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<sub>log|portforward))?"
)
_SCHEMAS = "/openapi/v3/apis/"
CONTROLLER = {
    "workflowDefaults": """
spec:
  ttlStrategy: {secondsAfterCompletion: 3600}
  templateDefaults:
    retryStrategy: {limit: '2', retryPolicy: OnError}
"""
}
"""What KFP 2.17 tells Argo's controller."""
_MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class KubeServer:
    """The server's state, and what tests do to it."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], dict[str, tp.Any]] = {}
        """(plural, namespace, name) → object."""
        self.logs: dict[str, str] = {}
        """Pod → its log."""
        self.denied: set[str] = set()
        """`verb resource[/subresource]` that reviews refuse, for users and accounts."""
        self.statuses: dict[str, int] = {}
        """Plural → HTTP status with which requests about it are refused."""
        self.pod_statuses: list[dict[str, tp.Any]] = []
        """What successive looks at a pod that was created find; the last stays."""
        self.statuses_of_image: dict[str, dict[str, tp.Any]] = {}
        """The status of created pods with one image, where it is another."""
        self.pod_log = ""
        """The log of pods that are created."""
        self.created: list[dict[str, tp.Any]] = []
        self.deleted: list[str] = []
        self.reviews: list[dict[str, tp.Any]] = []
        self.violations: list[str] = []
        self.forwarding: list[socket.socket] = []
        """Connections over which ports are forwarded."""
        self.forward_status = 0
        """If not 0, the status with which forwarding a port is refused."""
        self.schemas: dict[str, dict[str, tp.Any]] = {}
        """Group and version → OpenAPI schemas of custom resources."""
        self.forwards: dict[str, int] = {}
        """Pod → local port behind its forwarded one."""
        self.url = ""

    def add(self, plural: str, name: str, namespace: str = "", **fields: tp.Any) -> None:
        """Put an object there."""
        labels, annotations = fields.pop("labels", {}), fields.pop("annotations", {})
        version, kind = _KINDS[plural]
        self.objects[plural, namespace, name] = {
            "apiVersion": version,
            "kind": kind,
            "metadata": {
                "name": name,
                "labels": labels,
                "annotations": annotations,
                "creationTimestamp": f"2026-11-25T01:00:{len(self.objects) % 60:02}Z",
                **({"namespace": namespace} if namespace else {}),
            },
            **fields,
        }

    def add_kfp(self, port: int) -> None:
        """KFP's API server as a service with a ready pod, behind which a local port answers."""
        selector = {"app": "ml-pipeline"}
        self.add("services", "ml-pipeline", "kubeflow", spec={"selector": selector})
        containers = [{"name": "api", "image": "i", "env": [{"name": "A", "value": "b"}]}]
        template = {"spec": {"containers": containers}}
        spec = {"selector": {"matchLabels": selector}, "template": template}
        self.add("deployments", "ml-pipeline", "kubeflow", spec=spec)
        self.add("configmaps", "workflow-controller-configmap", "kubeflow", data=dict(CONTROLLER))
        self.add(
            "pods",
            "ml-pipeline-0",
            "kubeflow",
            labels=selector,
            spec={"containers": [{"name": "api", "image": "ghcr.test/kfp-api-server:2.17.1"}]},
            status={"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
        )
        self.forwards["ml-pipeline-0"] = port

    def write_kubeconfig(self, path: Path, token: str = "secret") -> None:
        """A kubeconfig of this server."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        path.write_text(yaml.safe_dump(config))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    state: KubeServer

    def log_message(self, *args: tp.Any) -> None: ...

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        if self.headers.get("Authorization") != "Bearer secret":
            return self._refuse(401, "Unauthorized")
        if parts.path == "/version/":
            rest = ("gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler", "platform")
            version = {"major": "1", "minor": "34", "gitVersion": "v1.34.4"}
            return self._answer(version | dict.fromkeys(rest, ""))
        if parts.path.startswith(_SCHEMAS):
            schemas = self.state.schemas.get(parts.path.removeprefix(_SCHEMAS))
            if schemas is None:
                return self._refuse(404, "the server could not find the requested resource")
            return self._answer({"openapi": "3.0.0", "components": {"schemas": schemas}})
        found = _PATH.fullmatch(parts.path)
        if not found:
            self.state.violations.append(f"unknown path {self.command} {self.path}")
            return self._refuse(404, "the server could not find the requested resource")
        plural = found["plural"]
        if plural in self.state.statuses:
            return self._refuse(self.state.statuses[plural], f"{plural} is forbidden")
        query = {key: values[0] for key, values in urllib.parse.parse_qs(parts.query).items()}
        if self.command == "GET":
            return self._get(found, query)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        if self.command == "POST" and plural.endswith("accessreviews"):
            return self._review(body)
        if self.command == "POST":
            return self._create(found, body)
        return self._delete(found)

    do_POST = do_DELETE = do_GET

    def _get(self, found: re.Match[str], query: dict[str, str]) -> None:
        plural, namespace, name = found["plural"], found["ns"] or "", found["name"]
        if name is None:
            return self._list(plural, namespace, query)
        item = self.state.objects.get((plural, namespace, name))
        if item is None:
            return self._refuse(404, f'{plural} "{name}" not found')
        if found["sub"] == "portforward":
            return self._forward(name, query)
        if found["sub"] == "log":
            containers = [one["name"] for one in item.get("spec", {}).get("containers", [])]
            if containers and query.get("container", containers[0]) not in containers:
                return self._refuse(400, f"container {query['container']} is not valid for pod")
            if name not in self.state.logs:
                return self._refuse(400, f'container "main" in pod "{name}" is waiting to start')
            lines = self.state.logs[name].splitlines(keepends=True)
            return self._send(
                200, "".join(lines[-int(query.get("tailLines", 10**6)) :]), "text/plain"
            )
        ours = plural == "pods" and name.startswith(("saev-doctor-", "saev-conformance-"))
        if ours and self.state.pod_statuses:
            statuses = self.state.pod_statuses
            item["status"] = statuses.pop(0) if len(statuses) > 1 else statuses[0]
            image = item["spec"]["containers"][0]["image"]
            item["status"] = self.state.statuses_of_image.get(image, item["status"])
        return self._answer(item)

    def _list(self, plural: str, namespace: str, query: dict[str, str]) -> None:
        items = [
            item
            for (kind, where, _), item in self.state.objects.items()
            if kind == plural and (not namespace or where == namespace)
        ]
        for want in filter(None, query.get("labelSelector", "").split(",")):
            key, equals, value = want.partition("=")
            items = [
                item
                for item in items
                if key in item["metadata"]["labels"]
                and (not equals or item["metadata"]["labels"][key] == value)
            ]
        for want in filter(None, query.get("fieldSelector", "").split(",")):
            phase = want.removeprefix("status.phase!=")
            items = [item for item in items if item["status"]["phase"] != phase]
        version, kind = _KINDS[plural]
        self._answer({"apiVersion": version, "kind": f"{kind}List", "metadata": {}, "items": items})

    def _review(self, body: dict[str, tp.Any]) -> None:
        self._validate(body)
        self.state.reviews.append(body)
        asked = body["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        allowed = f"{asked['verb']} {resource}" not in self.state.denied
        self._answer({**body, "status": {"allowed": allowed}}, 201)

    def _create(self, found: re.Match[str], body: dict[str, tp.Any]) -> None:
        self._validate(body)
        name = body["metadata"]["name"]
        account = body["spec"]["serviceAccountName"]
        if ("serviceaccounts", found["ns"], account) not in self.state.objects:
            return self._refuse(
                403,
                f'pods "{name}" is forbidden: error looking up service account '
                f'{found["ns"]}/{account}: serviceaccount "{account}" not found',
            )
        body["metadata"]["namespace"] = found["ns"]
        body["status"] = {"phase": "Pending"}
        self.state.created.append(json.loads(json.dumps(body)))
        self.state.objects["pods", found["ns"], name] = body
        self.state.logs[name] = self.state.pod_log
        self._answer(body, 201)

    def _delete(self, found: re.Match[str]) -> None:
        key = found["plural"], found["ns"] or "", found["name"]
        if self.state.objects.pop(key, None) is None:
            return self._refuse(404, f"{key} not found")
        self.state.deleted.append(found["name"])
        return self._answer({"apiVersion": "v1", "kind": "Status", "status": "Success"})

    def _validate(self, body: dict[str, tp.Any]) -> None:
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": _review_kind(body), **body}
        try:
            k8s_schemas.validate(body, "1.34")
        except Exception as err:  # of its own, or jsonschema's
            self.state.violations.append(f"{self.path}: {err}"[:500])

    def _answer(self, body: tp.Any, status: int = 200) -> None:
        self._send(status, json.dumps(body), "application/json")

    def _refuse(self, status: int, message: str) -> None:
        body = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "message": message,
            "code": status,
        }
        self._answer(body, status)

    def _send(self, status: int, text: str, kind: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    # --- Forwarded ports -------------------------------------------------------------------------

    def _forward(self, pod: str, query: dict[str, str]) -> None:
        """Upgrade to a WebSocket, and relay channel 0 to a local port."""
        if self.state.forward_status:
            return self._refuse(self.state.forward_status, "no kubelet")
        key = self.headers["Sec-WebSocket-Key"] + _MAGIC
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept)
        self.send_header("Sec-WebSocket-Protocol", "v4.channel.k8s.io")
        self.end_headers()
        self.close_connection = True
        self.state.forwarding.append(self.connection)
        port = struct.pack("<H", int(query["ports"]))
        for channel in (0, 1):  # data and errors each begin with the port
            self._frame(bytes([channel]) + port)
        try:
            target = socket.create_connection(("127.0.0.1", self.state.forwards[pod]))
        except OSError as err:
            self._frame(b"\x01" + f"connection refused: {err}".encode())
            return
        with target:
            back = threading.Thread(target=self._backward, args=(target,), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                while data := self._read_frame():
                    target.sendall(data[1:])
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)
            back.join(timeout=5)

    def _backward(self, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := target.recv(1 << 14):
                self._frame(b"\x00" + data)
            self.wfile.write(b"\x88\x00")  # the connection is over: close
            self.wfile.flush()

    def _frame(self, data: bytes) -> None:
        size = bytes([len(data)]) if len(data) < 126 else b"\x7e" + struct.pack(">H", len(data))
        self.wfile.write(b"\x82" + size + data)
        self.wfile.flush()

    def _read_frame(self) -> bytes:
        """The data of the next frame, empty if the client closes."""
        head = self.rfile.read(2)
        if len(head) < 2 or head[0] & 15 == 8:
            return b""
        size = head[1] & 127
        if size == 126:
            size = struct.unpack(">H", self.rfile.read(2))[0]
        elif size == 127:
            size = struct.unpack(">Q", self.rfile.read(8))[0]
        mask = self.rfile.read(4)
        data = self.rfile.read(size)
        return bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))


def _review_kind(body: dict[str, tp.Any]) -> str:
    if "resourceAttributes" not in body.get("spec", {}):
        return ""
    return "LocalSubjectAccessReview" if "user" in body["spec"] else "SelfSubjectAccessReview"


@contextlib.contextmanager
def running() -> collections.abc.Iterator[KubeServer]:
    """The server on a free port of this machine."""
    state = KubeServer()
    handler = type("Handler", (_Handler,), {"state": state})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
