"""The wheel of saevit-client, built from a copy of the tree, in an environment of its own."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import typing as tp
from pathlib import Path

import pytest
from kfp_server import KfpServer

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
LINKED = ("saev", "pipelines", "components")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Installed(tp.NamedTuple):
    """An environment in which only the client is installed."""

    prefix: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.prefix / "bin/python"

    @property
    def site(self) -> Path:
        """Its folder of packages."""
        (found,) = self.prefix.glob("lib/*/site-packages")
        return found

    def __call__(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run the client's command in the current folder, with the current environment."""
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        command = [self.prefix / "bin/saevit-client", *argv]
        return subprocess.run(command, env=env, capture_output=True, text=True)


def run(*argv: str | Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(project: Path, kind: str, out: Path) -> Path:
    """Build the wheel or the sdist of a project. Returns its path."""
    run(
        UV, "build", f"--{kind}", "--quiet", "--offline", "--no-build-isolation",
        "--python", sys.executable, "--out-dir", out, project,
    )  # fmt: skip
    (found,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheels of the client (from its sdist) and of the library, of a tree without git."""
    place = tmp_path_factory.mktemp("wheels")
    source = place / "source"
    left_out = shutil.ignore_patterns("__pycache__", "_version.py", "*.egg-info", "build")
    for name in (*LINKED, "saevit-client"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    library = build(source, "wheel", place / "library")
    sdist = build(source / "saevit-client", "sdist", place / "sdist")
    shutil.unpack_archive(sdist, place / "unpacked", filter="data")
    shutil.rmtree(source)
    (project,) = (place / "unpacked").iterdir()
    return build(project, "wheel", place / "client"), library


@pytest.fixture(scope="module")
def client(wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The client in an empty environment, with the packages of its lock."""
    installed = Installed(tmp_path_factory.mktemp("client"))
    run(sys.executable, "-m", "venv", "--without-pip", installed.prefix)
    lock = ROOT / "requirements/client.lock"
    to = ("--quiet", "--python", installed.python)
    run(UV, "pip", "sync", *to, "--require-hashes", lock)
    run(UV, "pip", "install", *to, "--offline", "--no-deps", wheels[0])
    run(UV, "pip", "check", *to)
    return installed


def owned(site: Path, distribution: str) -> set[str]:
    """The files of a distribution in the folder of packages."""
    (record,) = site.glob(f"{distribution}-*.dist-info/RECORD")
    lines = record.read_text().splitlines()
    return {name for line in lines if not (name := line.split(",")[0]).startswith("..")}


def test_the_client_has_no_torch_and_is_small(client: Installed, wheels: tuple[Path, Path]) -> None:
    names = {path.name.lower() for path in client.site.iterdir()}
    assert not names & {"torch", "torchvision", "timm", "open_clip", "scipy", "pyarrow", "saev"}
    assert owned(client.site, "saevit_client") > {"saevit_client/__init__.py"}
    size = sum(path.stat().st_size for path in client.site.rglob("*") if path.is_file())
    print(f"wheel {wheels[0].stat().st_size / 1e3:.0f} kB, environment {size / 1e6:.0f} MB")
    assert wheels[0].stat().st_size < 500_000
    assert size < 500_000_000  # docs/cluster-client.md says how large it is


def test_its_wheel_has_all_that_its_modules_import(client: Installed) -> None:
    """Also imports that stand in functions."""
    lib = client.site / "saevit_client/lib"
    # The modules at the top of saev are there because their package is, used or not.
    files = [path for path in lib.rglob("*.py") if path.parent != lib / "saev"]
    assert len(files) > 80
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
                if (lib.joinpath(*node.module.split(".")) / "__init__.py").exists():
                    found = (f"{node.module}.{alias.name}" for alias in node.names)
                    names += [n for n in found if (ROOT / n.replace(".", "/")).is_dir()]
            else:
                continue
            for name in names:
                if name.split(".")[0] in LINKED:
                    there = lib.joinpath(*name.split("."))
                    assert there.is_dir() or there.with_suffix(".py").exists(), f"{path}: {name}"


def test_submit_and_status(client: Installed, kfp: KfpServer, home: Path) -> None:
    """From nothing but the wheel and a config by name; messages name this command, not make."""
    done = client(
        *("submit", "--no-check", "--dataset", "s3://bucket/pets", "--config", "dinov2-small")
    )
    assert done.returncode == 0, done.stderr
    run_id = kfp.runs[0]["run_id"]
    assert done.stdout.strip().endswith(run_id)
    assert f"saevit-client status {run_id}   shows its steps" in done.stderr
    assert "make " not in done.stderr
    assert "pets" in client("status").stdout


def test_compiles_what_the_checkout_compiles(
    client: Installed, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEV_IMAGE", "registry.test/saev:1")
    done = client("compile", "--out", "-")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "pipelines", "compile", "--out", "-"]
    ours = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ours.stdout


def test_help_version_and_a_wrong_command(client: Installed, home: Path) -> None:
    assert "usage: saevit-client submit" in client("submit", "--help").stdout
    assert re.match(r"saevit-client \d\S*, Python 3\S*, kfp 2\S*, kub", client("--version").stdout)
    wrong = client("cancel", "")
    assert wrong.returncode == 1
    assert wrong.stderr == (
        "saevit-client: error: No run is named. `saevit-client list` shows them; "
        "`saevit-client cancel …`.\n"
    )


def test_processes_need_the_library(client: Installed, home: Path) -> None:
    argv = ("run-local", "--runner", "process", "--config", "config.toml", "--dataset", str(home))
    done = client(*argv)
    assert done.returncode == 1
    assert "Steps as processes need saevit (with torch) in this environment" in done.stderr


def test_both_in_one_environment(client: Installed, wheels: tuple[Path, Path], home: Path) -> None:
    """They have no file in common, so each works whether or not the other is there."""
    to = ("--quiet", "--python", client.python)
    run(UV, "pip", "install", *to, "--offline", "--no-deps", wheels[1])
    assert not owned(client.site, "saevit_client") & owned(client.site, "saevit")
    assert run(client.prefix / "bin/saev", "--version").startswith("saevit ")
    assert client("--version").stdout.startswith("saevit-client ")
    run(UV, "pip", "uninstall", *to, "saevit")
    assert client("submit", "--help").returncode == 0


def test_its_ranges_are_those_of_the_library() -> None:
    ours, theirs = (
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text())
        for folder in ("saevit-client", ".")
    )
    project, library = ours["project"], theirs["project"]
    extras = library["optional-dependencies"]
    assert set(project["dependencies"]) <= {*library["dependencies"], *extras["kfp"]}
    assert set(extras["kfp"]) <= set(project["dependencies"])
    assert all(extras[name] == lines for name, lines in project["optional-dependencies"].items())
    assert ours["build-system"] == theirs["build-system"]
    for key in ("license", "requires-python", "classifiers"):
        assert set(project[key]) <= set(library[key])
    assert ours["tool"]["setuptools_scm"].items() > {
        (key, value)
        for key, value in theirs["tool"]["setuptools_scm"].items()
        if key != "version_file"
    }
