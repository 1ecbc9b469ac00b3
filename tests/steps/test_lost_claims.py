"""A step whose claim another run takes at the last moment publishes nothing any more."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from saev import cli, storage
from saev.errors import ConfigError
from saev.progress import Progress
from saev.steps import claims, discover
from saev.steps import run as steps

from .test_steps import DATASET

CONFIG = json.dumps(
    {
        "data": {"kind": "fake-img", "n_examples": 12, "image_size": 32},
        "shards": {"family": "timm", "ckpt": "test_vit/random", "image_size": 32, "layers": [-1]},
        "train": {"n_train": 100, "device": "cpu", "sae": {"d_sae": 32}},
        "visuals": {"log_freq_range": [-9, 0], "log_value_range": [-9, 9], "n_latents": 1},
    }
)
CLAIMS = discover.Dataset.from_dict(json.loads(DATASET))


def step(root: str, name: str, *words: str, owner: str = "") -> None:
    """A step as its pod does it, but for the command line's own handling of errors."""
    common = ["--root", root, "--config", CONFIG, "--dataset", DATASET, "--owner", owner]
    steps.run(cli.parse(["step", name, *common, *words]), Progress(quiet=True))


def words_of(root: str) -> dict[str, list[str]]:
    """Every step's own flags, as far as they are known."""
    shards = [e.url for e in storage.list_dir(f"{root}/shards", missing_ok=True)]
    runs = [e.url for e in storage.list_dir(f"{root}/runs", missing_ok=True) if e.is_dir]
    at = ["--shards", *shards[:1]] if shards else []
    return {
        "publish": at,
        "plan-training": at,
        "summarise": [*at, "--run", *runs[:1]],
        "report": [*at, "--runs", json.dumps(runs)],
    }


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Roots in which everything is done but a step and those after it."""
    base = tmp_path_factory.mktemp("before")
    root, to = str(base / "now"), base / "items"
    roots: dict[str, Path] = {}

    def keep(name: str) -> None:
        roots[name] = base / name
        shutil.copytree(root, roots[name])

    def items() -> list[str]:
        return json.loads(to.read_text())

    Path(root).mkdir()
    keep("plan-shards")
    step(root, "plan-shards", "--to-items", str(to))
    for item in items():
        at = words_of(root)["publish"]
        step(root, "extract", *at, "--item", item)
    keep("publish")
    step(root, "publish", *at)
    step(root, "plan-training", *at, "--to-items", str(to))
    (item,) = items()
    roots["item"] = base / "item"
    roots["item"].write_text(item)
    keep("train")
    step(root, "train", *at, "--item", item)
    step(root, "plan-inference", *at, "--to-items", str(to))
    for item in items():
        step(root, "infer", *at, "--item", item)
    keep("summarise")
    step(root, "summarise", *words_of(root)["summarise"])
    keep("report")
    return roots


@pytest.fixture
def taken_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Lets another run take the claim right after an object of some name is written."""

    def prepare(root: str, name: str) -> None:
        folder = discover.claims_of(root, CLAIMS)
        claims.take(folder, "a", 1.0)

        def then_take(write: Callable[..., None]) -> Callable[..., None]:
            def written(url: str, *args: object) -> None:
                write(url, *args)
                if storage.name(url) == name and claims.current(folder).owner == "a":
                    assert claims.take(folder, "b", 1.0, force=True) is not None

            return written

        for kind in ("write_json", "write_bytes", "write_text"):
            monkeypatch.setattr(storage, kind, then_take(getattr(storage, kind)))

    return prepare


@pytest.mark.parametrize(
    ("name", "at", "marker"),
    [
        ("publish", "stats.safetensors", "shards/*/shards.json"),
        ("publish", "stats.safetensors", "shards/*/files.json"),
        ("train", "config.json", "runs/*/run.json"),
        ("summarise", "sparsity.safetensors", "runs/*/inference/*/metrics.json"),
        ("summarise", "metrics.json", "runs/*/inference/*/report/index.html"),
        ("summarise", "latent.json", "runs/*/inference/*/report/index.html"),
        ("summarise", "index.html", "runs/*/inference/*/report/visuals.json"),
        ("report", "index.html", "datasets/*/processed/*.json"),
        ("plan-shards", "metadata.json", "shards/*/shards.json"),
    ],
)
def test_nothing_is_published(
    before: dict[str, Path],
    tmp_path: Path,
    taken_at: Callable[[str, str], None],
    name: str,
    at: str,
    marker: str,
) -> None:
    root = str(tmp_path / "root")
    shutil.copytree(before[name], root)
    words = words_of(root).get(name, [])
    if name == "train":
        words = [*words_of(root)["publish"], "--item", before["item"].read_text()]
    taken_at(root, at)
    with pytest.raises(ConfigError, match=r"Run a no longer has the claim .* run b"):
        step(root, name, *words, owner="a")
    assert list(Path(root).rglob(at))
    assert not list(Path(root).glob(marker))
