"""However a loop over a loader ends, its threads end too, at once, and errors name their place."""

import contextlib
import gc
import os
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from forker import Forker

from saev import storage
from saev.config import LoaderConfig
from saev.errors import CorruptDataError, SaevError, StorageError
from saev.loaders import OrderedLoader, ShuffledLoader
from saev.loaders.prefetch import Prefetcher

from .folders import readers, write_shards

SMALL = LoaderConfig(buffer_mb=0.004)


@pytest.fixture
def loader(folder):
    """An endless loader that has given nothing yet."""
    with folder.open() as shards:
        yield ShuffledLoader(shards, SMALL, 10)


def started(loader):
    """An iterator in the middle of its work."""
    iterator = iter(loader)
    next(iterator)
    assert readers()
    return iterator


def test_after_a_break(loader):
    for _ in loader:
        assert readers()
        break
    assert not readers()


def test_after_the_end(folder):
    with folder.open() as shards:
        iterator = iter(ShuffledLoader(shards, SMALL, 10, epochs=1))
        assert len(list(iterator)) == 14
        assert not readers()
        assert list(iterator) == []


def test_after_an_exception_in_the_loop(loader):
    def use():
        for _ in loader:
            raise ValueError("the consumer's own")

    with pytest.raises(ValueError, match="own"):
        use()
    gc.collect()
    assert not readers()


def test_after_an_exception_in_a_with_block(loader):
    with pytest.raises(ValueError, match="own") as info, loader:  # noqa: PT012
        iterator = started(loader)
        raise ValueError("the consumer's own")
    assert info.tb is not None  # the traceback still refers to the iterator
    assert not readers()
    assert list(iterator) == []


def test_after_close(loader):
    iterator = started(loader)
    loader.close()
    loader.close()
    assert not readers()
    assert list(iterator) == []
    assert len(next(iter(loader)).act) == 10  # and it can be used again, where it stood


def test_after_the_collector(loader):
    cycle = [started(loader)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert not readers()


def test_after_a_second_iterator(loader):
    first = started(loader)
    n_threads = len(readers())
    second = started(loader)
    assert len(readers()) == n_threads
    assert list(first) == []
    del second
    assert not readers()


def test_nothing_stays_in_memory(folder):
    """An abandoned loader with its windows is freed without the cyclic collector."""
    gc.disable()
    try:
        with folder.open() as shards:
            loader = ShuffledLoader(shards, SMALL, 10)
            iterator = started(loader)
            windows = [weakref.ref(b) for b in iterator._buffers._buffers if b is not None]
            assert windows
            del iterator, loader
            assert [w() for w in windows] == [None] * len(windows)
    finally:
        gc.enable()


PROGRAM = """
import os, signal, sys, threading, time
from saev.config import LoaderConfig
from saev.loaders import ShuffledLoader
from saev.shards import Shards

def child(url, how, running):
    if how == "handler":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    shards = Shards.open(url)
    read = shards.read_bytes
    def slow(*args, **kwargs):
        time.sleep(0.05)
        return read(*args, **kwargs)
    shards.read_bytes = slow
    loader = ShuffledLoader(shards, LoaderConfig(buffer_mb=0.004), 10)
    try:
        for i, batch in enumerate(loader):
            if i == 3:
                os.write(running, b"x")
                if how == "exit":
                    sys.exit(4)
                if how == "leave":
                    break
        iterator = iter(loader)
        next(iterator)  # and left open when the process ends
    except KeyboardInterrupt:
        loader.close()
        deadline = time.monotonic() + 5
        while threading.active_count() > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        sys.exit(5 if threading.active_count() == 1 else 6)

for how in sys.argv[2:]:  # every case has a process of its own
    reading, running = os.pipe()
    pid = os.fork()
    if not pid:
        child(sys.argv[1], how, running)
        sys.exit(0)
    os.read(reading, 1)
    start = time.monotonic()
    number = {"default": signal.SIGTERM, "handler": signal.SIGTERM, "interrupt": signal.SIGINT}
    if how in number:
        os.kill(pid, number[how])
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(how, status, time.monotonic() - start, flush=True)
"""


def test_a_process_ends_at_once(folder, forker: Forker):
    expected = {"default": -signal.SIGTERM, "handler": 3, "interrupt": 5, "exit": 4, "leave": 0}
    process = forker.wait(forker.start([folder.url, *expected], script=PROGRAM))
    assert process.status == 0, process.stderr
    lines = [line.split() for line in process.stdout.splitlines()]
    assert {how: int(status) for how, status, _ in lines} == expected
    assert max(float(seconds) for *_, seconds in lines) < 15
    assert "Fatal" not in process.stderr
    assert "Traceback" not in process.stderr


# --- errors --------------------------------------------------------------------------------


def flip(folder, shard: str, offset: int = 40) -> None:
    place = Path(folder.url) / shard
    data = bytearray(place.read_bytes())
    data[offset] ^= 1
    place.write_bytes(data)


@pytest.mark.parametrize("kind", [ShuffledLoader, OrderedLoader])
@pytest.mark.parametrize("n_threads", [1, 4])
def test_a_flipped_bit_reaches_the_consumer(folder, kind, n_threads):
    flip(folder, "acts000002.bin")
    with folder.open() as shards:
        more = {"n_threads": n_threads} if kind is OrderedLoader else {}
        cfg = LoaderConfig(buffer_mb=0.004, n_threads=n_threads)
        loader = kind(shards, cfg, 10, epochs=1, **more)
        with pytest.raises(CorruptDataError, match=r"acts000002\.bin is damaged: layer 3"):
            list(loader)
        assert not readers()
        with pytest.raises(CorruptDataError, match=r"acts000002\.bin"):
            list(loader)  # it is still damaged
        assert not readers()


def test_without_verification_a_flipped_bit_is_not_seen(folder):
    flip(folder, "acts000002.bin")
    with folder.open() as shards:
        cfg = LoaderConfig(buffer_mb=0.004, verify=False)
        assert sum(len(b.act) for b in ShuffledLoader(shards, cfg, 10, epochs=1)) == 138


def test_a_shard_that_shrinks_reaches_the_consumer(folder):
    with folder.open() as shards:
        place = Path(folder.url) / "acts000001.bin"
        place.write_bytes(place.read_bytes()[:-100])
        with pytest.raises(CorruptDataError, match=r"acts000001\.bin is truncated"):
            list(ShuffledLoader(shards, SMALL, 10, epochs=1))
    assert not readers()


def test_a_shard_that_vanishes_reaches_the_consumer(folder):
    with folder.open() as shards:
        os.remove(Path(folder.url) / "acts000003.bin")
        with pytest.raises(StorageError, match=r"acts000003\.bin: it does not exist"):
            list(ShuffledLoader(shards, SMALL, 10, epochs=1))
    assert not readers()


def test_an_error_is_raised_before_the_batches_that_were_read_ahead(tmp_path):
    """Prompt: a consumer that holds a window of many batches hears of it at its next call."""
    folder = write_shards(str(tmp_path / "f"), n_examples=100)
    flip(folder, "acts000013.bin")  # the last but one
    with folder.open() as shards:
        loader = OrderedLoader(shards, LoaderConfig(), 1, n_threads=1, buffer_mb=0.07)
        iterator, taken = iter(loader), 0
        with contextlib.suppress(CorruptDataError):  # if the reader was quicker
            next(iterator)
            taken = 1
        deadline = time.monotonic() + 20
        while readers() and time.monotonic() < deadline:
            time.sleep(0.01)
        if taken:
            with pytest.raises(CorruptDataError, match=r"acts000013\.bin"):
                next(iterator)
        assert not readers()
        assert loader.state_dict()["position"] == taken
        assert list(iterator) == []


def test_a_loader_is_refused_in_a_forked_process(loader):
    iterator = started(loader)
    child = os.fork()
    if not child:
        try:
            for _ in iterator:
                pass
        except SaevError:
            os._exit(7)
        os._exit(8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert len(next(iterator).act) == 10
    loader.close()


def test_a_lock_that_an_interrupt_left_held_does_not_keep_threads_alive(loader):
    iterator = started(loader)
    (prefetcher,) = (v for v in vars(iterator).values() if hasattr(v, "take"))
    prefetcher._changed.acquire()  # as if Ctrl-C had struck inside Condition.__exit__
    start = time.monotonic()
    loader.close()
    assert not readers()
    assert time.monotonic() - start < 5


# --- the prefetcher alone ------------------------------------------------------------------


class Count:
    """A job of some tasks that note when they run."""

    def __init__(self, number: int, log: list[int], n_tasks: int = 3):
        self.number = number
        self.tasks = [lambda: log.append(number) for _ in range(n_tasks)]


def test_jobs_come_in_order_and_no_more_than_two_are_begun():
    log: list[int] = []
    begun = []

    def jobs():
        for i in range(6):
            begun.append(i)
            yield Count(i, log, n_tasks=0 if i == 3 else 3)

    with contextlib.closing(Prefetcher(jobs(), n_threads=3)) as prefetcher:
        for i in range(6):
            job = prefetcher.take()
            assert job is not None
            assert job.number == i
            assert log.count(i) == (0 if i == 3 else 3)
            assert len(begun) <= i + 2
            prefetcher.release()
        assert prefetcher.take() is None
        prefetcher.close()


@pytest.mark.parametrize("where", ["plan", "task"])
def test_any_error_ends_all_threads(where):
    def jobs():
        yield Count(0, [])
        if where == "plan":
            raise MemoryError("no window")
        job = Count(1, [])
        job.tasks.append(lambda: 1 // 0)
        yield job

    prefetcher = Prefetcher(jobs(), n_threads=3)
    with pytest.raises((MemoryError, ZeroDivisionError)):  # noqa: PT012
        while prefetcher.take() is not None:
            prefetcher.release()
    assert not readers()
    with pytest.raises((MemoryError, ZeroDivisionError)):
        prefetcher.check()


def test_closing_waits_for_no_task_that_has_not_begun():
    gate, ran = threading.Event(), []

    def jobs():
        job = Count(0, [])
        job.tasks = [gate.wait, *(lambda: ran.append(1) for _ in range(1000))]
        yield job

    prefetcher = Prefetcher(jobs(), n_threads=1)
    threading.Timer(0.2, gate.set).start()
    time.sleep(0.05)
    prefetcher.close()
    assert not readers()
    assert len(ran) == 0


def test_waiting_is_counted(folder):
    with folder.open() as shards:
        read = shards.read_bytes

        def slow(*args, **kwargs):
            time.sleep(0.1)
            return read(*args, **kwargs)

        shards.read_bytes = slow
        loader = OrderedLoader(shards, LoaderConfig(), 1000, n_threads=1)
        list(loader)
        values = loader.metrics()
        assert 0.1 <= values["loader/wait_s"] < 30
        assert loader.metrics()["loader/wait_s"] == 0.0
        assert values["loader/read_mb"] == pytest.approx(folder.acts.nbytes / 1e6)
        assert 0 < values["loader/read_mb_s"] < folder.acts.nbytes / 1e6 / 0.1
        assert loader.metrics()["loader/read_mb_s"] == 0.0


def test_the_buffer_fills_up(tmp_path):
    folder = write_shards(str(tmp_path / "f"), n_examples=100)
    with folder.open() as shards:
        loader = ShuffledLoader(shards, LoaderConfig(buffer_mb=0.01), 1)
        assert loader.metrics()["loader/buffer_fill"] == 0.0
        iterator = iter(loader)
        next(iterator)
        deadline = time.monotonic() + 20
        while loader.metrics()["loader/buffer_fill"] < 0.97 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 0.97 <= loader.metrics()["loader/buffer_fill"] < 1.0
        for _ in range(20):
            next(iterator)
        assert torch.isfinite(next(iterator).act).all()
        loader.close()
        assert loader.metrics()["loader/buffer_fill"] == 0.0


def test_a_missing_folder_is_a_storage_error(tmp_path):
    from saev.shards import Shards

    with pytest.raises(StorageError, match="does not exist"):
        Shards.open(storage.join(str(tmp_path), "nothing"))
