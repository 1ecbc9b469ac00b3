"""Fixtures of the visuals tests."""

import pytest

from visuals.chain import Chain, make_chain


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(tmp_path_factory.mktemp("visuals"))
