"""Fixtures of the explorer's tests: the file of a small SAE that was really measured."""

from pathlib import Path

import pytest
from visuals.chain import Chain, make_chain

from saev import cli


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Images of both sides, and more than a latent's page shows of the strongest ones."""
    return make_chain(tmp_path_factory.mktemp("explorer"), n=30, val_fraction=0.3)


@pytest.fixture(scope="session")
def file(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the command."""
    out = tmp_path_factory.mktemp("file") / "explorer.html"
    cli.main(["report", "--run", chain.run, "--out", str(out)])
    return out
