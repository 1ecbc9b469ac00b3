"""Lists of files, readers that check, and what becomes of a bit that flips on the way."""

import itertools
import json
import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import crc32c
import fsspec
import numpy as np
import pytest
import s3_proxy
from hypothesis import given
from hypothesis import strategies as st

from saev import storage
from saev.errors import CorruptDataError, StorageError
from saev.storage import manifest

MB = 1 << 20
DATA = np.random.default_rng(0).bytes(3 * MB + 12_345)
RECORD = {"n": 3, "nested": {"b": [1, 2.5, None], "ä": "x"}}


def publish(url: str) -> storage.Folder:
    """A folder of a large and a small object."""
    objects = {"large.bin": DATA, "small.json": b'{"a": 1}', "empty.bin": b""}
    for name, data in objects.items():
        storage.write_bytes(storage.join(url, name), data)
    files = {name: storage.Listed.of(data) for name, data in objects.items()}
    storage.write_json(storage.join(url, "done.json"), storage.seal(RECORD, files))
    return storage.Folder.open(url, "done.json", "Copy it again.")


@pytest.fixture
def folder(tmp_path: Path) -> storage.Folder:
    return publish(str(tmp_path / "folder"))


def test_a_list_says_what_another_library_says(folder: storage.Folder) -> None:
    raw = json.loads(Path(folder.url, "done.json").read_text())
    row = raw["files"]["large.bin"]
    assert (row["n_bytes"], row["checksum"]) == (len(DATA), f"crc32c:{crc32c.crc32c(DATA):08x}")
    blocks = [DATA[i : i + MB] for i in range(0, len(DATA), MB)]
    assert row["blocks"] == "".join(f"{crc32c.crc32c(block):08x}" for block in blocks)
    assert "blocks" not in raw["files"]["small.json"]
    assert folder.record == RECORD
    assert folder.checksum == storage.checksum(f"{folder.url}/done.json")


@given(st.lists(st.binary(max_size=300), max_size=6), st.sampled_from([1, 7, 64]))
def test_blocks_do_not_depend_on_how_it_was_written(parts: list[bytes], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.checksums, "BLOCK", block)
        whole = b"".join(parts)
        writer = storage.ChecksumWriter(open("/dev/null", "wb"))  # noqa: SIM115
        for part in parts:
            writer.write(part)
        assert writer.checksum == storage.format_checksum(crc32c.crc32c(whole))
        pieces = [whole[i : i + block] for i in range(0, len(whole), block)]
        expected = "".join(f"{crc32c.crc32c(p):08x}" for p in pieces)
        assert writer.blocks == (expected if len(whole) > block else "")


def test_small_ranges_of_several_blocks(folder: storage.Folder) -> None:
    with folder.reader("large.bin") as reader:
        for start in (3 * MB, 0, 2 * MB + 7, 7, 3 * MB + 1):
            assert reader.read(start, 50) == DATA[start : start + 50]


@given(st.integers(0, len(DATA)), st.integers(0, len(DATA)))
def test_any_range_is_what_it_is(tmp_path_factory, a: int, b: int) -> None:
    place = tmp_path_factory.getbasetemp() / "ranges.bin"
    if not place.exists():
        place.write_bytes(DATA)
    with storage.CheckedReader(str(place), storage.Listed.of(DATA)) as reader:
        assert reader.read(min(a, b), abs(a - b)) == DATA[min(a, b) : max(a, b)]
        for outside in ((len(DATA), 1 << 60), (-1, 1)):
            with pytest.raises(CorruptDataError, match="were asked for"):
                reader.read(*outside)


def test_a_flipped_bit_is_found_where_it_is_read(folder: storage.Folder) -> None:
    place = Path(folder.url, "large.bin")
    rng = np.random.default_rng(1)
    for bit in rng.integers(0, 8 * len(DATA), 40).tolist():
        place.write_bytes(s3_proxy.flip(DATA, bit))
        with folder.reader("large.bin") as reader:
            block = bit // 8 // MB
            for i in range(4):
                if i != block:
                    assert reader.read(i * MB, 50) == DATA[i * MB : i * MB + 50]
            message = rf"large\.bin is damaged: bytes {block * MB} to .* expected .*Copy it again"
            with pytest.raises(CorruptDataError, match=message):
                reader.read(block * MB, 50)
        with pytest.raises(CorruptDataError, match=r"large\.bin is damaged: it has checksum"):
            folder.read_bytes("large.bin")


def test_a_flipped_bit_of_the_list_is_found(folder: storage.Folder) -> None:
    """Or it changes nothing, as one in white space."""
    place = Path(folder.url, "done.json")
    data = place.read_bytes()
    n_right = 0
    for bit in range(8 * len(data)):
        place.write_bytes(s3_proxy.flip(data, bit))
        try:
            found = storage.Folder.open(folder.url, "done.json")
        except CorruptDataError:
            continue
        assert (found.record, found.files) == (RECORD, folder.files)
        n_right += 1
    assert n_right < len(data)


@pytest.mark.parametrize("data", [DATA + b"x", DATA[:-1], b""], ids=["longer", "shorter", "empty"])
def test_an_object_of_another_size_is_refused(folder: storage.Folder, data: bytes) -> None:
    """Also if the range that is read is as it was."""
    Path(folder.url, "large.bin").write_bytes(data)
    for read in (folder.read_bytes, folder.reader):
        with pytest.raises(CorruptDataError, match=rf"has {len(data)} bytes, expected {len(DATA)}"):
            read("large.bin")


def test_every_digit_of_a_checksum_counts(tmp_path: Path) -> None:
    place, right = str(tmp_path / "x"), f"crc32c:{crc32c.crc32c(DATA):08x}"
    storage.write_bytes(place, DATA)
    storage.verify(place, right)
    assert storage.read_verified(place, right) == DATA
    for i in range(len("crc32c:"), len(right)):
        wrong = f"{right[:i]}{'0' if right[i] != '0' else '1'}{right[i + 1 :]}"
        for check in (storage.verify, storage.read_verified):
            with pytest.raises(CorruptDataError, match=f"{right}, expected {wrong}"):
                check(place, wrong)


def test_what_is_listed_and_missing_is_an_error(folder: storage.Folder) -> None:
    for name in ("large.bin", "empty.bin"):
        Path(folder.url, name).unlink()
        assert folder.has(name)
        for read in (folder.read_bytes, folder.reader):
            with pytest.raises(CorruptDataError, match=rf"{name} is missing; done\.json lists it"):
                read(name)
    Path(folder.url, "other").write_bytes(b"x")
    assert not folder.has("other")
    with pytest.raises(CorruptDataError, match="is not listed in"):
        folder.read_bytes("other")


def test_what_an_earlier_version_wrote_is_read_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "done.json").write_text('{"n": 3}')
    (tmp_path / "x").write_bytes(b"abc")
    for _ in range(2):
        old = storage.Folder.open(str(tmp_path), "done.json")
        assert (old.record, old.files) == ({"n": 3}, None)
        assert (old.has("x"), old.has("y")) == (True, False)
        assert old.read_bytes("x") == b"abc"
        with old.reader("x") as reader:
            assert reader.read(1, 2) == b"bc"
    assert len([r for r in caplog.records if "earlier version" in r.message]) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("files"),
        lambda raw: raw.pop("checksum"),
        lambda raw: raw.update(files=[]),
        lambda raw: raw["files"].update({"../x": raw["files"]["small.json"]}),
        lambda raw: raw["files"]["small.json"].update(n_bytes=-1),
        lambda raw: raw["files"]["small.json"].update(n_bytes="8"),
        lambda raw: raw["files"]["small.json"].update(n_bytes=True),
        lambda raw: raw["files"]["small.json"].update(checksum=7),
        lambda raw: raw["files"]["small.json"].update(more=7),
        lambda raw: raw["files"]["large.bin"].update(n_bytes=9e99),
        lambda raw: raw["files"]["large.bin"].update(blocks="00"),
    ],
)
def test_a_list_that_is_none(folder: storage.Folder, change: Callable[[dict], object]) -> None:
    """Also with a checksum that fits."""
    place = Path(folder.url, "done.json")
    raw = json.loads(place.read_text())
    change(raw)
    for fitting in (False, True):
        if fitting and {"files", "checksum"} <= raw.keys():
            raw["checksum"] = manifest._content_checksum(
                {k: v for k, v in raw.items() if k != "checksum"}
            )
        place.write_text(json.dumps(raw))
        with pytest.raises(CorruptDataError, match=r"done\.json"):
            storage.Folder.open(folder.url, "done.json")


# --- A bit that flips on the way -------------------------------------------------------------


@pytest.fixture
def remote(s3: str) -> storage.Folder:
    return publish(f"{s3}/{uuid.uuid4().hex}")


@pytest.fixture
def proxy(
    s3: str, remote: storage.Folder, monkeypatch: pytest.MonkeyPatch
) -> Iterator[s3_proxy.Proxy]:
    import os

    import s3fs

    # Not every store sends a checksum along that botocore can compare.
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    monkeypatch.setenv("SAEV_PATIENCE_S", "2")
    with s3_proxy.before(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


def flips(proxy: s3_proxy.Proxy, n: int) -> None:
    """The first ``n`` answers with a body have a flipped bit, each another one."""
    turn, bit = itertools.count(), itertools.count(1_234)
    proxy.fault = lambda r: "flip" if r.method == "GET" and next(turn) < n else ""
    proxy.flipped_bit = lambda n_bits: next(bit) * 7 % n_bits


READS = {
    "closing": lambda f: storage.Folder.open(f.url, "done.json").record == RECORD,
    "whole": lambda f: f.read_bytes("large.bin") == DATA,
    "json": lambda f: f.read_json("small.json") == {"a": 1},
    "ranges": lambda f: f.reader("large.bin").read(MB - 5, MB) == DATA[MB - 5 : 2 * MB - 5],
    "plain json": lambda f: storage.read_json(f"{f.url}/small.json") == {"a": 1},
}


@pytest.mark.parametrize("read", READS)
def test_one_flip_on_the_way_is_read_again(
    read: str, remote: storage.Folder, proxy: s3_proxy.Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    flips(proxy, 1)
    if read == "plain json":  # no checksum, but this flip makes it no JSON
        proxy.flipped_bit = lambda n_bits: 7
    assert READS[read](remote)
    (said,) = (r.message for r in caplog.records if "was read wrongly once" in r.message)
    assert "byte" in said
    assert "the stored object is sound" in said


def test_what_botocore_finds_wrong_is_read_again(
    remote: storage.Folder, proxy: s3_proxy.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_supported")
    s3fs.S3FileSystem.clear_instance_cache()
    flips(proxy, 1)
    # The first attempt also starts the client, which takes seconds on a busy machine. They count.
    monkeypatch.setenv("SAEV_PATIENCE_S", "60")
    assert remote.read_bytes("large.bin") == DATA
    monkeypatch.setenv("SAEV_PATIENCE_S", "4")
    flips(proxy, 1_000_000)
    with pytest.raises(StorageError, match=r"large\.bin: .*checksum") as caught:
        remote.read_bytes("large.bin")
    assert not isinstance(caught.value, CorruptDataError)


@pytest.mark.parametrize("read", [name for name in READS if name != "plain json"])
def test_flips_all_the_way_are_no_damage(
    read: str, remote: storage.Folder, proxy: s3_proxy.Proxy
) -> None:
    """Reads that differ prove nothing about what is stored."""
    flips(proxy, 1_000_000)
    with pytest.raises(StorageError, match=r"cannot be read reliably.*do not delete") as caught:
        READS[read](remote)
    assert not isinstance(caught.value, CorruptDataError)
    proxy.fault = lambda request: ""
    assert READS[read](remote)


def test_the_same_flip_each_time_looks_like_damage(
    remote: storage.Folder, proxy: s3_proxy.Proxy
) -> None:
    flips(proxy, 1_000_000)
    proxy.flipped_bit = lambda n_bits: 4_321
    with pytest.raises(CorruptDataError, match=r"large\.bin is damaged"):
        remote.read_bytes("large.bin")


def test_a_flip_that_a_cache_keeps(
    remote: storage.Folder, proxy: s3_proxy.Proxy, tmp_path: Path
) -> None:
    """The node's cache has a checksum that fits the flip, fsspec's has none; both forget it."""
    place, listed = f"{remote.url}/large.bin", remote.listed("large.bin")
    assert listed is not None
    cache = storage.NodeCache(tmp_path / "node", 1 << 30)
    flips(proxy, 1)
    reader = storage.RangeReader(place, cache=cache)
    buffer = bytearray(MB)

    def read(fresh: bool) -> bytearray:
        (reader.reread if fresh else reader.readinto)(0, buffer)
        return buffer

    def wrong(data: bytearray) -> CorruptDataError | None:
        return None if data == DATA[:MB] else CorruptDataError("wrong")

    storage.confirmed(place, read, wrong)
    assert bytes(buffer) == DATA[:MB]
    for _ in range(2):  # from the store, then from the cache
        reader.readinto(0, buffer)
        assert bytes(buffer) == DATA[:MB]

    fsspec.config.conf["simplecache"] = {"cache_storage": str(tmp_path / "simple")}
    try:
        flips(proxy, 1)
        for _ in range(2):
            assert storage.read_listed(f"simplecache::{place}", listed) == DATA
    finally:
        del fsspec.config.conf["simplecache"]


def test_a_local_file_is_read_past_the_page_cache(
    folder: storage.Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A page with a flipped bit: the next read sees what the disk has."""
    import os

    real, turn = os.preadv, itertools.count()

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        n = real(fd, buffers, offset)
        if next(turn) == 0:
            buffers[0][17] ^= 8
        return n

    monkeypatch.setattr(os, "preadv", preadv)
    with folder.reader("large.bin") as reader, caplog.at_level(logging.WARNING):
        assert reader.read(0, 100) == DATA[:100]
    assert "byte 17 was" in caplog.text
