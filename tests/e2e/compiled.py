"""Programs that end-to-end tests start, compiled from Go modules where no package ships them.

A program is looked for in the folder that ``SAEV_E2E_BIN`` names, in ``.cache/go-bin`` and, where
any version will do, on ``PATH``. If it is nowhere and ``go`` can reach its modules, it is built
into ``.cache/go-bin``. ``python tests/e2e/compiled.py`` builds all that are missing.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
import typing as tp
from collections.abc import Iterator
from pathlib import Path

FOLDER = "SAEV_E2E_BIN"
"""Environment variable: a folder of ready programs."""
BUILD = "SAEV_E2E_BUILD"
"""Environment variable: ``0`` builds nothing, ``1`` also builds what takes long."""
CACHE = Path(__file__).parents[2] / ".cache" / "go-bin"
_HERE = Path(__file__).parent


class Unavailable(Exception):
    """A program is not there and cannot be built; the text says why and what to do."""


class Program(tp.NamedTuple):
    """One program and where it comes from."""

    name: str
    """File name."""
    version: str
    """Part of the cache folder's name, so that another version is another file."""
    package: str
    """Go package; with ``@version`` where it needs no module of ours."""
    module: Path | None = None
    """Folder of the ``go.mod`` that pins it."""
    ldflags: str = ""
    """Further linker flags."""
    slow: bool = False
    """Takes more than a few minutes to build: only on demand."""


_VERSION = "k8s.io/component-base/version"
_KUBERNETES = "1.34.4"
_STAMP = (  # without it the server calls itself v0.0.0
    f"-X {_VERSION}.gitVersion=v{_KUBERNETES} -X {_VERSION}.gitMajor=1 -X {_VERSION}.gitMinor=34"
)

VERSITYGW = Program("versitygw", "1.8.0", "github.com/versity/versitygw/cmd/versitygw@v1.8.0")
ETCD = Program("etcd", "3.6.15", "go.etcd.io/etcd/server/v3", _HERE / "kube_api")
KUBE_APISERVER = Program(
    "kube-apiserver",
    _KUBERNETES,
    "k8s.io/kubernetes/cmd/kube-apiserver",
    _HERE / "kube_api",
    _STAMP,
    slow=True,
)
KUBE_CONTROLLER_MANAGER = Program(
    "kube-controller-manager",
    _KUBERNETES,
    "k8s.io/kubernetes/cmd/kube-controller-manager",
    _HERE / "kube_api",
    _STAMP,
    slow=True,
)
KUBECTL = Program(
    "kubectl", _KUBERNETES, "k8s.io/kubernetes/cmd/kubectl", _HERE / "kube_api", _STAMP
)
TRAINER = Program(
    "trainer-controller-manager",
    "2.3.0",
    "github.com/kubeflow/trainer/v2/cmd/trainer-controller-manager",
    _HERE / "trainer_controllers",
)
JOBSET = Program("jobset", "0.12.0", "sigs.k8s.io/jobset", _HERE / "trainer_controllers")
KUBERNETES = (KUBE_APISERVER, KUBE_CONTROLLER_MANAGER, ETCD)
"""What a Kubernetes API consists of, fitting each other; first what takes long to build."""


def find(program: Program) -> Path:
    """The program's path, built if need be.

    Raises:
        Unavailable: it is nowhere, and cannot or should not be built.
    """
    cached = CACHE / f"{program.name}-{program.version}" / program.name
    with _locked(program):
        ready = _ready(program, cached)
        if ready:
            return ready
        _check_buildable(program)
        _build(program, cached)
    return cached


def source(program: Program, module: str) -> Path:
    """Where the sources of a module are, of which a program is built.

    Raises:
        Unavailable: there is no ``go``, or it cannot reach the module.
    """
    if shutil.which("go") is None:
        raise Unavailable(f"there is no `go` to fetch {module} with")
    assert program.module is not None
    command = ["go", "mod", "download", "-json", module]
    env = {**os.environ, "GOTOOLCHAIN": "local"}
    done = subprocess.run(command, cwd=program.module, env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"{module} cannot be fetched: {last}")
    return Path(json.loads(done.stdout)["Dir"])


def _ready(program: Program, cached: Path) -> Path | None:
    folder = os.environ.get(FOLDER)
    if folder:
        given = Path(folder) / program.name
        if os.access(given, os.X_OK):
            return given
    if os.access(cached, os.X_OK):
        return cached
    on_path = None if program.module else shutil.which(program.name)
    return Path(on_path) if on_path else None


def _check_buildable(program: Program) -> None:
    wanted = os.environ.get(BUILD, "")
    missing = (
        f"{program.name} {program.version} is neither in .cache/go-bin nor where {FOLDER} says"
    )
    if wanted == "0":
        raise Unavailable(f"{missing}, and {BUILD}=0 forbids building it")
    if program.slow and wanted != "1":
        raise Unavailable(f"{missing}; {BUILD}=1 builds it, which takes many minutes")
    if shutil.which("go") is None:
        raise Unavailable(f"{missing}, and there is no `go` to build it with")


def _build(program: Program, target: Path) -> None:
    """Compile into a temporary folder, then move: an interrupted build leaves nothing behind."""
    scratch = target.parent / f".build-{os.getpid()}"
    scratch.mkdir(parents=True, exist_ok=True)
    flags = ["-trimpath", "-buildvcs=false", f"-ldflags=-s -w {program.ldflags}".rstrip()]
    # `go install` takes package@version, `go build` takes a name for what it makes.
    command = (
        ["go", "build", *flags, "-o", str(scratch / program.name), program.package]
        if program.module
        else ["go", "install", *flags, program.package]
    )
    env = {**os.environ, "CGO_ENABLED": "0", "GOBIN": str(scratch), "GOTOOLCHAIN": "local"}
    cwd = program.module or scratch
    try:
        done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Unavailable(f"{program.name} {program.version} could not be built: {last}")
        (scratch / program.name).replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _locked(program: Program) -> Iterator[None]:
    """One builder at a time, whatever the number of pytest workers."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f".{program.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Build what is missing, print where everything is; 1 if something could not be had."""
    os.environ[BUILD] = "1"
    failed = False
    for program in (VERSITYGW, *KUBERNETES, KUBECTL, TRAINER, JOBSET):
        start = time.monotonic()
        try:
            where = str(find(program))
        except Unavailable as err:
            failed, where = True, f"not available: {err}"
        seconds = time.monotonic() - start
        print(f"{program.name} {program.version}: {where} ({seconds:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
