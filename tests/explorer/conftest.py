"""Fixtures of the explorer's tests: the file of a small SAE that was really measured."""

from pathlib import Path

import pytest
from visuals.chain import Chain, make_chain

from saev import cli


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="session")
def file(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the command."""
    out = tmp_path_factory.mktemp("file") / "explorer.html"
    cli.main(["report", "--run", chain.run, "--out", str(out)])
    return out
