"""`make show`: pages of a run from its storage."""

import base64
import os
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from client import Client
from kfp_server import KfpServer
from kube_server import KubeServer

from saev import storage

ROOT = Path(__file__).parents[2]


def shown(*argv: str) -> tuple[str, str, int]:
    """The page that `show` serves, its messages, and its status after Ctrl-C."""
    command = [sys.executable, "-m", "pipelines", "show", "--no-browser", *argv]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout
        address = process.stdout.readline().strip()
        if not address:
            return "", process.communicate()[1], process.wait()
        page = urllib.request.urlopen(address, timeout=60).read().decode()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        return page, err, process.returncode
    finally:
        process.kill()


@pytest.fixture
def root(home: Path) -> Path:
    """A root with a page."""
    folder = home / "root"
    folder.mkdir()
    (folder / "index.html").write_text("<p>all of it</p>")
    return folder


def test_the_root_of_a_run_on_object_storage(client: Client, kfp: KfpServer, s3: str) -> None:
    storage.write_text(f"{s3}/all/index.html", "<p>from S3</p>")
    client.ok("submit", "--no-check", "--root", f"{s3}/all", "--dataset", f"{s3}/pets",
              "--name", "pets")  # fmt: skip
    page, err, status = shown("pets")
    assert page == "<p>from S3</p>", err
    assert f"Serving {s3}/all. Ctrl-C ends it." in err
    assert status == 0


def test_a_url_and_the_root_of_the_settings(
    root: Path, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shown(f"{root}/index.html")[0] == "<p>all of it</p>"
    monkeypatch.setenv("SAEV_ROOT", str(root))
    assert shown()[0] == "<p>all of it</p>"


def test_what_cannot_be_shown(
    client: Client, kfp: KfpServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.fails("show", "nope").startswith("There is no run 'nope'")
    assert client.fails("show", str(home)).startswith(f"There is no page {home}/index.html")
    monkeypatch.setenv("SAEV_STORAGE", "pvc")
    monkeypatch.setenv("SAEV_ROOT", "/data/saev")
    assert client.fails("show").startswith("/data/saev is on the pods' volume")
    monkeypatch.delenv("SAEV_ROOT")
    assert "Set SAEV_ROOT (root in cluster.toml)" in client.fails("show")


# --- With the pods' settings and keys ------------------------------------------------------------


@pytest.fixture
def without_keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of the S3 server, taken away."""
    found = {name: text for name, text in os.environ.items() if name.startswith("AWS_")}
    for name in found:
        monkeypatch.delenv(name)
    return found


def test_a_store_inside_the_cluster_is_shown_with_the_pods_keys(
    kube: KubeServer, s3: str, request: pytest.FixtureRequest
) -> None:
    """Its name is known only there; the service's port is another one than that of its pods."""
    storage.write_text(f"{s3}/inside/index.html", "<p>from inside</p>")
    keys = request.getfixturevalue("without_keys")
    endpoint = urllib.parse.urlsplit(keys.pop("AWS_ENDPOINT_URL"))
    config = {
        "AWS_ENDPOINT_URL": "http://minio.storage.svc:80", "SAEV_ROOT": f"{s3}/inside",
        "AWS_DEFAULT_REGION": keys.pop("AWS_DEFAULT_REGION"), "PATH": "/nowhere",
    }  # fmt: skip
    kube.add("configmaps", "saev-config", "kubeflow", data=config)
    secret = {name: base64.b64encode(text.encode()).decode() for name, text in keys.items()}
    kube.add("secrets", "saev-storage", "kubeflow", data=secret)
    selector = {"app": "minio"}
    kube.add(
        "services", "minio", "storage",
        spec={"selector": selector, "ports": [{"port": 80, "targetPort": "api"}]},
    )  # fmt: skip
    container = {"name": "m", "image": "i", "ports": [{"name": "api", "containerPort": 9000}]}
    kube.add(
        "pods", "minio-0", "storage", labels=selector, spec={"containers": [container]},
        status={"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
    )  # fmt: skip
    assert endpoint.port
    kube.forwards["minio-0"] = endpoint.port
    page, err, status = shown("--from-cluster")
    assert page == "<p>from inside</p>", err
    assert status == 0


def test_without_the_config_map_it_says_where_it_looked(kube: KubeServer) -> None:
    _, err, status = shown("--from-cluster")
    assert "There is no config map saev-config in namespace kubeflow: set KFP_NAMESPACE" in err
    assert status == 1
