"""A root with a few small SAEs, made for real."""

from collections.abc import Sequence
from pathlib import Path

from saev import inference, train
from saev.config import (
    FakeImg,
    InferenceConfig,
    LoaderConfig,
    SaeConfig,
    ShardsConfig,
    TopK,
    TrainConfig,
)
from saev.shards import extract


def make(root: Path, measured: Sequence[int], not_measured: Sequence[int] = ()) -> Path:
    """Record generated images, train an SAE of 128 latents for each k, and measure some."""
    shards = extract.run(
        ShardsConfig(
            shards_root=str(root / "shards"), family="timm", ckpt="test_vit/random",
            image_size=32, layers=(-1,), data=FakeImg(n_examples=60),
        )
    )  # fmt: skip
    for k in (*measured, *not_measured):
        cfg = TrainConfig(
            runs_root=str(root / "runs"), n_train=600, batch_size=32, log_every=5,
            sae=SaeConfig(d_sae=128, activation=TopK(top_k=k)),
            train_data=LoaderConfig(shards=shards, val_fraction=0.2),
        )  # fmt: skip
        (run,) = train.run(cfg)
        if k in measured:
            inference.run(InferenceConfig(run=run))
    return root
