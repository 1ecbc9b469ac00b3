"""`make demo`: what its second run takes from the first."""

from pathlib import Path

import pytest

from saev.config import FakeImg, ShardsConfig
from saev.demo import __main__ as demo
from saev.demo import baselines
from saev.shards import Shards, extract


def recorded(root: Path, n: int, seed: int) -> str:
    data = FakeImg(n_examples=n, image_size=32, seed=seed)
    return extract.run(
        ShardsConfig(
            shards_root=str(root / "shards"), family="timm", ckpt="test_vit/random",
            image_size=32, layers=(-1,), data=data,
        )
    )  # fmt: skip


def test_baselines_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time, nothing but their file is read."""
    urls = [recorded(tmp_path, 40, 0), recorded(tmp_path, 8, 1)]
    metrics = {"l0": 2.4, "normalized_mse": 0.5, "n_dead": 3}

    def sides() -> list[demo.Side]:
        beside = demo._Beside(str(tmp_path), *map(Shards.open, urls))
        return [beside.on("crops", metrics, 16), beside.on("unseen", metrics, 16)]

    first = sides()
    known, _ = demo._sides(Shards.open(urls[0]), 0.1)
    unseen = demo._tokens(Shards.open(urls[1]))
    mean, basis = baselines.pca_basis(known)
    assert first[1].baselines.pca == baselines.pca_nmse(unseen, mean, basis, 2)
    assert first[1].baselines.random == baselines.random_nmse(unseen, mean, 2, 16)
    assert first[0].baselines != first[1].baselines
    monkeypatch.setattr(demo._Beside, "_tokens", property(lambda _: pytest.fail("read again")))
    assert sides() == first
    (tmp_path / "baselines.json").unlink()
    with pytest.raises(pytest.fail.Exception, match="read again"):
        sides()
