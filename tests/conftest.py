"""What all tests share."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import s3_server
from forker import Forker

from saev import once

# Two pytest workers on two cores: one thread of arithmetic each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What lands must depend neither on luck nor on how busy the machine is; elsewhere, property tests
# look at something new each time.
hypothesis.settings.register_profile("usual", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "usual")
# A model hub cannot be reached; say so at once instead of after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URL of a bucket on an S3 server of our own."""
    with s3_server.running() as bucket:
        yield bucket


@pytest.fixture(scope="session")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    """Starts `saev` commands quickly, as real processes."""
    base = tmp_path_factory.getbasetemp()
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    with Forker(shared=base.parent if is_worker else base) as forker:
        yield forker


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup() -> None:
    """Tests share a process, in which some warnings are said once."""
    once.forget()
