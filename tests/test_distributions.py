"""The distribution's name, the other one of a package saev, and the files that come with ours."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import saev
from saev import distributions
from saev.config.named import named_config, named_sweep
from saev.config.run import RunFile

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "images/Dockerfile").read_text()
PACKAGES = sorted(p.parent.name for p in ROOT.glob("saev/*/__init__.py"))
FIRST = {
    "demo": "demo.photos", "explorer": "explorer.page", "inference": "inference.stage",
    "launch": "launch.runs", "serve": "serve.app",
    "steps": "steps.step", "visuals": "visuals.choose",
}  # fmt: skip
"""A module of those packages that import nothing by themselves."""


def mixed(tmp_path: Path) -> Path:
    """A folder in which the published saev 0.1.0 was installed over ours, as pip does it."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "saev", site / "saev", ignore=shutil.ignore_patterns("__pycache__"))
    (site / "saev" / "__init__.py").write_text('"""Theirs."""\n')
    (site / "saev" / "__main__.py").write_text('print("theirs")\n')
    info = site / "saev-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: saev\nVersion: 0.1.0\n")
    return site


IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as err:
        print(name, str(err).startswith("This environment has two distributions"))
    else:
        print(name, "was imported")
"""


@pytest.mark.slow
def test_no_package_works_on_files_of_two_distributions(tmp_path: Path) -> None:
    names = [f"saev.{FIRST.get(name, name)}" for name in PACKAGES]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names],
        cwd=mixed(tmp_path), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"{name} True" for name in names]


def test_the_command_says_it_in_one_sentence(tmp_path: Path) -> None:
    """The script calls saev.entry, which the other distribution does not have."""
    code = "import saev.entry; saev.entry.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=mixed(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("saev: error: This environment has two distributions")
    assert done.stderr.count("\n") == 1


def test_one_distribution_is_no_conflict() -> None:
    assert distributions.conflict() == ""


def test_extras_that_errors_name_exist() -> None:
    """Every extra for which an error tells people to install it is one of pyproject.toml's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == distributions.NAME
    assert {"s3", "gs", "hf", "heic", "wandb", "demo"} <= project["optional-dependencies"].keys()
    for path in (*ROOT.glob("saev/**/*.py"), *ROOT.glob("pipelines/*.py")):
        assert "pip install 'saev[" not in path.read_text(), path


def test_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "saev", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"saevit {saev.__version__}, Python 3.")


# --- Configs by name -----------------------------------------------------------------------------


def test_configs_and_sweeps_by_name() -> None:
    for path in ROOT.glob("saev/configs/*.toml"):
        assert Path(named_config(path.stem)) == path
        RunFile.portable(named_config(path.stem))
    for path in ROOT.glob("saev/configs/sweeps/*.toml"):
        assert Path(named_sweep(path.stem)) == path


def test_paths_of_the_version_before_are_found() -> None:
    ours = ROOT / "saev" / "configs"
    assert Path(named_config("configs/dinov2-small.toml")) == ours / "dinov2-small.toml"
    assert Path(named_sweep("configs/sweep-topk.toml")) == ours / "sweeps" / "topk.toml"


def test_a_file_of_the_user_goes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("topk").write_text("lr = [1e-3]\n")
    assert named_sweep("topk") == "topk"


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(ValueError, match="it has clip-vitb16, dinov2-small"):
        named_config("dinov3")
    with pytest.raises(ValueError, match="it has kinds, layers, lr, relu, topk"):
        named_sweep("topp")
    assert named_sweep("s3://bucket/topp") == "s3://bucket/topp"
    assert named_sweep("") == ""


# --- Versions, from git's tags -------------------------------------------------------------------


def made_of_git(folder: Path) -> str:
    """The version of a tree that is built in a folder."""
    code = "from setuptools_scm import get_version; print(get_version(**{}))"
    options = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["setuptools_scm"]
    for name in ("version_file", "version_file_template"):
        options.pop(name)
    done = subprocess.run(
        [sys.executable, "-c", code.format(options)],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with our pyproject.toml, without git."""
    folder = tmp_path / "tree"
    folder.mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def git(folder: Path, *words: str) -> None:
    user = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    subprocess.run(["git", *user, *words], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "one more")


def test_the_version_is_that_of_the_tag(tree: Path, tmp_path: Path) -> None:
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    commit(tree)
    assert re.fullmatch(r"0\.2\.0\.dev1\+g[0-9a-f]+", made_of_git(tree)), "no tag yet"
    git(tree, "tag", "v0.3.0")
    assert made_of_git(tree) == "0.3.0"
    commit(tree)
    assert re.fullmatch(r"0\.3\.1\.dev1\+g[0-9a-f]+", made_of_git(tree))
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "--quiet", "--depth", "1", tree.as_uri(), str(shallow))
    assert re.fullmatch(r"0\.2\.0\.dev1\+g[0-9a-f]+", made_of_git(shallow)), "no tag is reachable"


def test_without_git_there_is_a_fallback(tree: Path) -> None:
    assert made_of_git(tree) == "0.2.0.dev0"


def test_an_image_gets_the_version_of_the_commit(tree: Path) -> None:
    """As images/Dockerfile writes it, whose builds see no git."""
    (line,) = re.findall(r"^.*(printf .*\.git_archival\.txt)", DOCKERFILE, re.MULTILINE)
    script = line.replace("/src/", "").replace("; fi", "")
    env = {"DESCRIBED": "v0.3.0-5-gabcdef1", "PATH": os.environ["PATH"]}
    subprocess.run(["sh", "-c", script], cwd=tree, check=True, env=env)
    assert made_of_git(tree) == "0.3.1.dev5+gabcdef1"
    subprocess.run(
        ["sh", "-c", script], cwd=tree, check=True, env={**env, "DESCRIBED": "v0.3.0-0-gabcdef1"}
    )
    assert made_of_git(tree) == "0.3.0"
