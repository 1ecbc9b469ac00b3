"""saev.storage: the same behaviour on a disk, in memory and on an S3 server; and its faults."""

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.session
import crc32c
import fsspec
import pytest
import s3_proxy
import s3fs
from described import files_below
from forker import Forker
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from saev import storage
from saev.errors import CorruptDataError, StorageError
from saev.storage import deleting

MB = 1 << 20


@pytest.fixture(params=["local", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place on each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "root")
    folder = uuid.uuid4().hex
    if request.param == "memory":
        return f"memory://{folder}"
    return f"{request.getfixturevalue('s3')}/{folder}"


# --- The same everywhere -------------------------------------------------------------------


def test_a_written_object_is_there(root: str) -> None:
    url = storage.join(root, "a", "b.bin")
    assert not storage.exists(url)
    storage.write_bytes(url, b"hello")
    assert storage.exists(url)
    assert not storage.is_dir(url)
    assert storage.is_dir(storage.parent(url))
    assert storage.size(url) == 5
    assert storage.read_bytes(url) == b"hello"
    assert storage.checksum(url) == f"crc32c:{crc32c.crc32c(b'hello'):08x}"


def test_writing_again_replaces(root: str) -> None:
    url = storage.join(root, "x.txt")
    for text in ("a long first version", "short"):
        storage.write_text(url, text)
        assert storage.read_text(url) == text
        assert storage.size(url) == len(text)


def test_listing_sees_what_was_just_written_and_deleted(root: str) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        storage.write_text(storage.join(root, name), name)
        storage.list_dir(root)  # would fill a cache, if there were one
    rows = [(e.name, e.size, e.is_dir) for e in storage.list_dir(root)]
    assert rows == [("a.txt", 5, False), ("b.txt", 5, False), ("sub", 0, True)]
    assert files_below(root) == [storage.join(root, n) for n in ("a.txt", "b.txt", "sub/c.txt")]
    storage.delete(storage.join(root, "b.txt"))
    storage.delete(storage.join(root, "sub"), recursive=True)
    assert [e.name for e in storage.list_dir(root)] == ["a.txt"]
    assert not storage.exists(storage.join(root, "sub"))


def test_deleting_what_is_not_there_is_no_error(root: str) -> None:
    storage.delete(storage.join(root, "nothing"))
    storage.delete(storage.join(root, "nothing"), recursive=True)


def test_a_stream_appears_only_when_its_block_ends(root: str) -> None:
    url = storage.join(root, "stream.bin")
    with storage.open_write(url) as handle:
        for _ in range(3):
            handle.write(b"x" * MB)
        assert not storage.exists(url)
    assert storage.size(url) == 3 * MB


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_stream_leaves_nothing(root: str, error: type[BaseException]) -> None:
    url = storage.join(root, "stream.bin")
    storage.write_bytes(storage.join(root, "other"), b"")

    def stream() -> None:
        with storage.open_write(url) as handle:
            handle.write(b"x" * MB)
            raise error

    def scatter() -> None:
        with storage.open_write_at(url) as writer:
            writer.write(5, b"x" * MB)
            raise error

    for fail in (stream, scatter):
        with pytest.raises(error):
            fail()
    assert [e.name for e in storage.list_dir(root)] == ["other"]
    path = storage.local_path(root)
    if path is not None:
        assert os.listdir(path) == ["other"]


def test_a_failed_stream_leaves_the_old_object(root: str) -> None:
    url = storage.join(root, "stream.bin")
    storage.write_bytes(url, b"old")
    with contextlib.suppress(RuntimeError), storage.open_write(url) as handle:
        handle.write(b"new" * MB)
        raise RuntimeError
    assert storage.read_bytes(url) == b"old"


def test_positional_writes_from_many_threads(root: str) -> None:
    url = storage.join(root, "parts.bin")
    blocks = [bytes([i]) * 1000 for i in range(100)]
    with storage.open_write_at(url) as writer, ThreadPoolExecutor(8) as pool:
        order = sorted(range(100), key=lambda i: (i * 37) % 100)
        list(pool.map(lambda i: writer.write(i * 1000, blocks[i]), order))
        assert not storage.exists(url)
    assert storage.read_bytes(url) == b"".join(blocks)


def test_positional_writer_moves_and_truncates(root: str) -> None:
    url = storage.join(root, "moved.bin")
    data = os.urandom(20 * MB)  # more than one chunk, and ranges that overlap
    with storage.open_write_at(url) as writer:
        writer.write(3 * MB, data)
        writer.move(3 * MB, MB, len(data))
        writer.write(0, b"\0" * MB)
        writer.truncate(MB + len(data))
        with pytest.raises(ValueError, match="towards the front"):
            writer.move(0, 1, 1)
    assert storage.read_bytes(url) == b"\0" * MB + data


def test_ranges_from_many_threads(root: str) -> None:
    url = storage.join(root, "ranges.bin")
    data = os.urandom(300_000)
    storage.write_bytes(url, data)
    with storage.RangeReader(url) as reader, ThreadPoolExecutor(8) as pool:
        assert reader.size == len(data)
        starts = range(0, 290_000, 7_001)
        parts = list(pool.map(lambda start: reader.read(start, 10_000), starts))
    assert parts == [data[start : start + 10_000] for start in starts]


@pytest.mark.parametrize("size", [1, 4096, 10_000_001])
@pytest.mark.parametrize("disk", ["tmp", "tmpfs"])
def test_direct_reads_of_any_range(tmp_path: Path, disk: str, size: int) -> None:
    """Where a file system cannot read past its page cache, nobody notices."""
    if disk == "tmpfs" and not Path("/dev/shm").is_dir():
        pytest.skip("there is no /dev/shm")
    data = os.urandom(size)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if disk == "tmpfs" else tmp_path) as folder:
        storage.write_bytes(storage.join(folder, "x"), data)
        with storage.RangeReader(storage.join(folder, "x"), direct=True) as reader:
            for start in (0, 1, 4095, 4096, 4097, 5_000_003, size - 1):
                for stop in (start + 1, start + 4096, start + 4_194_303, size):
                    if start < stop <= size:
                        assert reader.read(start, stop - start) == data[start:stop]


@pytest.mark.parametrize("direct", [False, True])
def test_direct_reads_leave_the_page_cache_alone(tmp_path: Path, direct: bool) -> None:
    place = tmp_path / "x"
    place.write_bytes(os.urandom(8 * MB))
    fd = os.open(place, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if _cached(fd, 7 * MB):
            pytest.skip("this file system keeps its pages")
        with storage.RangeReader(place, direct=direct) as reader:
            reader.read(1000, 5 * MB)
        assert _cached(fd, 3 * MB) == (not direct)
    finally:
        os.close(fd)


def _cached(fd: int, offset: int) -> bool:
    """Whether the kernel has it; asking may make it read a little from there on."""
    try:
        return os.preadv(fd, [bytearray(4096)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False


def test_reading_past_the_end_says_truncated(root: str) -> None:
    url = storage.join(root, "short.bin")
    storage.write_bytes(url, b"12345")
    with storage.RangeReader(url) as reader:
        assert reader.read(5, 0) == b""
        with pytest.raises(CorruptDataError, match=r"short\.bin is truncated: bytes 3-9 .* has 5"):
            reader.read(3, 6)


@pytest.mark.parametrize(
    "ask",
    [
        storage.read_bytes, storage.read_json, storage.size, storage.checksum, storage.list_dir,
        lambda url: next(storage.walk(url)), storage.RangeReader,
    ],
)  # fmt: skip
def test_a_missing_object_is_one_clear_error(root: str, ask) -> None:
    url = storage.join(root, "no", "such")
    with pytest.raises(StorageError, match=r"Cannot .*no/such: it does not exist"):
        ask(url)


def test_json_round_trip_and_truncation(root: str) -> None:
    url = storage.join(root, "x.json")
    storage.write_json(url, {"b": 1, "a": ["ü", 0.5, None]})
    assert storage.read_json(url) == {"a": ["ü", 0.5, None], "b": 1}
    storage.write_bytes(url, storage.read_bytes(url)[:-5])
    with pytest.raises(CorruptDataError, match=r"x\.json is not valid JSON .* may be truncated"):
        storage.read_json(url)
    storage.write_bytes(url, b"\xff\xfe")
    with pytest.raises(CorruptDataError, match="not UTF-8"):
        storage.read_json(url)


def test_check_writable_leaves_nothing(root: str) -> None:
    storage.write_bytes(storage.join(root, "x"), b"")
    storage.check_writable(root)
    assert [storage.name(u) for u in files_below(root)] == ["x"]


def test_check_writable_deletes_what_a_killed_process_left(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(storage.join(root, "x"), b"")
    with monkeypatch.context() as killed:
        killed.setattr(deleting, "clean_up", lambda url: None)
        storage.check_writable(root)
    assert len(sorted(storage.walk(root, temporary=True))) == 2
    storage.check_writable(root)
    assert [found.key for found in sorted(storage.walk(root, temporary=True))] == ["x"]


def test_concurrent_writers_of_one_object_leave_one_whole(root: str) -> None:
    url = storage.join(root, "raced.bin")
    barrier = threading.Barrier(4)

    def write(i: int) -> None:
        barrier.wait()
        storage.write_bytes(url, bytes([i]) * MB)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    data = storage.read_bytes(url)
    assert len(data) == MB
    assert len(set(data)) == 1


# --- Listings ------------------------------------------------------------------------------


def test_listing_tells_what_changed(root: str) -> None:
    begin = time.time() - 2  # object stores keep whole seconds
    for key in ("b/c.txt", "a.txt", "b/d/e.txt"):
        storage.write_text(storage.join(root, key), key)
    first = sorted(storage.walk(root))
    assert [(o.key, o.size) for o in first] == [("a.txt", 5), ("b/c.txt", 7), ("b/d/e.txt", 9)]
    assert all(begin <= o.modified <= time.time() + 2 for o in first)
    assert [o.key for o in sorted(storage.walk(storage.join(root, "b")))] == ["c.txt", "d/e.txt"]

    storage.write_text(storage.join(root, "a.txt"), "other")  # of the same size
    storage.delete(storage.join(root, "b", "c.txt"))
    second = sorted(storage.walk(root))
    assert [o.key for o in second] == ["a.txt", "b/d/e.txt"]
    assert second[0] != first[0]
    assert second[1] == first[2]
    if root.startswith("s3://"):
        assert first[0].etag == hashlib.md5(b"a.txt").hexdigest()
        assert second[0].etag == hashlib.md5(b"other").hexdigest()
    elif root.startswith("memory://"):
        assert first[0].etag == ""
    else:  # the time to the nanosecond, which a float of seconds cannot hold
        assert first[0].etag.startswith("mtime:")
        assert second[0].etag != first[0].etag


def test_listing_of_a_file_is_an_error(root: str) -> None:
    storage.write_text(storage.join(root, "x.txt"), "x")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        next(storage.walk(storage.join(root, "x.txt")))


def test_listing_is_one_listing_however_many_keys(s3: str) -> None:
    folder = uuid.uuid4().hex
    client = botocore.session.get_session().create_client("s3")
    for i in range(200):
        client.put_object(Bucket=s3[len("s3://") :], Key=f"{folder}/{i % 7}/{i:05d}", Body=b"x")
    client.put_object(Bucket=s3[len("s3://") :], Key=f"{folder}/7/", Body=b"")  # a console's folder
    with s3_proxy.before(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.url)
            s3fs.S3FileSystem.clear_instance_cache()
            objects = sorted(storage.walk(f"{s3}/{folder}"))
        s3fs.S3FileSystem.clear_instance_cache()
    assert [o.key for o in objects] == sorted(f"{i % 7}/{i:05d}" for i in range(200))
    assert len(proxy.requests) <= 2


def test_listing_follows_links_and_sees_changed_permissions(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.txt").write_text("x")
    os.utime(tmp_path / "data" / "x.txt", (1, 1))  # what cp -a and rsync -t do
    (tmp_path / "link").symlink_to("data")
    (tmp_path / "data" / "cycle").symlink_to("..")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / f"{storage.TMP_PREFIX}1-y").write_text("y")
    objects = sorted(storage.walk(tmp_path))
    assert [o.key for o in objects] == ["data/x.txt", "link/x.txt"]
    assert all(o.modified > 1_000_000 for o in objects)  # ctime cannot be set back
    keys = [o.key for o in sorted(storage.walk(tmp_path, temporary=True))]
    assert keys == [f"{storage.TMP_PREFIX}1-y", "data/x.txt", "link/x.txt"]


# --- One creator ---------------------------------------------------------------------------


def test_create_is_for_the_first(root: str) -> None:
    url = storage.join(root, "claims", "1.json")
    assert storage.create(url, b"mine")
    assert not storage.create(url, b"yours")
    assert storage.read_bytes(url) == b"mine"
    assert storage.create(url, b"mine")  # as after a request whose answer was lost
    storage.delete(url)
    assert storage.create(url, b"yours")
    assert [o.key for o in sorted(storage.walk(root, temporary=True))] == ["claims/1.json"]


def test_of_racing_threads_one_creates(root: str) -> None:
    for turn in range(5):
        url = storage.join(root, f"{turn}.json")
        barrier = threading.Barrier(8)

        def create(i: int, url: str = url, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return storage.create(url, b"%d" % i)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert storage.read_bytes(url) == b"%d" % won.index(True)


CREATE = """
import os, sys, time
from saev import storage
url, me, ready, go = sys.argv[1:]
storage.exists(url)  # connects
open(ready, "w").close()
while not os.path.exists(go):
    time.sleep(0.001)
print(storage.create(url, me.encode()))
"""


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_of_racing_processes_one_creates(
    request: pytest.FixtureRequest, forker: Forker, tmp_path: Path, kind: str
) -> None:
    n, folder = (8, tmp_path) if kind == "local" else (3, request.getfixturevalue("s3"))
    url, go = storage.join(folder, str(uuid.uuid4())), tmp_path / "go"
    ready = [tmp_path / f"ready{i}" for i in range(n)]
    racers = [
        forker.start([url, f"racer {i}", place, go], script=CREATE) for i, place in enumerate(ready)
    ]
    deadline = time.monotonic() + 60
    while not all(place.exists() for place in ready) and time.monotonic() < deadline:
        time.sleep(0.01)
    go.touch()
    answers = [forker.wait(racer).stdout.strip() for racer in racers]
    assert sorted(answers) == ["False"] * (n - 1) + ["True"]
    assert storage.read_text(url) == f"racer {answers.index('True')}"


def test_a_lost_answer_does_not_make_it_anothers(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, _ = fsspec.core.url_to_fs(s3)
    put, calls = fs.pipe_file, []

    def lossy(*args, **kwargs):
        calls.append(args)
        put(*args, **kwargs)
        if len(calls) == 1:
            raise ConnectionResetError("the answer was lost")

    monkeypatch.setattr(fs, "pipe_file", lossy)
    assert storage.create(f"{s3}/{uuid.uuid4()}", b"mine")
    assert len(calls) == 2


def test_a_store_that_ignores_the_condition_is_refused(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, _ = fsspec.core.url_to_fs(s3)
    put = fs.pipe_file
    monkeypatch.setattr(fs, "pipe_file", lambda key, data, mode: put(key, data))
    with pytest.raises(
        StorageError, match=r"ignores the condition .* Use a store with conditional"
    ):
        storage.create(f"{s3}/{uuid.uuid4()}", b"x")


def test_a_store_without_conditional_writes_is_named(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, _ = fsspec.core.url_to_fs(s3)

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSYS, "A header you provided implies functionality ...")

    monkeypatch.setattr(fs, "pipe_file", refuse)
    with pytest.raises(StorageError, match="no conditional writes"):
        storage.create(f"{s3}/{uuid.uuid4()}", b"x")


def test_a_disk_without_hard_links_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="has no hard links"):
        storage.create(tmp_path / "x", b"x")
    assert os.listdir(tmp_path) == []


def test_create_where_something_else_stands(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="it is a folder, expected a file"):
        storage.create(tmp_path / "folder", b"x")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        storage.create(tmp_path / "file" / "x", b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


# --- Names ---------------------------------------------------------------------------------

parts = st.text(st.characters(codec="ascii", exclude_characters="/\0~:*?[]{}"), min_size=1)


@given(st.lists(parts.filter(lambda p: p.strip(". ")), min_size=1, max_size=4))
def test_join_name_and_parent_agree(names: list[str]) -> None:
    for base in ("s3://bucket", "memory://x", "/root"):
        url = storage.join(base, *names)
        assert storage.normalize(url) == url
        assert storage.name(url) == names[-1]
        assert storage.parent(url) == storage.join(base, *names[:-1])
        assert storage.join(storage.parent(url), names[-1]) == url


def test_equal_places_have_equal_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path / "a")
    for spelling in ("a", "./a", "a/", "b/../a", f"file://{here}", here + "/", Path("a")):
        assert storage.normalize(spelling) == here
    assert storage.normalize("s3://b/x/") == "s3://b/x"
    assert storage.normalize("~") == str(Path.home())
    with pytest.raises(StorageError, match="empty URL"):
        storage.normalize("")


def test_unknown_scheme_names_the_scheme() -> None:
    with pytest.raises(StorageError, match="scheme 'nope' is not available"):
        storage.read_bytes("nope://x/y")


# --- Faults of a disk ----------------------------------------------------------------------


NO_PERMISSION = """
import sys
from saev import storage
for ask in (storage.list_dir, storage.check_writable):
    try:
        ask(sys.argv[1])
    except storage.StorageError as err:
        print(err)
"""


def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o000)
    command = [sys.executable, "-c", NO_PERMISSION, str(tmp_path)]
    if os.getuid() == 0:  # root may do everything, unless it gives that up
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and there is no setpriv to give that up")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tmp_path.chmod(0o700)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line, doing in zip(lines, ("list", "write"), strict=True):
        assert line.startswith(f"Cannot {doing} {tmp_path}")
        assert line.endswith("permission denied. Check its owner or credentials.")


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        storage.write_bytes(tmp_path / "file" / "x", b"")
    with pytest.raises(StorageError, match="file"):
        storage.list_dir(tmp_path / "file")
    with pytest.raises(StorageError, match="it is a folder, expected a file"):
        storage.read_bytes(tmp_path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left on the device. Free some space and run the same command"),
        (errno.EROFS, "the file system is read-only. Choose another root"),
        (errno.EDQUOT, "quota is used up"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "OSError"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "pwrite", "replace"])
def test_every_fault_of_a_write_is_explained_and_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, message: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    owner = Path if call == "replace" else os
    monkeypatch.setattr(owner, call, fail)
    with (
        pytest.raises(StorageError, match=rf"Cannot write .*/x\.bin: .*{message}"),
        storage.open_write_at(tmp_path / "x.bin") as writer,
    ):
        writer.write(0, b"data")
    assert os.listdir(tmp_path) == []


def test_an_error_in_the_block_keeps_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), storage.open_write_at(tmp_path / "x"):
        raise ValueError("mine")


FULL_DISK = """
import os, sys
from saev import storage
from saev.errors import StorageError
for opener, at in ((storage.open_write, []), (storage.open_write_at, [0])):
    try:
        with opener(sys.argv[1] + "/big.bin") as out:
            out.write(*at, b"x" * (4 << 20))
    except StorageError as err:
        print(err)
print(os.listdir(sys.argv[1]))
storage.write_bytes(sys.argv[1] + "/small.bin", b"fits")
"""


def in_namespace(tmp_path: Path, options: str, script: str) -> subprocess.CompletedProcess:
    """Run Python with a file system of its own mounted at tmp_path/disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f'mount -t tmpfs -o {options} none {disk} && exec {sys.executable} -c "$0" {disk}'
    return subprocess.run(
        ["unshare", "-Urm", "sh", "-c", command, script],
        capture_output=True,
        text=True,
        check=False,
    )


can_mount = pytest.mark.skipif(
    subprocess.run(
        ["sh", "-c", "unshare -Urm mount -t tmpfs none /tmp"], capture_output=True, check=False
    ).returncode != 0,
    reason="needs user namespaces, to mount a small disk",
)  # fmt: skip


@can_mount
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    done = in_namespace(tmp_path, "size=1m", FULL_DISK)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines[:2]:
        assert line.startswith("Cannot write ")
        assert "big.bin: no space left on the device" in line
    assert lines[2] == "[]"


@can_mount
def test_a_file_system_that_is_really_read_only(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom saev import storage\n"
        "try: storage.check_writable(sys.argv[1])\n"
        "except storage.StorageError as err: print(err)"
    )
    done = in_namespace(tmp_path, "ro", script)
    assert "the file system is read-only. Choose another root." in done.stdout, done.stderr


# --- Leftovers of killed writers -----------------------------------------------------------

KILLED = """
import os, signal, sys
from saev import storage
with storage.open_write_at(sys.argv[1] + "/x.bin") as out:
    out.write(0, b"half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_temporaries_go_when_their_writer_is_dead_and_only_then(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    (left,) = os.listdir(tmp_path)
    assert left.startswith(storage.TMP_PREFIX)
    assert storage.list_dir(tmp_path) == [*storage.walk(tmp_path)] == []
    storage.clean_temporary(tmp_path)
    assert os.listdir(tmp_path) == [left]
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    storage.clean_temporary(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_cleaner_never_takes_a_file_from_a_living_writer(tmp_path: Path) -> None:
    stop = threading.Event()

    def clean() -> None:
        while not stop.is_set():
            storage.clean_temporary(tmp_path)

    cleaner = threading.Thread(target=clean)
    cleaner.start()
    try:
        for i in range(300):
            storage.write_bytes(tmp_path / f"{i}.bin", b"data")
    finally:
        stop.set()
        cleaner.join()
    assert len(os.listdir(tmp_path)) == 300


# --- Faults of a network -------------------------------------------------------------------


class Flaky(MemoryFileSystem):
    """Answers every second request with a broken connection."""

    protocol = "flaky"
    requests = 0

    def _request(self) -> None:
        Flaky.requests += 1
        if Flaky.requests % 2:
            raise ConnectionResetError("connection reset by peer")

    def cat_file(self, *args, **kwargs):
        self._request()
        return super().cat_file(*args, **kwargs)

    def _open(self, *args, **kwargs):
        self._request()
        return super()._open(*args, **kwargs)


def test_transient_faults_are_tried_again() -> None:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.requests = 0
    storage.write_bytes("flaky://x/a", b"12345")
    assert storage.read_bytes("flaky://x/a") == b"12345"
    with storage.RangeReader("flaky://x/a") as reader:
        assert reader.read(1, 3) == b"234"
    with storage.open_write_at("flaky://x/b") as writer:
        writer.write(0, b"uploaded")
    assert storage.read_bytes("flaky://x/b") == b"uploaded"
    assert Flaky.requests == 10


def test_s3_without_a_bucket_or_credentials_is_explained(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"Cannot write s3://no-such-bucket/x"):
        storage.write_bytes("s3://no-such-bucket/x", b"")
    with pytest.raises(StorageError, match=r"Cannot read s3://no-such-bucket/x"):
        storage.read_bytes("s3://no-such-bucket/x")


def test_a_scratch_folder_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    with (
        pytest.raises(StorageError, match=r"scratch file in /no/such/folder \(TMPDIR\)"),
        storage.open_write_at("memory://x/y"),
    ):
        pass


# --- Checksums -----------------------------------------------------------------------------


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_crc32c_continues(first: bytes, second: bytes) -> None:
    whole = storage.crc32c(first + second)
    assert whole == storage.crc32c(second, storage.crc32c(first)) == crc32c.crc32c(first + second)


def test_crc32c_is_castagnoli() -> None:
    assert storage.crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4


def test_checksum_of_a_stream(tmp_path: Path) -> None:
    with storage.open_write(tmp_path / "x") as handle:
        writer = storage.ChecksumWriter(handle)
        for chunk in (b"abc", memoryview(b"defg"), b""):
            assert writer.write(chunk) == len(chunk)
    assert writer.n_bytes == 7
    assert writer.checksum == storage.checksum(tmp_path / "x")


def test_a_folder_is_listed_while_others_write_to_it(tmp_path: Path) -> None:
    """Their temporary files come and go between the listing and the look at each file."""
    storage.write_bytes(str(tmp_path / "stays"), b"x")
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            storage.write_bytes(str(tmp_path / "other"), b"x")

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(write)
        try:
            for _ in range(2000):
                names = [entry.name for entry in storage.list_dir(str(tmp_path))]
                assert set(names) <= {"other", "stays"}
                assert "stays" in names
        finally:
            stop.set()
