"""README's own blocks, unedited, outside of the checkout, from the wheel that users install."""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
MODEL = "timm/vit_small_patch14_dinov2.lvd142m"
REVISION = "0" * 40

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # a minute on two idle cores


def block(language: str, text: str) -> str:
    """The block that has a text in it."""
    (found,) = [code for kind, code in BLOCKS if kind == language and text in code]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel installs, unpacked. It is built in a clone, as `pip install .` does."""
    folder = tmp_path_factory.mktemp("wheel")
    source, site = folder / "source", folder / "site"
    left_out = shutil.ignore_patterns("__pycache__", "_version.py", "*.egg-info", "build")
    for name in ("saev", "saevit-client", "pipelines", "components"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for words in ("init --quiet", "add --all", "commit --quiet --message all"):
        subprocess.run([*git, *words.split()], check=True)
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*argv, "--wheel-dir", str(folder), str(source)], check=True)
    (built,) = folder.glob("saevit-*.whl")
    zipfile.ZipFile(built).extractall(site)
    # Fewer tokens than a person would train on.
    (site / "sitecustomize.py").write_text(
        "import saev.config.train as train\ntrain.LEAST_TOKENS = 4_000\n"
    )
    return site


def fill_hub(cache: Path) -> None:
    """A stand-in for the model hub: its cache, with untrained weights of the model in it."""
    import safetensors.torch
    import timm

    folder = cache / f"models--{MODEL.replace('/', '--')}"
    place = folder / "snapshots" / REVISION
    place.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    weights = timm.create_model("vit_small_patch14_dinov2").state_dict()
    safetensors.torch.save_file(weights, place / "model.safetensors")


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user's: a home with pictures, the command on the path, the hub's cache."""
    home = tmp_path_factory.mktemp("home")
    (home / "pictures").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((320, 240)).save(home / "pictures" / f"{i}.jpg")
    (home / "bin").mkdir()
    script = home / "bin" / "saev"
    script.write_text(f"#!{sys.executable}\nfrom saev.entry import main\nmain()\n")
    script.chmod(0o755)
    hub = home / "hub"
    fill_hub(hub)
    return {
        **os.environ, "HOME": str(home), "PYTHONPATH": str(wheel), "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1", "PATH": f"{home / 'bin'}:{os.environ['PATH']}", "BROWSER": "true",
    }  # fmt: skip


def run_until_open(code: str, environment: dict[str, str]) -> Iterator[str]:
    """Run a block that ends with `saev open`; gives the page, or what the live explorer says of
    the root, then presses Ctrl-C."""
    process = subprocess.Popen(
        ["bash", "-e", "-c", code], cwd=environment["HOME"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout
        address = ""
        for line in process.stdout:
            if line.startswith("http://127.0.0.1:"):
                address = line.strip()
                break
        assert address, process.communicate()[1]
        host, _, path = address.removeprefix("http://").partition("/")
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", f"/{path or 'api/root'}")
        yield connection.getresponse().read().decode()
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_wheel_has_this_package_only(wheel: Path) -> None:
    """setuptools asks git for the files; the links of saevit-client broke the build in a clone."""
    names = {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"saev", "sitecustomize.py"}
    assert (wheel / "saev/configs/first-look.toml").exists()


def test_the_job_block(environment: dict[str, str]) -> None:
    (page,) = run_until_open(block("sh", "S=$(saev shards"), environment)
    assert "topk32-s768 of dinov2" in page
    runs = [p for p in Path(environment["HOME"], "out/runs").iterdir() if (p / "run.json").exists()]
    (run,) = runs
    code = block("python", "saev.load_sae").replace("ID", run.name)
    done = subprocess.run(
        [sys.executable, "-c", f"import numpy\nacts = numpy.ones((3, 384), 'f')\n{code}\n"
         "print(latents.shape, saev.__file__)"],
        cwd=environment["HOME"], env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("torch.Size([3, 768])")
    assert environment["PYTHONPATH"] in done.stdout, "the wheel is not what was used"


def test_one_command_on_your_own_pictures(environment: dict[str, str]) -> None:
    """Of the two blocks that have it, the command and the one that shows its page."""
    install, first = block("sh", "uv pip install").splitlines()
    assert install.startswith("uv pip install saevit --torch-backend cpu")  # needs another index
    last = block("sh", "--config dinov2-small").splitlines()[-1]
    (page,) = run_until_open(f"{first}\n{last}\n", environment)
    (sae,) = json.loads(page)["saes"]
    assert sae["measured"]


def test_the_notebooks_come_with_the_wheel(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["saev", "notebook", "metrics"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "metrics.py")
    assert (tmp_path / "metrics.py").read_text() == (ROOT / "notebooks/metrics.py").read_text()
