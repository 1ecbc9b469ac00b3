"""Retries end two minutes after the start of a fault, however long the operation has worked."""

import threading
import time
from collections.abc import Callable

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from saev import storage
from saev.errors import StorageError
from saev.storage import faults, waiting

URL = "memory://patience/x.bin"
WAYS: dict[str, tuple[str, Callable[[], object]]] = {
    "read": ("cat_file", lambda: storage.read_bytes(URL)),
    "range": ("cat_file", lambda: storage.RangeReader(URL, size=4).read(0, 4)),
    "write": ("pipe_file", lambda: storage.write_bytes(URL, b"data")),
    "size": ("size", lambda: storage.size(URL)),
}


class Store:
    """A store in which each request takes ``takes_s`` of a clock that never waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, way: str):
        self.now, self.takes_s, self.errors = 1000.0, 0.0, list[Exception]()
        self.starts = list[float]()
        self.limits = list[float]()
        """How long the last request of an attempt may have been silent."""
        method, self.use = WAYS[way]
        honest = getattr(MemoryFileSystem, method)

        def request(fs: MemoryFileSystem, *args: object, **kwargs: object) -> object:
            self.starts.append(self.now)
            self.now += self.takes_s
            self.limits.append(waiting.limit_s(waiting.SILENT_S))
            if self.errors:
                raise self.errors.pop()
            return honest(fs, *args, **kwargs)

        # Threads that other tests have started keep the real clock.
        here, real_sleep, real_monotonic = threading.get_ident(), time.sleep, time.monotonic

        def sleep(seconds: float) -> None:
            if threading.get_ident() == here:
                self.now += seconds
            else:
                real_sleep(seconds)

        def monotonic() -> float:
            return self.now if threading.get_ident() == here else real_monotonic()

        storage.write_bytes(URL, b"data")
        monkeypatch.delenv("SAEV_PATIENCE_S", raising=False)
        monkeypatch.setattr(MemoryFileSystem, method, request)
        monkeypatch.setattr(time, "monotonic", monotonic)
        monkeypatch.setattr(time, "sleep", sleep)


@pytest.mark.parametrize("way", WAYS)
def test_a_fault_after_a_long_time_is_retried(monkeypatch, way) -> None:
    store = Store(monkeypatch, way)
    store.takes_s, store.errors = 7200.0, [ConnectionResetError("cut")]
    store.use()
    assert len(store.starts) == 2
    assert store.limits[0] == waiting.SILENT_S


@pytest.mark.parametrize("way", WAYS)
def test_a_mistake_after_a_long_time_is_not_retried(monkeypatch, way) -> None:
    store = Store(monkeypatch, way)
    store.takes_s, store.errors = 7200.0, [PermissionError("no")] * 2
    with pytest.raises(StorageError):
        store.use()
    assert len(store.starts) == 1


@pytest.mark.parametrize("takes_s", [7200.0, 130.0, 100.0, 20.0, 1.0])
def test_retries_end_two_minutes_after_the_fault_began(monkeypatch, takes_s) -> None:
    """It began at most 12 s, the longest silence, before the first attempt failed."""
    store = Store(monkeypatch, "read")
    store.takes_s, store.errors = takes_s, [ConnectionResetError("cut")] * 1000
    with pytest.raises(StorageError, match=r"It was tried \d+ times in \d+ s\.") as caught:
        store.use()
    assert storage.is_passing(caught.value)
    began = store.starts[0] + max(takes_s - waiting.SILENT_S, 0.0)
    assert began + 90 < store.starts[-1] + takes_s  # not before; a pause is at most 11 s
    assert store.starts[-1] < began + 120
    assert all(limit <= waiting.SILENT_S for limit in store.limits)


def test_a_part_that_was_retried_in_vain_ends_the_upload(monkeypatch) -> None:
    """The upload works for two hours. Then a request of it is retried for two minutes."""
    store = Store(monkeypatch, "size")
    store.errors = [ConnectionResetError("cut")] * 1000

    @faults.retry
    def upload() -> None:
        store.now += 7200.0
        store.use()

    with pytest.raises(StorageError, match=r"It was tried \d+ times in 1[01]\d s\."):
        upload()
    assert store.now - store.starts[0] < 120
