"""Listings of buckets, page by page, beside what s3fs makes of the same bucket."""

import gc
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import pytest
import s3_proxy
import s3fs
from hypothesis import given
from hypothesis import strategies as st

from saev import storage
from saev.errors import StorageError
from saev.storage import s3_listing
from saev.storage.urls import filesystem

NAMES = ["a.png", "a/b.png", "a b+c%20&<>.png", "\u00e9\u4e2d\U0001f600.png", "z/'\"=?#.png", "m/"]
"""Also a folder's marker, which no listing has."""


@pytest.fixture
def client(s3: str) -> object:
    return botocore.session.get_session().create_client("s3")


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_proxy.Proxy]:
    """Before the server; it pages by threes, as a store may at any number below 1000."""
    with s3_proxy.before(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setitem(s3_listing._QUERY, "max-keys", "3")
        monkeypatch.setenv("SAEV_PATIENCE_S", "3")
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def place(s3: str, client) -> str:
    """A folder with NAMES, and neighbours that are not below it."""
    folder = uuid.uuid4().hex
    bucket = s3.removeprefix("s3://")
    for i, name in enumerate(NAMES):
        client.put_object(Bucket=bucket, Key=f"{folder}/{name}", Body=b"x" * i)
    for other in (f"{folder}-2/x.png", f"{folder}.png", folder):
        client.put_object(Bucket=bucket, Key=other, Body=b"other")
    return f"{s3}/{folder}"


def by_s3fs(url: str) -> dict[str, tuple[int, str, float]]:
    """Key, size, entity tag and time of each object, as s3fs and botocore read them."""
    fs, key = filesystem(url)
    return {
        name.removeprefix(key + "/"): (
            row["size"], row["ETag"].strip('"'), row["LastModified"].timestamp(),
        )
        for name, row in fs.find(key, detail=True).items()
        if not name.endswith("/") and name.startswith(key + "/")
    }  # fmt: skip


def test_pages_say_what_s3fs_says(place: str, proxy: s3_proxy.Proxy) -> None:
    expected = by_s3fs(place)
    assert len(expected) == len(NAMES) - 1
    proxy.requests.clear()
    found = sorted(storage.walk(place))
    assert {o.key: (o.size, o.etag, o.modified) for o in found} == expected
    pages = [r for r in proxy.requests if "list-type=2" in r.path]
    assert len(pages) == 2  # of three and two, and the marker
    assert all("delimiter" not in r.path for r in pages)
    assert [o.key for o in storage.walk(place)] == sorted(expected)


@pytest.mark.parametrize("fault", ["reset", "cut", "503"])
def test_a_page_is_asked_for_again(place: str, proxy: s3_proxy.Proxy, fault: str) -> None:
    expected = sorted(storage.walk(place))
    seen: list[str] = []

    def once_per_page(request: s3_proxy.Request) -> str:
        if "list-type=2" in request.path and request.path not in seen:
            seen.append(request.path)
            return fault
        return ""

    proxy.fault = once_per_page
    assert sorted(storage.walk(place)) == expected
    assert len(seen) == 2


def test_a_refusal_on_a_later_page_is_an_error(place: str, proxy: s3_proxy.Proxy) -> None:
    proxy.fault = lambda request: "403" if "continuation-token" in request.path else ""
    with pytest.raises(StorageError, match=f"Cannot list {place}: ") as err:
        sorted(storage.walk(place))
    assert "\n" not in str(err.value)


def test_missing_and_files(place: str, proxy: s3_proxy.Proxy) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        next(storage.walk(f"{place}/nothing"))
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        next(storage.walk(f"{place}/a.png"))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>", b"<Error><Code>X</Code></Error>", b"<ListBucketResult></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key></Contents>"
        b"</ListBucketResult>",
        b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key><Size>1x</Size>"
        b"</Contents></ListBucketResult>",
    ],
)  # fmt: skip
def test_what_is_no_page_is_not_taken_for_an_empty_one(body: bytes) -> None:
    with pytest.raises(OSError, match="listing is damaged"):
        s3_listing.parse(body)


@given(st.binary(max_size=200))
def test_other_bytes_never_end_in_another_error(body: bytes) -> None:
    for data in (body, b"<ListBucketResult>" + body + b"</ListBucketResult>"):
        with pytest.raises(OSError, match="listing is damaged"):
            s3_listing.parse(data)


def test_a_page_is_freed_with_its_last_reference() -> None:
    """A million objects are a thousand pages. What waits for Python's collector adds up."""
    rows = "".join(f"<Contents><Key>{i}</Key><Size>1</Size></Contents>" for i in range(1000))
    body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
    gc.collect()
    gc.disable()
    try:
        assert len(s3_listing.parse(body).rows) == 1000
        left = [o for o in gc.get_objects() if type(o) is dict and o.get("Key") == "999"]
    finally:
        gc.enable()
    assert not left


@pytest.mark.slow
def test_a_million_files_are_scanned_one_by_one(tmp_path: Path) -> None:
    """Here 30,000 in one folder: what is kept of each would be seen."""
    code = (
        "import sys, tracemalloc\n"
        "from saev import storage\n"
        "sum(1 for _ in storage.walk(sys.argv[1]))\n"  # Python's table of names is that large now
        "tracemalloc.start()\n"
        "n = sum(1 for _ in storage.walk(sys.argv[1]))\n"
        "print(n, tracemalloc.get_traced_memory()[1])"
    )
    (tmp_path / "f").mkdir()
    (tmp_path / "x").write_bytes(b"x")
    for i in range(30_000):
        os.link(tmp_path / "x", tmp_path / "f" / f"{i:07d}.png")
    command = [sys.executable, "-c", code, str(tmp_path / "f")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    n, peak = map(int, ran.stdout.split())
    assert n == 30_000
    assert peak / n < 120  # a name and its place in a list


def test_a_walk_finds_finished_files_only(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x")
    (tmp_path / "a" / ".tmp-1").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    assert [found.key for found in storage.walk(tmp_path)] == ["a/file"]
    found = storage.walk(tmp_path, temporary=True)
    assert [one.key for one in sorted(found)] == ["a/.tmp-1", "a/file"]
