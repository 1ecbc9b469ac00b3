"""Writing objects that appear whole or not at all."""

import contextlib
import fcntl
import io
import json
import os
import tempfile
import typing as tp
import uuid
from collections.abc import Iterator
from pathlib import Path

from fsspec.implementations.memory import MemoryFileSystem

from saev.storage.faults import explained, retry
from saev.storage.uploads import Upload
from saev.storage.urls import TMP_PREFIX, filesystem, is_s3, local_path, normalize

_CHUNK = 8 << 20


@contextlib.contextmanager
def open_write(url: str | os.PathLike) -> Iterator[tp.BinaryIO]:
    """Open a binary file that is published when the block ends, and dropped if the block raises.

    Local: a temporary file in the same folder, fsync, rename, fsync of the folder. Object stores:
    one (multipart) upload, completed at the end. Readers never see a partial object.
    """
    text = normalize(url)
    path = local_path(text)
    with explained(text, "write", foreign_code=True):
        if path is not None:
            with _open_write_local(path) as handle:
                yield handle
        else:
            with _open_write_remote(text) as handle:
                yield handle


@contextlib.contextmanager
def _open_write_remote(url: str) -> Iterator[tp.BinaryIO]:
    fs, key = filesystem(url)
    if isinstance(fs, MemoryFileSystem):  # its own files are visible before they are complete
        buffer = io.BytesIO()
        yield buffer
        fs.pipe_file(key, buffer.getvalue())
        return
    if is_s3(fs):
        upload = Upload(fs, key, url)
        try:
            yield tp.cast(tp.BinaryIO, upload)
            upload.publish()
        except BaseException:
            upload.drop()
            raise
        return
    remote = fs.open(key, "wb", autocommit=False)
    try:
        yield tp.cast(tp.BinaryIO, remote)
        remote.close()
        remote.commit()
    except BaseException:
        with contextlib.suppress(Exception):
            remote.discard()
        # Otherwise garbage collection would flush the open file.
        remote.closed = True
        raise


@contextlib.contextmanager
def _open_write_local(path: Path) -> Iterator[tp.BinaryIO]:
    _make_folder(path.parent)
    temporary, fd = create_temporary(path)
    try:
        with os.fdopen(fd, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(fd)
            temporary.replace(path)  # before closing, because the open file holds the lock
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def _make_folder(path: Path) -> None:
    """Make a folder. Repeats this if others delete empty parent folders meanwhile."""
    for _ in range(10):
        with contextlib.suppress(FileNotFoundError):
            path.mkdir(parents=True, exist_ok=True)
            return
    path.mkdir(parents=True, exist_ok=True)


def sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can sync a folder
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def create_temporary(path: Path) -> tuple[Path, int]:
    """A new file beside ``path``, locked for as long as its descriptor is open.

    The lock tells :func:`clean_temporary` that the writer is running. On a file system without
    locks, temporary files are not cleaned up; all else works.
    """
    while True:
        temporary = path.with_name(f"{TMP_PREFIX}{uuid.uuid4().hex[:12]}-{path.name}")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if temporary.exists():
                return temporary, fd
        except BlockingIOError:
            pass
        except OSError:
            return temporary, fd
        os.close(fd)  # clean_temporary deleted the file before it was locked: take another name


class PositionalWriter:
    """Writes at any offset into an object that is not published yet, from any number of threads.

    Made by :func:`open_write_at`.
    """

    def __init__(self, url: str, fd: int):
        self.url = url
        self._fd = fd

    def write(self, offset: int, data: tp.Any) -> None:
        """Put a contiguous buffer at a byte offset. The object grows as needed."""
        view = memoryview(data).cast("B")
        done = 0
        with explained(self.url, "write"):
            while done < view.nbytes:
                done += os.pwrite(self._fd, view[done : done + (1 << 30)], offset + done)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy bytes to a lower offset. The two ranges may overlap."""
        if target > source:
            raise ValueError(f"move goes towards the front only, not from {source} to {target}")
        with explained(self.url, "write"):
            for start in range(0, length, _CHUNK):
                block = os.pread(self._fd, min(_CHUNK, length - start), source + start)
                self.write(target + start, block)

    def truncate(self, size: int) -> None:
        """Set the size: cut the object off, or fill it up with zeros."""
        with explained(self.url, "write"):
            os.ftruncate(self._fd, size)


@contextlib.contextmanager
def open_write_at(url: str | os.PathLike) -> Iterator[PositionalWriter]:
    """Like :func:`open_write`, for an object that is not written in order.

    Local: a temporary file in the same folder. Object stores: an anonymous scratch file in the
    folder for temporary files (``TMPDIR``), which is uploaded when the block ends. The operating
    system deletes the scratch file when the process ends.
    """
    text = normalize(url)
    path = local_path(text)
    if path is not None:
        with contextlib.ExitStack() as stack:
            with explained(text, "write"):
                handle = stack.enter_context(_open_write_local(path))
            yield PositionalWriter(text, handle.fileno())
            with explained(text, "write"):  # not around the block, whose errors are the caller's
                stack.close()
        return
    scratch = f"scratch file in {tempfile.gettempdir()} (TMPDIR) for {text}"
    with contextlib.ExitStack() as stack:
        with explained(scratch, "write"):
            handle = stack.enter_context(tempfile.TemporaryFile(buffering=0))
        yield PositionalWriter(scratch, handle.fileno())
        with explained(text, "write"):
            _upload(handle.fileno(), text)


@retry
def _upload(fd: int, url: str) -> None:
    """Upload a local file. Starts again from the beginning after a transient fault."""
    size_ = os.fstat(fd).st_size
    with _open_write_remote(url) as remote:
        for start in range(0, size_, _CHUNK):
            remote.write(os.pread(fd, min(_CHUNK, size_ - start), start))


def write_bytes(url: str | os.PathLike, data: bytes | bytearray | memoryview) -> None:
    """Publish an object, whole or not at all."""
    text = normalize(url)
    if local_path(text) is not None:
        with open_write(text) as handle:
            handle.write(data)
        return
    fs, key = filesystem(text)
    with explained(text, "write"):
        if is_s3(fs):
            with _open_write_remote(text) as remote:
                remote.write(data)
        else:
            retry(fs.pipe_file)(key, bytes(data))


def write_text(url: str | os.PathLike, text: str) -> None:
    """Publish text as UTF-8."""
    write_bytes(url, text.encode("utf-8"))


def json_bytes(obj: tp.Any) -> bytes:
    """Indented JSON with sorted keys: equal objects give equal bytes."""
    text = json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def write_json(url: str | os.PathLike, obj: tp.Any) -> None:
    """Publish ``obj`` as :func:`json_bytes`."""
    write_bytes(url, json_bytes(obj))
