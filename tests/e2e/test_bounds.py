"""The wheels with the newest and with the lowest packages that they allow. Needs PyPI.

Torch and what comes with it (5 GB) are those of this environment; all other packages are installed
anew. All of it takes 90 s of one core.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import s3_server
from PIL import Image

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
WITH_TORCH = (
    "torch*", "functorch*", "nvidia*", "cuda*", "triton*", "sympy*", "mpmath*", "networkx*",
)  # fmt: skip
MODEL = "vit_tiny_patch16_224"
CONFIG = f"""\
[shards]
family = "timm"
ckpt = "{MODEL}@WEIGHTS"
layers = [-1]
image_size = 64

[train]
n_train = 2000
batch_size = 64

[train.sae]
d_sae = 384

[train.sae.activation]
kind = "top-k"
top_k = 8

[visuals]
n_latents = 4
"""
BOTH = pytest.mark.parametrize("resolution", ["lowest-direct", "highest"])


def run(*argv: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    left_out = ("PYTHONPATH", "VIRTUAL_ENV")
    clean = {k: v for k, v in os.environ.items() if k not in left_out} | env
    words = [str(word) for word in argv]
    done = subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True)
    if "Failed to fetch" in done.stderr or "error sending request" in done.stderr:
        pytest.skip("PyPI cannot be reached")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def installed(project: Path, resolution: str, folder: Path, *extras: str) -> Path:
    """Install a project's wheel into a new environment. Returns its folder of commands."""
    packages = folder / "packages.txt"
    run(
        UV, "pip", "compile", "--quiet", "--resolution", resolution, "--python", sys.executable,
        "--no-annotate", "--override", ROOT / "requirements/of-venv.in",
        *(word for extra in extras for word in ("--extra", extra)),
        project / "pyproject.toml", "--output-file", packages,
    )  # fmt: skip
    # Built from a copy, because a build writes into the tree.
    source = folder / "source"
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    for name in ("saev", "pipelines", "components", "saevit-client"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    python = ("--python", sys.executable)
    build = (UV, "build", "--wheel", "--quiet", "--no-build-isolation", *python)
    run(*build, "--out-dir", folder, source / project.relative_to(ROOT))
    (wheel,) = folder.glob("*.whl")
    commands = folder / "env/bin"
    run(UV, "venv", "--quiet", *python, folder / "env")
    into = ("--quiet", "--python", commands / "python", "--no-deps")
    run(UV, "pip", "install", *into, "--requirement", packages, wheel)
    return commands


def with_torch(commands: Path, folder: Path) -> None:
    """Put torch and its own packages on the path of an environment, and nothing else of ours."""
    folder.mkdir()
    (site,) = commands.parent.glob("lib/*/site-packages")
    ours = Path(sys.prefix) / site.relative_to(commands.parent)
    for pattern in WITH_TORCH:
        for path in ours.glob(pattern):
            folder.joinpath(path.name).symlink_to(path)
    site.joinpath("torch.pth").write_text(f"{folder}\n")


@BOTH
def test_a_run_on_object_storage(resolution: str, tmp_path: Path) -> None:
    """Pictures → page, with each library that this meets: timm, pyarrow, scipy, s3fs, …."""
    commands = installed(ROOT, resolution, tmp_path, "s3", "hf", "heic", "wandb")
    with_torch(commands, tmp_path / "torch")
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.jpg")
    weights = tmp_path / "weights.safetensors"
    save = "import sys, timm, safetensors.torch as s, open_clip\ns.save_file("
    run(
        commands / "python", "-W", "ignore", "-c",
        f"{save}timm.create_model('{MODEL}').state_dict(), sys.argv[1])", weights,
    )  # fmt: skip
    (tmp_path / "c.toml").write_text(CONFIG.replace("WEIGHTS", str(weights)))
    with s3_server.running() as bucket:
        done = run(
            commands / "saev", "run", tmp_path / "pictures", "--config", tmp_path / "c.toml",
            "--root", f"{bucket}/out", HF_HUB_OFFLINE="1",
        )  # fmt: skip
        assert done.stdout == f"{bucket}/out/index.html\n"


@BOTH
def test_the_client(resolution: str, tmp_path: Path) -> None:
    commands = installed(ROOT / "saevit-client", resolution, tmp_path, "s3", "gs")
    image = {"SAEV_IMAGE": "registry.test/saev:1"}
    done = run(commands / "saevit-client", "compile", "--out", "-", cwd=tmp_path, **image)
    assert "name: saev" in done.stdout
    assert "usage" in run(commands / "saevit-client", "doctor", "--help", cwd=tmp_path).stdout
