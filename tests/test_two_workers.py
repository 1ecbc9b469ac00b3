"""Two workers on one item: one of them does all of it while the other is in the middle."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from inference.world import contents, make_world
from shards.recording import config, tree
from train import synthetic

from saev import inference, storage, train
from saev.config import InferenceConfig, LoaderConfig, SaeConfig, TopK, TrainConfig
from saev.errors import StorageError
from saev.progress import Progress
from saev.shards import extract


def in_the_middle(do: Callable[[], object], at: int) -> Progress:
    """Does something at a safe point, once."""
    progress, n = Progress(quiet=True), 0

    def safe_point() -> None:
        nonlocal n
        n += 1
        if n == at:
            do()

    progress.safe_point = safe_point
    return progress


@pytest.mark.parametrize("at", [1, 3, 5])
def test_shards(tmp_path: Path, at: int) -> None:
    whole = config(tmp_path / "whole")
    extract.run(whole)
    cfg = config(tmp_path / "two")
    url = extract.run(cfg, in_the_middle(lambda: extract.run(cfg), at))
    assert storage.exists(storage.join(url, "shards.json"))
    assert tree(tmp_path / "two") == tree(tmp_path / "whole")


def test_one_part_of_shards_that_were_published(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    part = cfg.model_copy(update={"part": "2/2"})
    extract.run(part, in_the_middle(lambda: extract.run(cfg), 1))
    assert not [name for name in tree(tmp_path) if "parts" in name]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = str(tmp_path_factory.mktemp("shards"))
    shards = synthetic.write_shards(folder, synthetic.make_truth(), n_examples=200)
    return TrainConfig(
        train_data=LoaderConfig(shards=shards, layer=3, buffer_mb=0.5),
        sae=SaeConfig(d_sae=96, activation=TopK(top_k=3)),
        n_train=2048, n_val=1000, batch_size=256, log_every=2, checkpoint_every=2, device="cpu",
    )  # fmt: skip


def runs(root: Path) -> dict[str, bytes]:
    """Every file but those with wall times; config.json names the root, run.json its checksum."""
    files = {n: d for n, d in tree(root).items() if "tb/" not in n and "timings" not in n}
    for name in files:
        if name.endswith("/run.json"):
            record = json.loads(files[name])
            del record["checksum"], record["files"]["config.json"]
            files[name] = json.dumps(record).encode()
    return {n: d.replace(str(root).encode(), b"ROOT") for n, d in files.items()}


@pytest.mark.parametrize("at", [1, 3, 7])
def test_train(cfg: TrainConfig, tmp_path: Path, at: int) -> None:
    whole = cfg.model_copy(update={"runs_root": str(tmp_path / "whole")})
    train.run(whole)
    two = cfg.model_copy(update={"runs_root": str(tmp_path / "two")})
    assert len(train.run(two, in_the_middle(lambda: train.run(two), at))) == 1
    assert runs(tmp_path / "two") == runs(tmp_path / "whole")


def test_a_resume_point_is_not_written_over_anothers(cfg: TrainConfig, tmp_path: Path) -> None:
    cfg = cfg.model_copy(update={"runs_root": str(tmp_path)})

    class StoppedError(Exception):
        pass

    def stop() -> None:
        raise StoppedError

    def other() -> None:  # stops behind its point at step 4
        with contextlib.suppress(StoppedError):
            train.run(cfg, in_the_middle(stop, 2 * 5))

    with pytest.raises(StorageError, match=r"Another worker trains the same SAEs: .*step-0+4"):
        train.run(cfg, in_the_middle(other, 1))
    (point,) = tmp_path.glob("resume/*/step-000000000004.json")
    assert point.read_bytes()
    train.run(cfg)
    assert not list(tmp_path.glob("resume/**/*.json"))


@pytest.mark.parametrize("at", [1, 4])
def test_inference(tmp_path: Path, at: int) -> None:
    world = make_world(tmp_path)
    whole = InferenceConfig(run=world.run, out=str(tmp_path / "whole"))
    inference.run(whole)
    two = InferenceConfig(run=world.run, out=str(tmp_path / "two"))
    inference.run(two, in_the_middle(lambda: inference.run(two), at))
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")
