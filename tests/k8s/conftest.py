"""Programs that build kustomizations, and a copy of k8s/ with its private files filled in."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from k8s.checks import Json

ROOT = Path(__file__).parents[2]
FETCHED = ROOT / ".cache" / "bin"
"""Where fetch_kubectl.py puts kubectl."""

Render = Callable[..., list[Json]]


@pytest.fixture(scope="session")
def path() -> str:
    """A PATH with kubectl or kustomize on it."""
    found = f"{FETCHED}{os.pathsep}{os.environ['PATH']}"
    if not (shutil.which("kubectl", path=found) or shutil.which("kustomize", path=found)):
        pytest.skip(
            "neither kubectl nor kustomize is installed; "
            "`python tests/k8s/fetch_kubectl.py .cache/bin` fetches kubectl"
        )
    return found


@pytest.fixture(scope="session")
def build(path: str) -> Render:
    """Builds one folder, as `kubectl kustomize` does."""

    def run(folder: Path) -> list[Json]:
        has_kubectl = shutil.which("kubectl", path=path) is not None
        command = ["kubectl", "kustomize"] if has_kubectl else ["kustomize", "build"]
        done = subprocess.run(
            [*command, str(folder)],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return list(yaml.load_all(done.stdout, yaml.CSafeLoader))

    return run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of k8s/, with the private files as their examples are."""
    copy = tmp_path / "k8s"
    private = shutil.ignore_patterns("config.env", "storage.env", "kfp-launcher.yaml")
    shutil.copytree(ROOT / "k8s", copy, ignore=private)
    components = copy / "components"
    config = (components / "settings" / "config.env.example").read_text()
    (components / "settings" / "config.env").write_text(config)
    (components / "storage-secret" / "storage.env").write_text(
        "AWS_ACCESS_KEY_ID=someone\nAWS_SECRET_ACCESS_KEY=secret/+=\n"
    )
    launcher = components / "kfp-launcher"
    shutil.copy(launcher / "kfp-launcher.example.yaml", launcher / "kfp-launcher.yaml")
    return copy


@pytest.fixture
def installer(path: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a copy's install.py."""

    def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("KFP_")}
        return subprocess.run(
            [sys.executable, str(tree / "install.py"), *arguments],
            env={**env, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def render(tree: Path, installer: Callable[..., subprocess.CompletedProcess[str]]) -> Render:
    """What `make install` would apply."""

    def run(*arguments: str) -> list[Json]:
        done = installer(tree, "render", *arguments)
        assert done.returncode == 0, done.stderr
        return list(yaml.load_all(done.stdout, yaml.CSafeLoader))

    return run
