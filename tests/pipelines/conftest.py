"""A KFP and a Kubernetes API for the client's tests."""

import collections.abc
import contextlib
import os
from pathlib import Path

import kfp_server
import kube_server
import pytest
from client import Client
from compiling import compile_pipeline

from pipelines import prepare, settings

CONFIG = """\
[data]
kind = "img-folder"
root = "s3://bucket/default"

[shards]
family = "dinov2"
ckpt = "vits14"
layers = [-1]

[train]
n_train = 1000
sweep = "sweep.toml"
"""
SWEEP = """\
[sae.activation]
kind = "top-k"
top_k = [8, 16]
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working folder with a config, and none of the machine's settings.

    A pipeline is compiled once for all tests.
    """
    monkeypatch.setattr(prepare, "compile_pipeline", compile_pipeline)
    for name in (*settings.ENVIRONMENT.values(), "KUBERNETES_SERVICE_HOST", "SAEV_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("config.toml").write_text(CONFIG)
    tmp_path.joinpath("sweep.toml").write_text(SWEEP)
    return tmp_path


@pytest.fixture
def client(home: Path, capsys: pytest.CaptureFixture[str]) -> Client:
    """Runs commands."""
    return Client(capsys)


@pytest.fixture
def kfp(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> collections.abc.Iterator[kfp_server.KfpServer]:
    """A single-user KFP at KFP_ENDPOINT. Requests that the swagger file forbids fail the test."""
    with _serving(monkeypatch, multi_user=False) as server:
        yield server
        assert server.violations == []


@pytest.fixture
def shared_kfp(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> collections.abc.Iterator[kfp_server.KfpServer]:
    """The same, multi-user."""
    with _serving(monkeypatch, multi_user=True) as server:
        yield server
        assert server.violations == []


@pytest.fixture
def kube(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> collections.abc.Iterator[kube_server.KubeServer]:
    """A Kubernetes API at KUBECONFIG. Objects that Kubernetes' schemas forbid fail the test."""
    with kube_server.running() as server:
        server.write_kubeconfig(home / "kubeconfig")
        monkeypatch.setenv("KUBECONFIG", str(home / "kubeconfig"))
        yield server
        assert server.violations == []


@contextlib.contextmanager
def _serving(
    monkeypatch: pytest.MonkeyPatch, *, multi_user: bool
) -> collections.abc.Iterator[kfp_server.KfpServer]:
    with kfp_server.running(multi_user) as server:
        monkeypatch.setenv("KFP_ENDPOINT", server.url)
        monkeypatch.setenv("SAEV_ROOT", "s3://bucket/saev")
        monkeypatch.setenv("SAEV_IMAGE", "registry.test/saev:1")
        yield server
