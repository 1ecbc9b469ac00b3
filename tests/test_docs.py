"""The docs' examples run, and their links lead somewhere."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saev import cli, train
from saev.config import FakeImg, LoaderConfig, SaeConfig, ShardsConfig, TopK, TrainConfig
from saev.shards import extract

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks that call saev, without comments."""
    text = "".join(blocks(page, "sh")).replace("\\\n", " ")
    found = re.findall(r"(?:^|\$\()saev ([^#\n)]*)", text, re.MULTILINE)
    return [line.strip() for line in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_parse(page: Path) -> None:
    """Every flag is one that there is, and every value fits."""
    for line in commands(page):
        # Some flags are done at once: --tyro-write-completion writes a file.
        if not any(
            text in line for text in ("…", "--help", "--version", "--tyro-write-completion")
        ):
            cli.parse(shlex.split(line))


def test_readmes_commands_are_found() -> None:
    found = [line.split()[0] for line in commands(ROOT / "README.md")]
    stages = ["shards", "train", "inference", "visuals"]
    assert found == ["run", *stages, "report", "open", "run", "run", "open"]


def test_python_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shards = extract.run(
        ShardsConfig(
            shards_root="shards",
            family="timm",
            ckpt="test_vit/random",
            image_size=64,
            layers=(-1,),
            data=FakeImg(n_examples=12),
        )
    )
    (run,) = train.run(
        TrainConfig(
            runs_root="runs",
            n_train=500,
            batch_size=32,
            sae=SaeConfig(d_sae=128, activation=TopK(top_k=4)),
            train_data=LoaderConfig(shards=shards, val_fraction=0.1),
        )
    )
    code = "\n".join(blocks(ROOT / "docs" / "python-api.md", "python"))
    exec(compile(code, "docs/python-api.md", "exec"), {"SHARDS": shards, "RUN": run})


def test_the_notebook_to_start_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With pictures, and with a network that needs no hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("saev.config.train.LEAST_TOKENS", 2_000)
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    code = (ROOT / "notebooks" / "start.py").read_text()
    for theirs, ours in (("dinov2", "timm"), ("vits14", "test_vit/random"), ("224", "64")):
        assert theirs in code
        code = code.replace(f'"{theirs}"', f'"{ours}"').replace(f"size={theirs}", f"size={ours}")
    exec(compile(code, "notebooks/start.py", "exec"), {})
    out = capsys.readouterr().out
    # The network is 64 wide and has patches of 16 pixels.
    assert "d_sae=128" in out
    assert "torch.Size([16, 128])" in out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


def test_nothing_names_a_machine() -> None:
    """No registry's host, no absolute path of the machine that something was written on."""
    forbidden = re.compile(r"(files\.pythonhosted|pypi\.org/simple|/root/|/work/|/home/\w+/)")
    names = ["*.py", "*.md", "*.toml", "*.lock", "*.in", "*.html", "*.css", "*.js", "Makefile"]
    for pattern in names:
        for path in ROOT.rglob(pattern):
            parts = path.relative_to(ROOT).parts
            if parts[0].startswith(".venv") or {"demo-out", "node_modules"} & {*parts}:
                continue
            if path == Path(__file__):
                continue
            if parts == ("cluster.toml",):  # the settings of who works here; git ignores them
                continue
            found = forbidden.search(path.read_text(errors="replace"))
            assert not found, f"{path.relative_to(ROOT)}: {found and found.group()}"


IN_TREE = re.compile(r"`((?:saev|pipelines|tests)/[\w/.]+)`")


def test_the_architecture_names_what_there_is() -> None:
    """The page and its picture: every package. These and CONTRIBUTING: nothing that is gone."""
    packages = {f"saev/{path.parent.name}" for path in (ROOT / "saev").glob("*/__init__.py")}
    page = (ROOT / "docs" / "architecture.md").read_text()
    picture = (ROOT / "docs" / "images" / "architecture.svg").read_text()
    in_page = set(IN_TREE.findall(page))
    in_picture = set(re.findall(r">((?:saev/)?\w+)</text>", picture)) - {"STAGES", "COMMANDS"}
    for names in (in_page, in_picture):
        assert packages <= {name.removesuffix(".py") for name in names}
    in_rules = set(IN_TREE.findall((ROOT / "CONTRIBUTING.md").read_text()))
    gone = [
        name
        for name in {*in_page, *in_rules, *(name for name in in_picture if "/" in name)}
        if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()
    ]
    assert not gone
