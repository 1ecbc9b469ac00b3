"""Uploads in parts, while a network loses, delays, doubles and reorders requests and answers."""

import random
import types
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import s3_proxy
from test_storage_s3 import endpoint, proxy  # noqa: F401 - fixtures

from saev import storage
from saev.errors import StorageError
from saev.storage import uploads
from saev.storage.urls import filesystem

MB = 1 << 20
PART_BYTES = uploads.PART_BYTES
FIRST = random.Random(1).randbytes(11 * MB)
SECOND = random.Random(2).randbytes(11 * MB)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", 5 * MB)  # the least that S3 takes


@pytest.fixture
def url(s3: str) -> str:
    return f"{s3}/{uuid.uuid4().hex}/x.bin"


def is_part(request: s3_proxy.Request) -> bool:
    return request.method == "PUT" and "partNumber" in request.path


def is_completion(request: s3_proxy.Request) -> bool:
    return request.method == "POST" and "uploadId" in request.path


def is_start(request: s3_proxy.Request) -> bool:
    return request.method == "POST" and request.path.endswith("?uploads")


def times(
    n: int, fault: s3_proxy.Fault, which: Callable[[s3_proxy.Request], bool]
) -> Callable[[s3_proxy.Request], s3_proxy.Fault]:
    """The fault for the first n of some requests."""
    left = [fault] * n
    return lambda request: left.pop() if left and which(request) else ""


@pytest.mark.parametrize(
    ("which", "fault"),
    [
        *((is_completion, fault) for fault in ("reset", "lost", "cut", "twice", "late", "503")),
        (is_part, "lost"),
        (is_part, "late"),
        (is_start, "lost"),
    ],
)
def test_one_kind_of_trouble(url, proxy, which, fault) -> None:  # noqa: F811
    """Twice, which is as often as botocore tries."""
    proxy.fault = times(2, fault, which)
    storage.write_bytes(url, FIRST)
    assert storage.read_bytes(url) == FIRST
    storage.write_bytes(url, SECOND)
    proxy.release()  # what was late comes now
    assert storage.read_bytes(url) == SECOND


def test_a_completion_that_comes_after_all_is_harmless(url, proxy) -> None:  # noqa: F811
    """It was held back, sent again, and the object has been replaced since."""
    proxy.fault = times(1, "late", is_completion)
    storage.write_bytes(url, FIRST)
    assert len(proxy.held) == 1
    storage.write_bytes(url, SECOND)
    assert min(proxy.release()) >= 400  # there is no such upload
    assert storage.read_bytes(url) == SECOND


def test_a_completion_after_its_writer_gave_up_is_harmless(url, proxy, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("SAEV_PATIENCE_S", "1")
    proxy.fault = lambda request: "late" if is_completion(request) else ""
    with pytest.raises(StorageError, match=r"Cannot write .*x\.bin"):
        storage.write_bytes(url, FIRST)
    proxy.fault = lambda request: ""
    monkeypatch.setenv("SAEV_PATIENCE_S", "60")
    storage.write_bytes(url, SECOND)
    assert min(proxy.release()) >= 400
    assert storage.read_bytes(url) == SECOND


@pytest.mark.parametrize("says", ["InternalError", "NoSuchUpload"])
def test_an_answer_that_is_not_true(url, proxy, says) -> None:  # noqa: F811
    """The upload was completed, or was not, whatever the answer says."""
    status = {"InternalError": 200, "NoSuchUpload": 404}[says]
    proxy.fault = times(1, s3_proxy.error(status, says, "no"), is_completion)
    if says == "InternalError":  # sent again
        storage.write_bytes(url, FIRST)
        assert storage.read_bytes(url) == FIRST
        return
    with pytest.raises(StorageError, match="was not published as it was written") as caught:
        storage.write_bytes(url, FIRST)
    assert storage.is_passing(caught.value)


def test_success_that_was_none_is_found_out(url, proxy) -> None:  # noqa: F811
    storage.write_bytes(url, SECOND)
    done = (
        b"<CompleteMultipartUploadResult><ETag>&quot;x&quot;</ETag></CompleteMultipartUploadResult>"
    )
    proxy.fault = times(
        9, s3_proxy.Reply(200, done, {"Content-Type": "application/xml"}), is_completion
    )
    with pytest.raises(StorageError, match="it holds something else"):
        storage.write_bytes(url, FIRST)
    assert storage.read_bytes(url) == SECOND


def test_a_part_that_changes_on_its_way_is_not_taken(url, endpoint, proxy) -> None:  # noqa: F811
    """The checksum of each part goes with it."""
    storage.write_bytes(url, FIRST)
    parts = [request for request in proxy.requests if is_part(request)]
    assert len(parts) == 3
    assert all("content-md5" in request.headers for request in parts)


def test_many_threads_and_every_fault(s3, proxy) -> None:  # noqa: F811
    chance = random.Random(0)
    kinds = ["reset", "lost", "cut", "twice", "late", "503", "500"]
    proxy.fault = lambda request: chance.choice(kinds) if chance.random() < 0.3 else ""
    folder = f"{s3}/{uuid.uuid4().hex}"

    def write(i: int) -> None:
        storage.write_bytes(f"{folder}/{i}.bin", FIRST[i : i + 6 * MB])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    proxy.fault = lambda request: ""
    proxy.release()
    for i in range(8):
        assert storage.read_bytes(f"{folder}/{i}.bin") == FIRST[i : i + 6 * MB]


def test_what_failed_leaves_no_parts(s3: str, url: str) -> None:
    def write() -> None:
        with storage.open_write(url) as out:
            out.write(FIRST)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        write()
    assert not storage.exists(url)
    fs, _ = filesystem(s3)
    left = fs.call_s3("list_multipart_uploads", Bucket=s3[len("s3://") :]).get("Uploads", [])
    assert [row for row in left if row["Key"] in url] == []


def test_the_largest_object_fits_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html: 5 TiB in 10,000 parts of
    5 MiB to 5 GiB."""
    monkeypatch.setattr(uploads, "PART_BYTES", PART_BYTES)

    def size(n_before: int) -> int:
        upload = types.SimpleNamespace(
            _fs=types.SimpleNamespace(fixed_upload_size=False), _parts=range(n_before)
        )
        return uploads.Upload._part_bytes(upload)  # type: ignore[arg-type]

    sizes = np.array([size(n) for n in range(10_000)])
    written = sizes.cumsum()
    assert written[-1] >= 5 << 40
    assert sizes[0] >= 5 << 20
    assert sizes[written <= 5 << 40].max() <= 5 << 30
