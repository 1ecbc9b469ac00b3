"""The arrows of docs/design: imports point one way, and importing saev is cheap."""

import ast
import functools
import graphlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saev import storage

ROOT = Path(__file__).parents[1] / "saev"

# Lower rooms know nothing of higher ones. Rooms of the same level do not import each other, except
# the pairs named in ALLOWED.
LEVELS = {
    "_version": -3, "version": -2, "distributions": -1, "secrets": -1,
    "console": 0, "errors": 0, "eta": 0, "interrupts": 0, "once": 0, "limits": 0, "grouping": 1,
    "storage": 1,
    "config": 2, "cores": 2, "device": 2, "failures": 2, "hub": 2, "known": 2, "progress": 2,
    "torchrun": 2,
    "names": 3, "stage": 3, "launch": 3, "images": 3, "vit": 3, "shards": 3, "loaders": 3, "nn": 3,
    "parquet": 3,
    "driver": 4, "shards.extract": 5, "train": 5, "inference": 5, "visuals": 5,
    "chain": 6, "explorer": 6, "visuals.stage": 7, "after": 7, "look": 7, "notebook": 7,
    "opened": 7, "shorthand": 7, "size": 7, "steps": 7, "tables": 7, "gc": 8, "run": 8,
    "serve": 8, "usage": 8, "cli": 9, "demo": 10, "entry": 10, "notebooks": 10,
    "__main__": 11,
}  # fmt: skip
ALLOWED = {
    ("vit", "images"), ("loaders", "shards"), ("nn", "config"), ("visuals", "inference"),
    ("config", "progress"),
}  # fmt: skip


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """The syntax of a file."""
    return list(ast.walk(ast.parse(path.read_text())))


def room(module: str) -> str | None:
    """The room of a dotted module name below saev; None for the package itself."""
    parts = module.split(".")[1:]
    if not parts:
        return None
    if parts[0] == "shards" and parts[1:2] in (["extract"], ["earlier"]):
        return "shards.extract"
    if parts[0] == "visuals" and parts[1:2] in ([], ["report"], ["stage"]):
        return "visuals.stage"
    return parts[0]


def imports(path: Path) -> set[str]:
    """Dotted saev modules that a file imports, wherever in the file."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "saev"}


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    module = "saev." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    here = room(module.removesuffix(".__init__"))
    if here is None:
        return
    for name in imports(path):
        there = room(name)
        if there is None or there == here or there not in LEVELS or (here, there) in ALLOWED:
            continue
        assert LEVELS[there] < LEVELS[here], f"{module} ({here}) imports {name} ({there})"


def test_no_circles() -> None:
    """Inside rooms too, and wherever in a file an import stands."""
    modules = {
        ".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p
        for p in FILES
    }
    graph = {
        module: {name if name in modules else name.rpartition(".")[0] for name in imports(path)}
        for module, path in modules.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as err:
        pytest.fail(f"modules import each other in a circle: {' ← '.join(err.args[1])}")


def test_every_room_has_a_level() -> None:
    rooms = {room("saev." + ".".join(p.relative_to(ROOT).with_suffix("").parts)) for p in FILES}
    assert rooms - {"__init__"} <= set(LEVELS)


@pytest.mark.parametrize("folder", ["components", "pipelines"])
def test_the_cluster_side_knows_little_of_saev(folder: str) -> None:
    """It runs where no torch is: on a laptop that submits, in a pod that compiles."""
    for path in sorted((ROOT.parent / folder).rglob("*.py")):
        for name in imports(path):
            allowed: tuple[str, ...] = {
                "components": ("config", "launch"),
                "pipelines": (
                    "config",
                    "console",
                    "distributions",
                    "errors",
                    "interrupts",
                    "launch",
                    "opened",
                    "secrets",
                    "storage",
                ),
            }[folder]  # fmt: skip
            is_version = name == "saev"  # the package itself, for its version
            assert is_version or room(name) in allowed, f"{path} imports {name}"


def test_saev_knows_nothing_of_kubernetes() -> None:
    """But for the steps that start others, which import its client when they need it."""
    for path in FILES:
        if path.parent == ROOT / "launch":
            continue
        for node in nodes(path):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            for name in names:
                top = name.split(".")[0]
                assert top not in ("kfp", "kubernetes", "components", "pipelines"), path


def test_the_client_starts_without_torch_or_kfp() -> None:
    found = imported_with("pipelines.cli")
    assert {"pipelines.arguments", "pipelines.settings"} <= found
    assert not found & {"torch", "kfp", "docker"}


def test_no_relative_imports() -> None:
    for path in FILES:
        for node in nodes(path):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


@pytest.mark.parametrize("module", ["saev.cli", "saev.steps.step"])
def test_importing_is_cheap(module: str) -> None:
    found = imported_with(module)
    assert {"saev", "saev.config", "saev.storage"} <= found
    heavy = {"torch", "open_clip", "timm", "wandb", "kfp", "datasets", "matplotlib", "kubernetes"}
    heavy |= {"aiohttp", "botocore"}
    assert not found & heavy


def imported_with(module: str) -> set[str]:
    """All that a new process has imported when it has imported a module."""
    code = f"import sys, {module}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["saev.cli", "saev.steps.step", "saev.gc", "saev.size"])
def test_the_small_image_has_what_it_needs(module: str) -> None:
    """It has the packages of requirements/cpu.in, and discovers, reports and cleans up."""
    absent = ["torch", "jaxtyping", "pyarrow", "scipy", "timm", "open_clip", "torchvision"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_storage_opens_files() -> None:
    for path in FILES:
        if room("saev." + ".".join(path.relative_to(ROOT).with_suffix("").parts)) == "storage":
            continue
        for node in nodes(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "open", f"{path}:{node.lineno} opens a file itself"


def test_what_storage_offers_is_used() -> None:
    """vulture takes a name in ``__all__`` for one that is used."""
    others = [p for name in ("saev", "pipelines") for p in (ROOT.parent / name).rglob("*.py")]
    text = "".join(p.read_text() for p in others if p.parent != ROOT / "storage")
    offered = [name for name in storage.__all__ if inspect.isfunction(getattr(storage, name))]
    assert [name for name in offered if not re.search(rf"\bstorage\.{name}\b", text)] == []


def test_each_module_has_its_own_logger() -> None:
    """Called logger, after the module; log levels are set on `saev` alone."""
    for path in FILES:
        for node in nodes(path):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
                continue
            if ast.unparse(node.value.func) == "logging.getLogger":
                found = (ast.unparse(node.targets[0]), ast.unparse(node.value.args[0]))
                is_main = path.name == "supervisor.py"  # started as __main__
                expected = "'saev.steps.supervisor'" if is_main else "__name__"
                assert found == ("logger", expected), f"{path}:{node.lineno}"


def test_nothing_is_unpickled() -> None:
    """pickle serves for the error that torch's restricted loader raises, and for nothing else."""
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("pickle", "dill", "joblib"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr == "UnpicklingError", f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                safe = {"weights_only": "True", "allow_pickle": "False"}
                given = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
                assert given.items() & safe.items(), f"{path}:{node.lineno}"
