"""Fixtures of the explorer's tests: the file of a small SAE that was really measured."""

from pathlib import Path

import pytest
from visuals.chain import D_MODEL, D_SAE, Chain, make_chain

from saev import cli, inference, storage, train
from saev.config import DataConfig, InferenceConfig, LoaderConfig, SaeConfig, TopK, TrainConfig


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Images of both sides, and more than a latent's page shows of the strongest ones."""
    return make_chain(tmp_path_factory.mktemp("explorer"), n=30, val_fraction=0.3)


@pytest.fixture(scope="session")
def trained(chain: Chain) -> list[str]:
    """URLs of two SAEs that were really trained on the same activations, and measured."""
    data = LoaderConfig(shards=chain.shards, layer=1, val_fraction=0.3)
    cfg = TrainConfig(
        runs_root=storage.parent(chain.run), train_data=data,
        sae=SaeConfig(d_model=D_MODEL, d_sae=D_SAE, activation=TopK(top_k=4)),
        n_train=512, batch_size=64, log_every=2, device="cpu",
    )  # fmt: skip
    wide = cfg.model_copy(update={"sae": SaeConfig(d_sae=48, activation=TopK(top_k=3))})
    runs = [url for one in (cfg, wide) for url in train.run(one)]
    for run in runs:
        measured = DataConfig(shards=chain.shards)
        inference.run(InferenceConfig(run=run, data=measured, device="cpu"))
    return runs


@pytest.fixture(scope="session")
def file_of_two(trained: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "explorer.html"
    cli.main(["report", "--run", *trained, "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def file(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the command."""
    out = tmp_path_factory.mktemp("file") / "explorer.html"
    cli.main(["report", "--run", chain.run, "--out", str(out)])
    return out
