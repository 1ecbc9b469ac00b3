"""The stored images of a report: written in parts, read by range."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import s3_proxy
import s3fs

from saev import storage
from saev.errors import CorruptDataError, IncompleteError
from saev.visuals import sheet as sheet_module
from saev.visuals.sheet import Sheet
from saev.visuals.stored import Pictures, Stored

EXAMPLES = [int(e) for e in np.random.default_rng(0).permutation(5_000_000_000 // 7)[:200]]


def image(example: int) -> Stored:
    """Bytes that nobody decodes here."""
    rng = random.Random(example)
    return Stored(256, 192, rng.randbytes(rng.randint(6000, 10_000)), rng.randbytes(900))


def sheet(url: str, examples: Sequence[int] = EXAMPLES, key: str = "key") -> Sheet:
    return Sheet(url, examples, 256, key)


def publish(one: Sheet, url: str, n_named: int = 300) -> None:
    text, listed = one.join(n_named, lambda part: IncompleteError(f"part {part} is missing"))
    storage.write_bytes(storage.join(url, "tables.json"), text)
    storage.write_json(storage.join(url, "visuals.json"), storage.seal({}, listed))


def write(url: str) -> None:
    one = sheet(url)
    for part in reversed(range(one.n_parts)):
        one.write(part, map(image, one.examples(part)))
    publish(one, url)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet_module, "_PART_IMAGES", 80)


@pytest.fixture
def folder(small: None, tmp_path: Path) -> Path:
    write(str(tmp_path))
    return tmp_path


def test_every_image_is_found(folder: Path) -> None:
    found = Pictures.open(str(folder))
    assert found.examples.tolist() == EXAMPLES
    assert found.n_named == 300
    for example in EXAMPLES:
        stored = image(example)
        assert found.get(example) == stored.picture
        assert found.thumb(np.int64(example)) == stored.thumb
    assert found.get(1) is found.thumb(1) is None
    assert sorted(path.name for path in folder.iterdir()) == [
        "pictures-001.json", "pictures-001.parquet", "pictures-002.json", "pictures-002.parquet",
        "pictures.json", "pictures.parquet", "tables.json", "thumbs-001.parquet",
        "thumbs-002.parquet", "thumbs.parquet", "visuals.json",
    ]  # fmt: skip


def test_any_parquet_reader_opens_them(folder: Path) -> None:
    rows = pq.read_table([*sorted(folder.glob("pictures*.parquet"))]).sort_by("number").to_pydict()
    assert rows["number"] == list(range(len(EXAMPLES)))
    assert rows["example"] == EXAMPLES
    assert rows["picture"] == [image(e).picture for e in EXAMPLES]
    assert {*rows["width"]} == {256}
    assert {*rows["height"]} == {192}


def test_an_image_on_s3_is_three_small_reads(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(s3)
    with s3_proxy.before(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        found = Pictures.open(s3)
        proxy.requests.clear()
        assert found.get(EXAMPLES[150]) == image(EXAMPLES[150]).picture
        sizes = []
        for request in proxy.requests:
            first, last = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
            sizes.append(last + 1 - first)
        assert len(sizes) == 2  # the footer, and a row group of eight images
        assert max(sizes) < 100_000
        proxy.requests.clear()
        assert found.get(EXAMPLES[151]) == image(EXAMPLES[151]).picture
        assert not proxy.requests
        for example in EXAMPLES[:64]:
            assert found.thumb(example) == image(example).thumb
        assert len(proxy.requests) == 2
    s3fs.S3FileSystem.clear_instance_cache()


def test_parts_are_kept_while_their_images_are_the_same(small: None, tmp_path: Path) -> None:
    write(str(tmp_path))
    assert [sheet(str(tmp_path), key="other").find(part) for part in range(3)] == [None] * 3
    more = sheet(str(tmp_path), [*EXAMPLES, 1])
    assert [more.find(part) is None for part in range(3)] == [False, False, True]
    with pytest.raises(IncompleteError, match="part 2 is missing"):
        publish(more, str(tmp_path))


def test_no_images(tmp_path: Path) -> None:
    publish(sheet(str(tmp_path), []), str(tmp_path), 0)
    assert Pictures.open(str(tmp_path)).get(0) is None


def test_a_report_without_pictures(tmp_path: Path) -> None:
    assert Pictures.find(str(tmp_path / "missing")) is None
    storage.write_json(str(tmp_path / "visuals.json"), {"key": "of version 0.1.0"})
    with pytest.raises(IncompleteError, match=r"no stored pictures.*Run `saev visuals`"):
        Pictures.open(str(tmp_path))


def test_damage_is_named(folder: Path) -> None:
    path = folder / "pictures.parquet"
    data = bytearray(path.read_bytes())
    data[30_000] ^= 1  # in the first eight images
    path.write_bytes(data)
    found = Pictures.open(str(folder))
    with pytest.raises(CorruptDataError, match=r"pictures.parquet is damaged: bytes .*visuals"):
        found.get(EXAMPLES[0])
    assert found.get(EXAMPLES[8]) == image(EXAMPLES[8]).picture
    assert found.thumb(EXAMPLES[0]) == image(EXAMPLES[0]).thumb
    tables = folder / "tables.json"
    tables.write_bytes(tables.read_bytes().replace(b'"n_named":300', b'"n_named":301'))
    with pytest.raises(CorruptDataError, match=r"tables.json is damaged"):
        Pictures.open(str(folder))


def test_a_list_that_does_not_fit_the_tables(folder: Path) -> None:
    short = sheet(str(folder))
    text, listed = short.join(300, lambda part: IncompleteError(""))
    text = text.replace(f"{EXAMPLES[0]},".encode(), b"", 1)
    storage.write_bytes(str(folder / "tables.json"), text)
    listed["tables.json"] = storage.Listed.of(text)
    storage.write_json(str(folder / "visuals.json"), storage.seal({}, listed))
    with pytest.raises(CorruptDataError, match="199 examples are not the rows"):
        Pictures.open(str(folder))
