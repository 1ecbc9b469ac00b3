"""A small folder of activations with known structure, and a config that trains on it in seconds."""

import pytest

from saev.config import LoaderConfig, SaeConfig, TopK, TrainConfig

from . import synthetic


@pytest.fixture(scope="session")
def truth() -> synthetic.Truth:
    return synthetic.make_truth()


@pytest.fixture(scope="session")
def shards_url(tmp_path_factory, truth) -> str:
    return synthetic.write_shards(str(tmp_path_factory.mktemp("shards")), truth, n_examples=800)


@pytest.fixture
def cfg(shards_url, tmp_path) -> TrainConfig:
    """Eight steps; tests that judge quality train longer."""
    return TrainConfig(
        runs_root=str(tmp_path / "runs"),
        train_data=LoaderConfig(shards=shards_url, layer=3, buffer_mb=0.5),
        sae=SaeConfig(d_sae=96, activation=TopK(top_k=3)),
        n_train=2048,
        n_val=1000,
        batch_size=256,
        log_every=2,
        device="cpu",
    )
