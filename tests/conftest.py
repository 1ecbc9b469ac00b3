"""What all tests share."""

import functools
import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import botocore.loaders
import hypothesis
import pytest
import s3_server
from forker import Forker

from saev import once

# Two pytest workers on two cores: one thread of arithmetic each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts tests in the background (`make test &`) lets them, and all that they start,
# ignore Ctrl-C. Tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# What lands must depend neither on luck nor on how busy the machine is; elsewhere, property tests
# look at something new each time.
hypothesis.settings.register_profile("usual", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "usual")
# A model hub cannot be reached; say so at once instead of after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


_read = botocore.loaders.JSONFileLoader._load_file


@functools.cache
def _read_once(path: str, opened: Callable) -> Any:
    """Each new client of S3 reads the same descriptions, which takes a tenth of a second."""
    return _read(botocore.loaders.JSONFileLoader(), path, opened)


botocore.loaders.JSONFileLoader._load_file = lambda self, path, opened: _read_once(path, opened)


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


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays, so the garbage collector need not look at it, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


LEFT_OUT = pytest.StashKey[int]()
"""How many slow tests `make test` left out."""


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    config = items[0].config
    config.stash[LEFT_OUT] = sum(item.get_closest_marker("slow") is not None for item in items)
    if hasattr(config, "workeroutput"):  # in a worker of pytest-xdist
        config.workeroutput["left_out"] = config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """All workers of pytest-xdist collect the same tests, so any of them has the number."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Iterator[None]:
    """Below what was skipped, and why: what `make test` leaves to other commands."""
    yield
    if config.option.markexpr == "not slow" and (n := config.stash.get(LEFT_OUT, 0)):
        terminalreporter.write_line(
            f"{n} slow tests were left out: `make test-slow` runs them, `make test-all` runs all."
        )


def pytest_runtest_setup() -> None:
    """Tests share a process, in which some warnings are said once."""
    once.forget()
