"""The images: what is in them, what is not, and whether every stage works in a restricted pod."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from containers import ROOT, Container, Docker, Images
from PIL import Image

# Steps, batches and arithmetic that two busy cores finish in some seconds.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SHARDS = (
    "shards --shards-root /data/shards --family timm --ckpt test_vit/random --image-size 64 "
    "--layers -1 data:fake-img --data.n-examples 48 --data.image-size 64"
).split()
N_STEPS, EVERY = 3000, 1000
TRAIN = (
    "train --runs-root /data/runs --train-data.shards {shards} --batch-size 256 --sae.d-sae 128 "
    f"sae.activation:top-k --sae.activation.top-k 4 --n-train {256 * N_STEPS} "
    f"--checkpoint-every {EVERY} --checkpoint-minutes 0"
)


@pytest.fixture(params=["gpu", "cpu"])
def image(request: pytest.FixtureRequest, saev_images: Images) -> str:
    """Each image in turn."""
    return str(getattr(saev_images, request.param))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder that any user of a container may write to."""
    return writable(tmp_path / "data")


def writable(folder: Path) -> Path:
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def python(docker: Docker, image: str, code: str) -> str:
    """What a program prints in an image."""
    done = docker.run(image, "-c", code, entrypoint="python")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- What is inside ------------------------------------------------------------------------


def test_labels_name_the_commit(docker: Docker, image: str) -> None:
    labels = json.loads(docker.inspect(image, "{{json .Config.Labels}}"))
    label = {key.rpartition(".")[2]: value for key, value in labels.items()}
    git = ["git", "-C", str(ROOT)]
    described = subprocess.run(
        [*git, "describe", "--tags", "--always", label["revision"]], capture_output=True, text=True
    )
    assert described.returncode == 0, "the label names no commit of this repository"
    assert label["version"].removesuffix("-dirty") == described.stdout.strip()
    assert label["licenses"] == "MIT"
    version = python(docker, image, "import os; print(os.environ['SAEV_VERSION'])")
    assert version == label["version"]


def test_an_unknown_user_without_any_right_gets_help(docker: Docker, image: str) -> None:
    done = docker.run(image, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: saev" in done.stdout
    assert done.stderr == ""


def test_the_user_is_a_number_and_not_root(docker: Docker, image: str) -> None:
    user = docker.inspect(image, "{{.Config.User}}")
    assert re.fullmatch(r"[1-9]\d*:0", user), "runAsNonRoot is checked against a number"


def test_nothing_that_builds_or_installs(docker: Docker, image: str) -> None:
    commands = "pip pip3 uv gcc g++ cc c++ clang ld as make cmake git curl wget nvcc conda".split()
    modules = "pip setuptools wheel ensurepip uv triton kfp pytest ruff mypy onnx".split()
    code = (
        "import importlib.util, json, os, shutil\n"
        f"print(json.dumps([[c for c in {commands} if shutil.which(c)],\n"
        f"  [m for m in {modules} if importlib.util.find_spec(m)],\n"
        "  os.listdir('/var/lib/apt/lists')]))"
    )
    assert json.loads(python(docker, image, code)) == [[], [], []]


def test_packages_are_the_lock_and_saev(docker: Docker, saev_images: Images) -> None:
    code = (
        "import importlib.metadata as m, json\n"
        "versions = {d.name.lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps(versions))"
    )
    for flavour, image in saev_images._asdict().items():
        found = json.loads(python(docker, image, code))
        assert found.pop("saevit")
        lock = (ROOT / f"requirements/{flavour}.lock").read_text()
        locked = re.findall(r"^([a-z0-9.-]+)==([^ ;]+)", lock, re.MULTILINE)
        assert found.items() <= set(locked)
        assert len(found) > 30


def test_a_bill_of_materials_is_the_lock(docker: Docker, saev_images: Images) -> None:
    for flavour, image in saev_images._asdict().items():
        place = "/usr/share/doc/saev/sbom.cdx.json"
        bill = json.loads(python(docker, image, f"print(open({place!r}).read())"))
        assert bill["bomFormat"] == "CycloneDX"
        listed = [(c["name"].lower().replace("_", "-"), c["version"]) for c in bill["components"]]
        lock = (ROOT / f"requirements/{flavour}.lock").read_text()
        # A package may be there twice, for older and for newer Pythons.
        assert sorted(listed) == sorted(re.findall(r"^([a-z0-9.-]+)==([^ ;]+)", lock, re.MULTILINE))
        hashes = {
            found["content"]
            for component in bill["components"]
            for reference in component["externalReferences"]
            for found in reference.get("hashes", [])
        }
        assert hashes == set(re.findall(r"--hash=sha256:([0-9a-f]{64})", lock))
        beside = ROOT / "build/sbom" / (image.rpartition("/")[2].replace(":", "-") + ".cdx.json")
        assert json.loads(beside.read_text()) == bill


def test_the_base_is_named(docker: Docker, image: str, base_image: str) -> None:
    labels = json.loads(docker.inspect(image, "{{json .Config.Labels}}"))
    assert labels["org.opencontainers.image.base.name"] == base_image


def test_nothing_of_this_machine(docker: Docker, image: str) -> None:
    code = (
        "import pathlib, sys\n"
        f"wanted = {str(ROOT).encode()!r}\n"
        "saev = [p for p in pathlib.Path(sys.prefix).glob('lib/*/site-packages/saev*/**/*')]\n"
        "assert len(saev) > 50\n"
        "print([str(p) for p in saev if p.is_file() and wanted in p.read_bytes()])"
    )
    assert python(docker, image, code) == "[]"
    assert str(ROOT) not in docker.inspect(image, "{{json .}}")


def test_only_temporary_folders_can_be_written_to(docker: Docker, image: str) -> None:
    """Even where the root file system is not read-only."""
    code = (
        "import os\n"
        "skip = ('/proc', '/sys', '/dev', '/tmp', '/var/tmp', '/run/lock', '/var/lock')\n"
        "print([p for p, d, f in os.walk('/') if not p.startswith(skip) and os.access(p, os.W_OK)])"
    )
    done = docker.run(image, "-c", code, entrypoint="python", flags=["--read-only=false"])
    assert done.stdout.strip() == "[]"


def test_byte_code_is_there_and_current(docker: Docker, image: str) -> None:
    """A read-only file system cannot keep what is compiled at a start."""
    code = (
        "import importlib.util, json, os, pathlib, sys\n"
        "site = next(p for p in sys.path if p.endswith('site-packages'))\n"
        "sources = [str(p) for p in pathlib.Path(site, 'saev').rglob('*.py')]\n"
        "cached = [importlib.util.cache_from_source(p) for p in sources]\n"
        "unchecked = [open(c, 'rb').read(8)[4] == 1 for c in cached]\n"
        "assert len(cached) > 50 and all(unchecked), cached"
    )
    assert python(docker, image, code) == ""


def test_a_cpu_limit_is_a_limit_of_threads(docker: Docker, saev_images: Images) -> None:
    code = (
        "from saev import cores; cores.limit_threads(); import torch; "
        "print(cores.available(), torch.get_num_threads())"
    )
    done = docker.run(saev_images.gpu, "-c", code, entrypoint="python", flags=["--cpus=1.5"])
    assert done.stdout.split() == ["1", "1"], done.stderr


def test_the_small_image_has_no_torch(docker: Docker, saev_images: Images) -> None:
    code = (
        "from importlib.util import find_spec\n"
        "print([m for m in ('torch', 'torchvision', 'timm', 'nvidia') if find_spec(m)])"
    )
    assert python(docker, saev_images.cpu, code) == "[]"
    variables = docker.inspect(saev_images.cpu, "{{json .Config.Env}}")
    assert "NVIDIA_VISIBLE_DEVICES" not in variables, "it would be given every GPU of a node"


def test_the_small_image_does_its_steps(docker: Docker, saev_images: Images, data: Path) -> None:
    """What `components/` gives to it, and the commands of an operator."""
    writable(data / "photos")
    Image.new("RGB", (32, 32)).save(data / "photos/black.png")
    config = {
        "data": {"kind": "img-folder", "root": "/data/photos"},
        "shards": {"family": "timm", "ckpt": "test_vit/random", "layers": [-1]},
        "train": {"n_train": 100},
    }

    def run(*args: object) -> str:
        done = docker.run(saev_images.cpu, *args, mounts={data: "/data"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("step", "check", "--root", "/data/out")
    run(
        *("step", "discover", "--root", "/data/out", "--dataset", "/data/photos"),
        *("--config", json.dumps(config), "--owner", "me", "--to-job", "/data/found"),
    )
    assert re.fullmatch(r"/data/out/jobs/[0-9a-f]{12}", (data / "found").read_text())
    run("step", "outcome", "--root", "/data/out", "--owner", "me")
    writable(data / "other")
    writable(data / "other/shards")
    assert "Nothing to delete" in run("gc", "--root", "/data/other")
    assert "memory of the GPU" in run("size", "--model", "clip-vitb16", "--n-images", 10)
    # The page that `step report` writes; a whole run of it is in the tests of the pipeline.
    modules = "saev.inference.results, saev.visuals.overview, s3fs, gcsfs"
    assert python(docker, saev_images.cpu, f"import {modules}") == ""


def test_the_small_image_says_what_it_cannot_do(docker: Docker, saev_images: Images) -> None:
    done = docker.run(saev_images.cpu, *SHARDS)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.match("saev: error: `saev shards` needs .*use the image saev", done.stderr)


# --- Stages, signals and kills -------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(
    docker: Docker, saev_images: Images, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder with recorded activations, and their URL in a container that has it as /data."""
    folder = writable(tmp_path_factory.mktemp("images") / "data")
    done = docker.run(saev_images.gpu, *SHARDS, mounts={folder: "/data"}, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout.strip().removeprefix("file://")


@pytest.fixture
def start_training(
    docker: Docker, saev_images: Images, shards: tuple[Path, str]
) -> Callable[[Path], Container]:
    """Starts training into a folder, which is created if need be."""

    def start(runs: Path) -> Container:
        if not runs.exists():
            writable(runs)
        return docker.start(
            saev_images.gpu,
            *TRAIN.format(shards=shards[1]).split(),
            mounts={shards[0]: "/data", runs: "/data/runs"},
            env=ONE_THREAD,
        )

    return start


@pytest.fixture(scope="module")
def uninterrupted(
    docker: Docker, saev_images: Images, shards: tuple[Path, str]
) -> dict[str, bytes]:
    """What training leaves if nothing disturbs it."""
    runs = writable(shards[0].parent / "uninterrupted")
    done = docker.run(
        saev_images.gpu,
        *TRAIN.format(shards=shards[1]).split(),
        mounts={shards[0]: "/data", runs: "/data/runs"},
        env=ONE_THREAD,
    )
    assert done.returncode == 0, done.stderr
    return contents(runs)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but those that hold times of the day."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "timings.jsonl" and "tb" not in p.parts
    }


def steps(runs: Path) -> list[int]:
    """Of the resume points that are there."""
    return sorted(int(p.stem.removeprefix("step-")) for p in runs.rglob("step-*.json"))


def wait_for_a_resume_point(runs: Path, container: Container) -> None:
    while not steps(runs):
        assert container.is_running(), container.logs()
        time.sleep(0.05)


def test_sigterm_leaves_a_resume_point_and_the_rerun_is_exact(
    start_training: Callable[[Path], Container], uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    container = start_training(runs)
    wait_for_a_resume_point(runs, container)
    container.kill("TERM")
    assert container.wait() == 143, container.logs()
    stopped_at = steps(runs)[-1]
    assert stopped_at % EVERY, "the newest resume point is not of the signal's step"
    assert not list(runs.rglob("run.json"))
    again = start_training(runs)
    assert again.wait() == 0, again.logs()
    assert continued_at(again) == stopped_at
    assert contents(runs) == uninterrupted


def continued_at(container: Container) -> int:
    """The step that it says it went on from."""
    match = re.search(r"Continuing at step (\d+)", container.logs())
    assert match, container.logs()
    return int(match[1])


def test_a_killed_container_rerun_completes(
    start_training: Callable[[Path], Container], uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    container = start_training(runs)
    wait_for_a_resume_point(runs, container)
    container.kill("KILL")
    assert container.wait() == 137
    again = start_training(runs)
    assert again.wait() == 0, again.logs()
    assert continued_at(again) % EVERY == 0
    assert contents(runs) == uninterrupted


def test_a_mistake_is_one_sentence(docker: Docker, saev_images: Images) -> None:
    """Also where nothing but /tmp can be written to."""
    done = docker.run(saev_images.gpu, *SHARDS)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith("saev: error: Cannot write /data/shards")
    assert "Traceback" not in done.stderr
