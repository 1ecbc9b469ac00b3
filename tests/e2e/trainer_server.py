"""Kubeflow Trainer's and JobSet's controllers beside a Kubernetes API that a test has started.

They are the real ones, with their webhooks. Their custom resources and webhooks are read from the
modules that they are built from. There is no node: a test plays the kubelet, which writes the
status of pods.
"""

import base64
import contextlib
import json
import subprocess
import tempfile
import time
import typing as tp
from collections.abc import Iterator
from pathlib import Path

import certificates
import compiled
import yaml
from processes import answers, child, free_port, wait_until
from servers import LOOPBACK, KubernetesApi

Json = dict[str, tp.Any]

_SERVED_SECONDS = 60


class _Controller(tp.NamedTuple):
    """One of the two, and where its module has what is installed with it."""

    program: compiled.Program
    module: str
    crds: str
    webhooks: str
    config: Json


_TRAINER = _Controller(
    compiled.TRAINER,
    "github.com/kubeflow/trainer/v2",
    "manifests/base/crds",
    "manifests/base/webhook/manifests.yaml",
    {
        "apiVersion": "config.trainer.kubeflow.org/v1alpha1",
        "kind": "Configuration",
        "certManagement": {"enable": False},
    },
)
_JOBSET = _Controller(
    compiled.JOBSET,
    "sigs.k8s.io/jobset",
    "config/components/crd/bases",
    "config/components/webhook/manifests.yaml",
    {
        "apiVersion": "config.jobset.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "internalCertManagement": {"enable": False},
    },
)


def install_crds(api: KubernetesApi) -> None:
    """Make the API serve TrainJobs, TrainingRuntimes and JobSets.

    Raises:
        compiled.Unavailable: the modules cannot be had.
    """
    for one in (_JOBSET, _TRAINER):
        folder = compiled.source(one.program, one.module) / one.crds
        crds = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*_*.yaml"))]
        _apply(api, *crds)
        _wait_until_served(api, crds)


@contextlib.contextmanager
def trainer_controllers(api: KubernetesApi) -> Iterator[None]:
    """Both controllers, until the block ends. The API serves their kinds already.

    Raises:
        compiled.Unavailable: a program is missing and cannot be built.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saev-trainer-")))
        ca = _write_certificates(folder / "k8s-webhook-server" / "serving-certs")
        for one in (_JOBSET, _TRAINER):
            port = _start(stack, one, folder, api)
            source = compiled.source(one.program, one.module)
            _apply(api, *_webhooks(source / one.webhooks, one.program.name, port, ca))
        yield


def _start(stack: contextlib.ExitStack, one: _Controller, folder: Path, api: KubernetesApi) -> int:
    """Start a controller. Returns the port of its webhooks."""
    port, health = free_port(), f"{LOOPBACK}:{free_port()}"
    config = {
        **one.config,
        "leaderElection": {"leaderElect": False},
        "webhook": {"host": LOOPBACK, "port": port},
        "metrics": {"bindAddress": "0"},
        "health": {"healthProbeBindAddress": health},
    }
    path = folder / f"{one.program.name}.json"
    path.write_text(json.dumps(config))
    flags = [f"--config={path}"]
    if one is _JOBSET:  # defaults of its flags stand above what the file says
        flags += [f"--health-probe-bind-address={health}", "--metrics-bind-address=0"]
    env = {"KUBECONFIG": str(api.kubeconfig), "TMPDIR": str(folder)}
    started = stack.enter_context(child([compiled.find(one.program), *flags], folder, env))
    wait_until(lambda: answers(f"http://{health}/readyz"), started)
    return port


def _wait_until_served(api: KubernetesApi, crds: list[Json]) -> None:
    deadline = time.monotonic() + _SERVED_SECONDS
    for crd in (one["spec"] for one in crds):
        place = f"/apis/{crd['group']}/{crd['versions'][0]['name']}"
        while True:
            listed = json.loads(_kubectl(api, "get", "--raw", place) or '{"resources": []}')
            if crd["names"]["plural"] in [one["name"] for one in listed["resources"]]:
                break
            assert time.monotonic() < deadline, f"{crd['names']['plural']} are not served"
            time.sleep(0.2)


def _webhooks(path: Path, name: str, port: int, ca: bytes) -> Iterator[Json]:
    """The module's webhooks, at an address instead of at a service, which nothing here routes."""
    for found in filter(None, yaml.safe_load_all(path.read_text())):
        found["metadata"]["name"] = name
        for hook in found["webhooks"]:
            where = hook["clientConfig"].pop("service")["path"]
            hook["clientConfig"]["url"] = f"https://{LOOPBACK}:{port}{where}"
            hook["clientConfig"]["caBundle"] = base64.b64encode(ca).decode()
            if hook["rules"][0]["resources"] == ["pods"]:  # as JobSet's patches have it
                label = {"key": "jobset.sigs.k8s.io/jobset-name", "operator": "Exists"}
                hook["objectSelector"] = {"matchExpressions": [label]}
        yield found


def _apply(api: KubernetesApi, *objects: Json) -> None:
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    assert _kubectl(api, "apply", "--server-side", "-f", "-", stdin=text)


def _kubectl(api: KubernetesApi, *words: str, stdin: str = "") -> str:
    """What kubectl prints; empty if it fails."""
    command = [str(compiled.find(compiled.KUBECTL)), f"--kubeconfig={api.kubeconfig}", *words]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def _write_certificates(folder: Path) -> bytes:
    """A certificate for the loopback address. Returns what to trust."""
    folder.mkdir(parents=True)
    certificate = certificates.for_loopback("webhooks")
    (folder / "tls.crt").write_bytes(certificate.pem)
    (folder / "tls.key").write_bytes(certificate.key)
    return certificate.pem
