"""`python -m pipelines doctor` against a real Kubernetes API.

There is no node, so the test says what a kubelet would: that the doctor's pod ran. KFP's API is
that of tests/pipelines.
"""

import collections.abc
import json
import os
import subprocess
import sys
import time
import typing as tp
from pathlib import Path

import pytest
from kubernetes import client, config
from servers import KubernetesApi

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "pipelines"))

import kfp_server  # noqa: E402 - of the folder above

NAMESPACE = "kubeflow"


@pytest.fixture(scope="module")
def core(kubernetes_api: KubernetesApi) -> client.CoreV1Api:
    """A cluster with KFP's namespace, in which only restricted pods may run, and saev's objects."""
    core = client.CoreV1Api(config.new_client_from_config(str(kubernetes_api.kubeconfig)))
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    metadata = client.V1ObjectMeta(name=NAMESPACE, labels=labels)
    core.create_namespace(client.V1Namespace(metadata=metadata))
    subprocess.run(
        ["kubectl", "apply", "-n", NAMESPACE, "-k", str(ROOT / "k8s" / "overlays" / "s3")],
        env={**os.environ, "KUBECONFIG": str(kubernetes_api.kubeconfig)},
        check=True,
        capture_output=True,
    )
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    secret = client.V1Secret(metadata=client.V1ObjectMeta(name="saev-storage"), string_data=keys)
    core.create_namespaced_secret(NAMESPACE, secret)
    return core


@pytest.fixture
def env(
    kubernetes_api: KubernetesApi,
    tmp_path: Path,
) -> collections.abc.Iterator[dict[str, str]]:
    """The environment of a command."""
    tmp_path.joinpath("cluster.toml").write_text("[parameters]\ngpu_count = 0\n")
    with kfp_server.running() as kfp:
        yield {
            **os.environ,
            "KUBECONFIG": str(kubernetes_api.kubeconfig),
            "KFP_ENDPOINT": kfp.url,
            "SAEV_ROOT": "s3://bucket/saev",
            "SAEV_IMAGE": "registry.test/saev:1",
            "PYTHONPATH": str(ROOT),
        }
        assert kfp.violations == []


def _start(env: dict[str, str], folder: Path, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines", "doctor", *argv]
    return subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, text=True)


def _pods(core: client.CoreV1Api) -> list[tp.Any]:
    label = "app.kubernetes.io/component=doctor"
    return core.list_namespaced_pod(NAMESPACE, label_selector=label).items


def _pod(core: client.CoreV1Api) -> str:
    """Name of the doctor's pod, when it is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if pods := _pods(core):
            return pods[0].metadata.name
        time.sleep(0.2)
    raise AssertionError("the doctor made no pod")


def _say(core: client.CoreV1Api, name: str, phase: str, state: dict[str, tp.Any]) -> None:
    """What a kubelet reports."""
    status = {"name": "main", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
    body = {"status": {"phase": phase, "containerStatuses": [{**status, "state": state}]}}
    core.patch_namespaced_pod_status(name, NAMESPACE, json.loads(json.dumps(body)))


def test_a_restricted_namespace_takes_the_pod(
    core: client.CoreV1Api, env: dict[str, str], tmp_path: Path
) -> None:
    process = _start(env, tmp_path)
    name = _pod(core)
    _say(core, name, "Succeeded", {"terminated": {"exitCode": 0, "reason": "Completed"}})
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "fail" not in out
    assert "service account saev-steps: it exists and may do all" in out
    assert "Pod Security Standard enforced: restricted" in out
    assert "image: registry.test/saev:1 starts" in out
    assert _pods(core) == []


def test_an_image_that_cannot_be_pulled(
    core: client.CoreV1Api, env: dict[str, str], tmp_path: Path
) -> None:
    process = _start(env, tmp_path)
    waiting = {"reason": "ImagePullBackOff", "message": "not found"}
    _say(core, _pod(core), "Pending", {"waiting": waiting})
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "did not start: main: ImagePullBackOff not found" in out
    assert _pods(core) == []


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_a_doctor_that_is_stopped_leaves_no_pod(
    core: client.CoreV1Api, env: dict[str, str], tmp_path: Path, signal: str
) -> None:
    import signal as signals

    process = _start(env, tmp_path)
    _pod(core)
    process.send_signal(getattr(signals, signal))
    process.communicate(timeout=60)
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[signal]
    assert _pods(core) == []


def test_a_user_who_may_nothing(
    core: client.CoreV1Api,
    kubernetes_api: KubernetesApi,
    env: dict[str, str],
    tmp_path: Path,
) -> None:
    """With the rights of a service account that has none."""
    metadata = client.V1ObjectMeta(name="nobody")
    core.create_namespaced_service_account(NAMESPACE, client.V1ServiceAccount(metadata=metadata))
    kubectl = ["kubectl", "create", "token", "nobody", "-n", NAMESPACE]
    token = subprocess.run(kubectl, env=env, check=True, capture_output=True, text=True).stdout
    path = tmp_path / "kubeconfig"
    copy = ["kubectl", "config", "view", "--raw", "--minify", "--flatten"]
    path.write_bytes(subprocess.run(copy, env=env, check=True, capture_output=True).stdout)
    theirs = {**env, "KUBECONFIG": str(path)}
    for argv in (
        ["set-credentials", "nobody", f"--token={token.strip()}"],
        ["set-context", "--current", "--user=nobody"],
    ):
        subprocess.run(["kubectl", "config", *argv], env=theirs, check=True, capture_output=True)
    process = _start(theirs, tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"missing in {NAMESPACE}: list pods, get pods/log" in out
    assert "does not allow it (403" in out
    assert "Traceback" not in out
