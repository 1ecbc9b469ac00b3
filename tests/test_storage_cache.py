"""The node's cache: right bytes whatever happens to it, within its bound, and fewer requests."""

import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import s3_proxy
import s3fs
from forker import Forker
from loaders.folders import write_shards
from test_storage import can_mount

from saev import storage
from saev.config import LoaderConfig
from saev.loaders import OrderedLoader, ShuffledLoader
from saev.storage import cache as cache_module
from saev.storage.cache import CHUNK, SEGMENT, NodeCache

MB = 1 << 20


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_proxy.Proxy]:
    """Counts the requests of this process and its children."""
    with s3_proxy.before(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


def noise(n_bytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(n_bytes)


def put(s3: str, data: bytes) -> str:
    url = f"{s3}/{uuid.uuid4().hex}.bin"
    storage.write_bytes(url, data)
    return url


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/??/*"))


def used(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in files(folder))


def age(folder: Path) -> None:
    """As if nothing had been used for an hour."""
    for path in files(folder):
        os.utime(path, (time.time() - 3600, path.stat().st_mtime - 3600))


# --- Right, and fewer requests -------------------------------------------------------------


@pytest.mark.parametrize("size", [1, CHUNK, CHUNK + 1, 5 * CHUNK - 7])
def test_any_range_twice(s3: str, proxy: s3_proxy.Proxy, tmp_path: Path, size: int) -> None:
    data = noise(size)
    url = put(s3, data)
    rng = np.random.default_rng(1)
    ranges = [sorted(rng.integers(0, size + 1, 2).tolist()) for _ in range(40)] + [[0, size]]
    with storage.RangeReader(url, cache=NodeCache(tmp_path, 100 * MB)) as reader:
        for _ in range(2):
            proxy.requests.clear()
            for start, stop in ranges:
                assert reader.read(start, stop - start) == data[start:stop]
    assert not proxy.gets()


def test_a_range_over_segments(s3: str, proxy: s3_proxy.Proxy, tmp_path: Path) -> None:
    data = noise(2 * MB)
    data = data * (SEGMENT // len(data)) + data
    url = put(s3, data)
    start, stop = SEGMENT - 300_001, SEGMENT + 200_003
    cache = NodeCache(tmp_path, 500 * MB)
    with storage.RangeReader(url, cache=cache) as reader:
        reader.read(SEGMENT - 100_000, 50_000)  # what is there already is not read again
        proxy.requests.clear()
        assert reader.read(start, stop - start) == data[start:stop]
        assert len(proxy.gets()) == 2
        assert reader.read(start, stop - start) == data[start:stop]
        assert len(proxy.gets()) == 2
    assert len(files(tmp_path)) == 2
    assert used(tmp_path) < 2 * MB  # sparse


def test_another_process_finds_it(
    s3: str, proxy: s3_proxy.Proxy, forker: Forker, tmp_path: Path
) -> None:
    data = noise(3 * MB)
    url = put(s3, data)
    read(forker, url, tmp_path, 100 * MB)
    proxy.requests.clear()
    assert read(forker, url, tmp_path, 100 * MB) == storage.format_checksum(storage.crc32c(data))
    assert [r.method for r in proxy.requests] == ["HEAD"]


READ = """
import sys
from saev import storage
from saev.storage.cache import NodeCache
url, folder, bound = sys.argv[1:]
crc = 0
with storage.RangeReader(url, cache=NodeCache(folder, int(bound))) as reader:
    for start in range(0, reader.size, 300_000):
        crc = storage.crc32c(reader.read(start, min(300_000, reader.size - start)), crc)
print(storage.format_checksum(crc))
"""


def read(forker: Forker, url: str, folder: Path, bound: int) -> str:
    """Checksum of an object that another process reads through the cache."""
    return forker.output(READ, url, folder, bound).strip()


def test_a_second_epoch_asks_for_nothing(
    s3: str, proxy: s3_proxy.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3}/{uuid.uuid4().hex}"
    folder = write_shards(url, n_examples=40, content_tokens=50, d_model=64, examples_per_shard=9)
    cfg = LoaderConfig(buffer_mb=0.2)
    with folder.open() as shards:
        without = list(ShuffledLoader(shards, cfg, 100, epochs=1))
    monkeypatch.setenv("SAEV_CACHE_DIR", str(tmp_path))
    with folder.open() as shards:
        first = list(ShuffledLoader(shards, cfg, 100, epochs=1))
        assert proxy.gets("0.bin")
        proxy.requests.clear()
        loader = ShuffledLoader(shards, cfg, 100, epochs=1)
        again = list(loader)
        ordered = list(OrderedLoader(shards, cfg, 100))
        assert not proxy.requests
    for batches in (first, again):
        assert len(batches) == len(without) > 5
        assert all((a.act == b.act).all() for a, b in zip(batches, without, strict=True))
    assert all((b.act == folder.vectors(b)).all() for b in ordered)


def test_a_replaced_object_is_another(s3: str, tmp_path: Path) -> None:
    first, second = noise(MB, 1), noise(MB, 2)
    url = put(s3, first)
    cache = NodeCache(tmp_path, 100 * MB)
    for data in (first, second, first):
        storage.write_bytes(url, data)
        with storage.RangeReader(url, cache=cache) as reader:
            assert reader.read(0, MB) == reader.read(0, MB) == data


# --- Damage --------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["data", "table", "cut", "empty", "gone", "zeros"])
def test_damage_is_read_again(
    s3: str, proxy: s3_proxy.Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    data = noise(MB)
    url = put(s3, data)
    with storage.RangeReader(url, cache=NodeCache(tmp_path, 100 * MB)) as reader:
        reader.read(0, MB)
    (path,) = files(tmp_path)
    with path.open("r+b") as file:
        if harm in ("data", "table"):
            file.seek(cache_module._TABLE + 5 * CHUNK + 77 if harm == "data" else 8 * 5)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        elif harm == "zeros":  # what a file system may leave of data when the power fails
            file.seek(cache_module._TABLE)
            file.write(bytes(MB))
        else:
            file.truncate({"cut": cache_module._TABLE + 300_000, "empty": 0, "gone": 0}[harm])
    if harm == "gone":
        path.unlink()
    proxy.requests.clear()
    with storage.RangeReader(url, cache=NodeCache(tmp_path, 100 * MB)) as reader:
        assert reader.read(100, MB - 100) == data[100:]
        assert proxy.gets()
        proxy.requests.clear()
        assert reader.read(100, MB - 100) == data[100:]
        assert not proxy.gets()
    assert ("a chunk differs" in caplog.text) == (harm in ("data", "table", "cut", "zeros"))


# --- The bound -----------------------------------------------------------------------------


def test_the_least_recently_used_goes(s3: str, proxy: s3_proxy.Proxy, tmp_path: Path) -> None:
    bound = 10 * MB
    urls = [put(s3, noise(3 * MB, seed)) for seed in range(4)]

    def use(url: str, cache: NodeCache) -> int:
        proxy.requests.clear()
        with storage.RangeReader(url, cache=cache) as reader:
            reader.read(0, 3 * MB)
        return len(proxy.gets())

    cache = NodeCache(tmp_path, bound)
    assert [use(url, cache) for url in urls[:3]] == [1, 1, 1]
    age(tmp_path)
    cache = NodeCache(tmp_path, bound)
    assert use(urls[0], cache) == 0
    assert use(urls[3], cache) == 1  # takes the place of number 1 or 2
    assert used(tmp_path) <= bound
    assert [use(url, cache) for url in (urls[0], urls[3])] == [0, 0]
    assert len(files(tmp_path)) == 3


def test_more_than_fits_keeps_what_is_there(s3: str, proxy: s3_proxy.Proxy, tmp_path: Path) -> None:
    """A pass over more than the bound, again and again, hits as much as the bound holds."""
    data = noise(20 * MB)
    url = put(s3, data)
    with storage.RangeReader(url, cache=NodeCache(tmp_path, 10 * MB)) as reader:
        for turn in range(3):
            proxy.requests.clear()
            for start in range(0, 20 * MB, MB):
                assert reader.read(start, MB) == data[start : start + MB]
            assert used(tmp_path) <= 10 * MB
            assert len(proxy.gets()) == (20 if turn == 0 else 11)


def test_a_reader_keeps_what_is_evicted_under_it(s3: str, tmp_path: Path) -> None:
    data = noise(3 * MB)
    url = put(s3, data)
    with storage.RangeReader(url, cache=NodeCache(tmp_path, 100 * MB)) as reader:
        reader.read(0, 3 * MB)
        age(tmp_path)
        NodeCache(tmp_path, MB)  # another process with a smaller bound
        assert not files(tmp_path)
        assert reader.read(7, MB) == data[7 : MB + 7]


@pytest.mark.slow
def test_many_processes_with_a_tiny_bound(s3: str, tmp_path: Path) -> None:
    data = [noise(6 * MB, seed) for seed in range(3)]
    urls = [put(s3, d) for d in data]
    bound = 8 * MB
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READ, urls[i % 3], str(tmp_path), str(bound)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    most = 0
    while any(r.poll() is None for r in readers):
        most = max(most, used(tmp_path))
        time.sleep(0.01)
    for i, reader in enumerate(readers):
        expected = storage.format_checksum(storage.crc32c(data[i % 3]))
        assert reader.communicate()[0].strip() == expected
    assert 0 < most <= bound


def test_many_threads(s3: str, tmp_path: Path) -> None:
    data = noise(8 * MB)
    url = put(s3, data)
    starts = np.random.default_rng(0).integers(0, 7 * MB, 100).tolist()
    cache = NodeCache(tmp_path, 6 * MB)
    with storage.RangeReader(url, cache=cache) as reader, ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: reader.read(start, 400_000), starts))
    assert parts == [data[start : start + 400_000] for start in starts]
    assert 0 < used(tmp_path) <= 6 * MB


def test_writes_in_progress_count(tmp_path: Path) -> None:
    bound = 6 * MB
    cache = NodeCache(tmp_path, bound)
    data = memoryview(noise(7 * CHUNK))
    n_segments = 17
    with ThreadPoolExecutor(8) as pool:  # each thread writes while others count all files
        futures = [
            pool.submit(
                cache.put, f"segment-{i % n_segments:02d}", i // n_segments * 7 * CHUNK, data
            )
            for i in range(5 * n_segments)
        ]
        for future in futures:
            future.result()
    assert bound // 2 < used(tmp_path) <= bound


FILL = """
import sys
from saev import storage
from saev.storage.cache import NodeCache
url, folder = sys.argv[1:]
while True:
    with storage.RangeReader(url, cache=NodeCache(folder, 100 << 20)) as reader:
        for start in range(0, reader.size, 100_000):
            reader.read(start, min(100_000, reader.size - start))
            print(start, flush=True)
    for path in NodeCache(folder, 100 << 20).folder.glob("??/*"):
        path.unlink()
"""


@pytest.mark.slow
def test_killed_at_any_instant(s3: str, tmp_path: Path) -> None:
    data = noise(4 * MB)
    url = put(s3, data)
    for turn in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", FILL, url, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.013 * turn)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        with storage.RangeReader(url, cache=NodeCache(tmp_path, 100 * MB)) as reader:
            assert reader.read(0, 4 * MB) == data


FORKED = """
import os, sys
from saev import storage
from saev.storage import cache
url = sys.argv[1]
with storage.RangeReader(url, cache=storage.node_cache()) as reader:
    reader.read(0, 10)
    with storage.node_cache()._locked():  # as a thread of the parent may have it
        child = os.fork()
    if not child:
        with storage.RangeReader(url, cache=storage.node_cache()) as mine:
            mine.read(0, mine.size)
            os._exit(mine.read(1, 3) != reader.read(1, 3))
    print(os.waitpid(child, 0)[1])
"""


def test_a_forked_process_has_its_own(s3: str, tmp_path: Path) -> None:
    url = put(s3, noise(MB))
    env = os.environ | {"SAEV_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FORKED, url]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0\n", done.stderr
    assert used(tmp_path) > MB


# --- Going on without ----------------------------------------------------------------------

WITHOUT = """
import sys, logging
logging.basicConfig(format="%(levelname)s %(message)s")
from saev import storage
from saev.storage.cache import NodeCache
disk, url = sys.argv[1:]
storage.write_bytes(url, bytes(4 << 20))
from saev.storage.sources import FsspecObject
from saev.storage.urls import filesystem
source = FsspecObject(url, *filesystem(url), 4 << 20, "a tag")
cached = NodeCache(disk, 100 << 20).wrap(source)
for turn in range(2):
    for start in range(0, 4 << 20, 1 << 20):
        view = memoryview(bytearray(b"x" * (1 << 20)))
        cached.readinto(start, view)
        assert view == bytes(1 << 20)
print("read")
"""


@can_mount
@pytest.mark.parametrize(("options", "reason"), [("size=2m", "No space left"), ("ro", "Read-only")])
def test_a_disk_that_cannot_hold_it(tmp_path: Path, options: str, reason: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f'mount -t tmpfs -o {options} none {disk} && exec {sys.executable} -c "$0" "$@"'
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", command, WITHOUT, str(disk), "memory://x/y"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "read\n", done.stderr
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("WARNING The cache")
    assert reason in warning
    assert "going on without" in warning


def test_settings_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SAEV_CACHE_DIR", raising=False)
    assert storage.node_cache() is None
    monkeypatch.setenv("SAEV_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SAEV_CACHE_GB", "0.5")
    found = storage.node_cache()
    assert found is storage.node_cache()
    assert found is not None
    assert found.max_bytes == 500_000_000
    for wrong in ("0", "-1", "much", "nan", "inf"):
        monkeypatch.setenv("SAEV_CACHE_GB", wrong)
        with pytest.raises(storage.StorageError, match=f"SAEV_CACHE_GB is '{wrong}', expected"):
            storage.node_cache()
    with caplog.at_level(logging.WARNING):
        NodeCache(Path("/proc/nothing/here"), MB)
    assert "going on without" in caplog.text
