"""Fixtures of the loaders' tests."""

import gc
from pathlib import Path

import pytest

from .folders import Folder, readers, write_shards


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """23 examples of a class token and 6 content tokens in 4 shards."""
    return write_shards(str(tmp_path / "shards"))


@pytest.fixture(autouse=True)
def no_thread_left():
    """Every test ends with the threads that it began with."""
    before = readers()
    yield
    if readers() - before:  # an exception's traceback may keep an iterator until it is collected
        gc.collect()
    assert not readers() - before
