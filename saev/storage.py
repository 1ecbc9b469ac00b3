"""The only module that opens files: URLs, ranged reads, atomic publishing, checksums, retries.

Every location is a URL. A bare path means ``file://``. Nothing here assumes rename, append, mmap
or locks: an object appears whole, under its final name, when its writer succeeds, or not at all.
Local files take POSIX fast paths (``preadv``, write-to-temporary + fsync + rename) behind the same
functions; every other scheme goes through fsspec.
"""

import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import tempfile
import threading
import typing as tp
import uuid
from collections.abc import Iterator
from pathlib import Path

import crc32c as _crc32c
import fsspec
import tenacity
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from saev.errors import CorruptDataError, StorageError

TMP_PREFIX = ".tmp-"
"""Names that start so are unfinished local writes; readers and listings skip them."""

_READ_ATTEMPTS = 5
_CHUNK = 8 << 20


class Entry(tp.NamedTuple):
    """One child of a folder."""

    url: str
    name: str
    """Last path component, without a trailing slash."""
    size: int
    """Bytes; 0 for folders."""
    is_dir: bool


class Object(tp.NamedTuple):
    """One file below a folder, with what tells whether it changed."""

    key: str
    """Path below the folder that was listed, with slashes."""
    size: int
    """Bytes."""
    etag: str
    """The object store's entity tag without quotes; on disks the time of the last write, which
    copies may preserve; empty where there is neither. It differs where the content was replaced."""
    modified: float
    """Seconds since the epoch, UTC; on disks the later of mtime and ctime."""


# --- Names ---------------------------------------------------------------------------------


def normalize(url: str | os.PathLike) -> str:
    """Canonical form: local paths become absolute bare paths, other URLs lose a trailing slash.

    Equal places give equal strings, so the result may be hashed or compared.
    """
    text = os.fspath(url)
    if not text:
        raise StorageError(
            "An empty URL was given; expected a path or a URL such as s3://bucket/x."
        )
    if text.startswith("file://"):
        text = text[len("file://") :]
    if "://" in text:
        scheme, rest = text.split("://", 1)
        if scheme == "memory":  # its own listings put a slash before the first component
            rest = rest.lstrip("/")
        return f"{scheme}://{rest.rstrip('/')}"
    return str(Path(os.path.abspath(os.path.expanduser(text))))  # noqa: PTH100, PTH111 - no symlink walk


def join(url: str | os.PathLike, *parts: str) -> str:
    """``url`` with ``parts`` appended, separated by single slashes."""
    base = normalize(url)
    tail = "/".join(p.strip("/") for p in parts if p.strip("/"))
    if not tail:
        return base
    return base + tail if base.endswith("/") else f"{base}/{tail}"


def name(url: str | os.PathLike) -> str:
    """Last path component."""
    return normalize(url).rstrip("/").rsplit("/", 1)[-1]


def parent(url: str | os.PathLike) -> str:
    """The folder that holds ``url``."""
    text = normalize(url)
    if "://" in text:
        scheme, rest = text.split("://", 1)
        return f"{scheme}://{rest.rsplit('/', 1)[0]}" if "/" in rest else text
    return str(Path(text).parent)


def local_path(url: str | os.PathLike) -> Path | None:
    """The local path that ``url`` names, or None if it is remote."""
    text = normalize(url)
    return None if "://" in text else Path(text)


def _fs(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as err:
        scheme = url.split("://", 1)[0]
        remedy = {"s3": "pip install 'saev[s3]'", "gs": "pip install 'saev[gs]'"}.get(scheme)
        hint = f" Install its backend: {remedy}." if remedy else f" ({err})"
        raise StorageError(f"Cannot open {url}: scheme '{scheme}' is not available.{hint}") from err


# --- Errors --------------------------------------------------------------------------------


def _explain(err: BaseException, url: str, doing: str) -> StorageError:
    """One sentence for the operating system's or the object store's answer."""
    code = getattr(err, "errno", None)
    if isinstance(err, FileNotFoundError) or code == errno.ENOENT:
        return StorageError(f"Cannot {doing} {url}: it does not exist. Check the path.")
    if isinstance(err, PermissionError) or code in (errno.EACCES, errno.EPERM):
        return StorageError(
            f"Cannot {doing} {url}: permission denied. Check its owner or credentials."
        )
    if code == errno.ENOSPC:
        return StorageError(
            f"Cannot {doing} {url}: no space left on the device. "
            "Free some space and run the same command again; finished work is kept."
        )
    if code == errno.EROFS:
        return StorageError(
            f"Cannot {doing} {url}: the file system is read-only. Choose another root."
        )
    if code == errno.EDQUOT:
        return StorageError(f"Cannot {doing} {url}: the disk quota is used up.")
    if isinstance(err, NotADirectoryError | FileExistsError):
        return StorageError(
            f"Cannot {doing} {url}: a file stands where a folder is needed ({err})."
        )
    if isinstance(err, IsADirectoryError):
        return StorageError(f"Cannot {doing} {url}: it is a folder, expected a file.")
    return StorageError(f"Cannot {doing} {url}: {type(err).__name__}: {err}")


_EXPECTED: tuple[type[BaseException], ...] = (
    OSError,
    ValueError,
)  # what fsspec backends raise for a failed request
try:  # botocore's errors are not OSErrors; NoCredentialsError is the one a new user meets
    from botocore.exceptions import BotoCoreError, ClientError

    _EXPECTED = (*_EXPECTED, BotoCoreError, ClientError)
except ImportError:
    pass


@contextlib.contextmanager
def _explained(url: str, doing: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except _EXPECTED as err:
        raise _explain(err, url, doing) from err


def _transient(err: BaseException) -> bool:
    """Whether the same request may succeed if it is sent again."""
    if isinstance(
        err,
        StorageError | FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError,
    ):
        return False
    if isinstance(err, ConnectionError | TimeoutError):
        return True
    if isinstance(err, OSError):
        return err.errno in (
            None,
            errno.EIO,
            errno.ETIMEDOUT,
            errno.EBUSY,
            errno.EAGAIN,
            errno.ESTALE,
        )
    return False


_retry_reads = tenacity.retry(
    retry=tenacity.retry_if_exception(_transient),
    stop=tenacity.stop_after_attempt(_READ_ATTEMPTS),
    wait=tenacity.wait_exponential_jitter(initial=0.1, max=10),
    reraise=True,
)


# --- Looking -------------------------------------------------------------------------------


def exists(url: str | os.PathLike) -> bool:
    """Whether an object or folder is there. Never answers from a listing cache."""
    text = normalize(url)
    path = local_path(text)
    with _explained(text, "look at"):
        if path is not None:
            return path.exists()
        fs, key = _fs(text)
        fs.invalidate_cache(key)
        return bool(_retry_reads(fs.exists)(key))


def is_dir(url: str | os.PathLike) -> bool:
    """Whether ``url`` is a folder (on object storage: a prefix that holds something)."""
    text = normalize(url)
    path = local_path(text)
    with _explained(text, "look at"):
        if path is not None:
            return path.is_dir()
        fs, key = _fs(text)
        fs.invalidate_cache(key)
        return bool(_retry_reads(fs.isdir)(key))


def size(url: str | os.PathLike) -> int:
    """Size in bytes. Raises StorageError if there is no such object."""
    text = normalize(url)
    path = local_path(text)
    with _explained(text, "look at"):
        if path is not None:
            return path.stat().st_size
        fs, key = _fs(text)
        fs.invalidate_cache(key)
        return int(_retry_reads(fs.size)(key))


def _with_scheme(fs: fsspec.AbstractFileSystem, key: str) -> str:
    return (
        normalize(key) if isinstance(fs, LocalFileSystem) else normalize(fs.unstrip_protocol(key))
    )


def list_dir(url: str | os.PathLike) -> list[Entry]:
    """Children of a folder, sorted by name. Raises StorageError if it is missing or unreadable."""
    text = normalize(url)
    fs, key = _fs(text)
    with _explained(text, "list"):
        fs.invalidate_cache(key)
        rows = _retry_reads(fs.ls)(key, detail=True)
    entries = []
    for row in rows:
        child = _with_scheme(fs, row["name"])
        if child == text:  # object stores list the folder's own marker
            if row["type"] == "file" and row.get("size"):
                raise StorageError(f"Cannot list {text}: it is a file, expected a folder.")
            continue
        if name(child).startswith(TMP_PREFIX):
            continue
        is_folder = row["type"] == "directory"
        entries.append(Entry(child, name(child), 0 if is_folder else int(row["size"]), is_folder))
    return sorted(entries, key=lambda e: e.name)


def find(url: str | os.PathLike) -> list[str]:
    """URLs of all files below a folder, sorted. Empty if the folder is empty or missing."""
    text = normalize(url)
    fs, key = _fs(text)
    with _explained(text, "list"):
        fs.invalidate_cache(key)
        keys = _retry_reads(fs.find)(key)
    urls = (_with_scheme(fs, k) for k in keys)
    return sorted(u for u in urls if not name(u).startswith(TMP_PREFIX))


def walk(url: str | os.PathLike) -> list[Entry]:
    """All files below a folder with their sizes, sorted by URL; symbolic links are followed.

    Unlike :func:`find` it fails where it cannot look: a folder that is missing, is a file, or may
    not be read (also one further down) is a StorageError, so nothing is left out unnoticed.
    """
    text = normalize(url)
    path = local_path(text)
    if path is not None:
        entries = [Entry(f, name(f), status.st_size, False) for f, status in _walk_local(path)]
    else:
        entries = [
            Entry(file, name(file), int(row["size"]), False) for file, row in _walk_remote(text)
        ]
    return sorted(entries, key=lambda e: e.url)


def listing(url: str | os.PathLike, *, temporary: bool = False) -> list[Object]:
    """All files below a folder, sorted by key; symbolic links are followed.

    On an object store it is one recursive listing, whatever the number of keys, and never one from
    a cache. It fails where :func:`walk` does.

    Args:
        url: the folder.
        temporary: whether unfinished local writes are listed too.
    """
    text = normalize(url)
    path = local_path(text)
    start = len(join(text, "x")) - 1
    if path is not None:
        objects = [
            Object(
                file[start:],
                status.st_size,
                f"mtime:{status.st_mtime_ns}",
                max(status.st_mtime, status.st_ctime),
            )
            for file, status in _walk_local(path, temporary=temporary)
        ]
    else:
        objects = [
            Object(file[start:], int(row["size"]), _etag(row), _modified(row, file))
            for file, row in _walk_remote(text)
        ]
    return sorted(objects, key=lambda o: o.key)


def _etag(row: dict[str, tp.Any]) -> str:
    return str(row.get("ETag") or row.get("etag") or "").strip('"')


def _modified(row: dict[str, tp.Any], url: str) -> float:
    """When an object was written, from whichever field its store's listing has."""
    for field in ("LastModified", "updated", "last_modified", "mtime", "created"):
        value = row.get(field)
        if isinstance(value, str):
            value = datetime.datetime.fromisoformat(value)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if value is not None:
            return float(value)
    raise StorageError(
        f"Cannot list {url}: its store does not say when it was changed. Use a path, s3:// or gs://."
    )


def _walk_remote(url: str) -> Iterator[tuple[str, dict[str, tp.Any]]]:
    """URLs of the files below a folder that is not local, each with its row of the listing."""
    fs, key = _fs(url)
    with _explained(url, "list"):
        fs.invalidate_cache(key)
        info = _retry_reads(fs.info)(key)
        if info["type"] != "directory":
            raise NotADirectoryError(url)
        rows = _retry_reads(fs.find)(key, detail=True)
    for found, row in rows.items():
        if not found.endswith("/"):  # what some tools put where a folder would be
            yield _with_scheme(fs, found), row


def _walk_local(
    folder: Path, above: frozenset[tuple[int, int]] = frozenset(), *, temporary: bool = False
) -> Iterator[tuple[str, os.stat_result]]:
    """Files below ``folder``. ``above`` holds the folders over it, so that link cycles end."""
    with _explained(str(folder), "list"):
        try:
            status = folder.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                return
            with os.scandir(folder) as rows:
                children = sorted(rows, key=lambda row: row.name)
        except FileNotFoundError:
            if above:  # removed by someone since its parent was listed
                return
            raise
    for child in children:
        if child.name.startswith(TMP_PREFIX) and not temporary:
            continue
        if child.is_dir():
            yield from _walk_local(Path(child.path), above | {identity}, temporary=temporary)
        elif child.is_file():  # not a broken link, a socket or a device
            with _explained(child.path, "look at"):
                try:
                    status = child.stat()
                except FileNotFoundError:
                    continue
            yield child.path, status


def glob_entries(pattern: str) -> list[Entry]:
    """Files and folders that match a glob pattern, with sizes, sorted by URL."""
    text = normalize(pattern)
    fs, key = _fs(text)
    with _explained(text, "list"):
        fs.invalidate_cache()
        rows = _retry_reads(fs.glob)(key, detail=True)
    entries = []
    for found, row in rows.items():
        place, is_folder = _with_scheme(fs, found), row["type"] == "directory"
        if not name(place).startswith(TMP_PREFIX):
            size_ = 0 if is_folder else int(row["size"])
            entries.append(Entry(place, name(place), size_, is_folder))
    return sorted(entries, key=lambda e: e.url)


def glob(pattern: str) -> list[str]:
    """URLs that match a glob pattern (``*``, ``?``, ``[]``, ``**``), sorted."""
    text = normalize(pattern)
    fs, key = _fs(text)
    with _explained(text, "list"):
        return sorted(_with_scheme(fs, k) for k in _retry_reads(fs.glob)(key))


# --- Reading -------------------------------------------------------------------------------


def read_bytes(url: str | os.PathLike) -> bytes:
    """A whole object."""
    text = normalize(url)
    path = local_path(text)
    with _explained(text, "read"):
        if path is not None:
            return path.read_bytes()
        fs, key = _fs(text)
        return _retry_reads(fs.cat_file)(key)


def read_text(url: str | os.PathLike) -> str:
    """A whole object as UTF-8. Raises CorruptDataError if it is not text."""
    try:
        return read_bytes(url).decode("utf-8")
    except UnicodeDecodeError as err:
        raise CorruptDataError(f"{normalize(url)} is not UTF-8 text ({err}).") from err


def read_json(url: str | os.PathLike) -> tp.Any:
    """A whole object as JSON. Raises CorruptDataError if it does not parse."""
    try:
        return json.loads(read_text(url))
    except json.JSONDecodeError as err:
        raise CorruptDataError(
            f"{normalize(url)} is not valid JSON ({err}); it may be truncated."
        ) from err


@contextlib.contextmanager
def open_read(url: str | os.PathLike) -> Iterator[tp.BinaryIO]:
    """A seekable binary file, for libraries that want one."""
    text = normalize(url)
    with _explained(text, "read"):
        path = local_path(text)
        if path is not None:
            handle: tp.BinaryIO = path.open("rb")
        else:
            fs, key = _fs(text)
            handle = tp.cast(tp.BinaryIO, fs.open(key, "rb"))
    with handle:
        yield handle


class RangeReader:
    """Ranged reads of one object, from any number of threads.

    Local files use ``preadv`` on one descriptor, so threads share no file position and no lock.

    Args:
        url: the object.
    """

    def __init__(self, url: str | os.PathLike):
        self.url = normalize(url)
        self._fd: int | None = None
        path = local_path(self.url)
        with _explained(self.url, "read"):
            if path is not None:
                self._fd = os.open(path, os.O_RDONLY)
                self.size = os.fstat(self._fd).st_size
            else:
                self._fs, self._key = _fs(self.url)
                self._fs.invalidate_cache(self._key)
                self.size = int(_retry_reads(self._fs.size)(self._key))

    def readinto(self, offset: int, buffer: tp.Any) -> None:
        """Fill ``buffer`` (writable, contiguous) from byte ``offset``.

        Raises:
            CorruptDataError: the object ends before the buffer is full.
        """
        view = memoryview(buffer).cast("B")
        end = offset + view.nbytes
        if end > self.size:
            raise CorruptDataError(
                f"{self.url} is truncated: bytes {offset}-{end} were asked for, it has {self.size}."
            )
        if not view.nbytes:
            return
        with _explained(self.url, "read"):
            if self._fd is not None:
                self._pread(offset, view)
            else:
                data = _retry_reads(self._fs.cat_file)(self._key, start=offset, end=end)
                if len(data) != view.nbytes:
                    raise CorruptDataError(
                        f"{self.url}: {view.nbytes} bytes at {offset} were asked for, "
                        f"got {len(data)}."
                    )
                view[:] = data

    def _pread(self, offset: int, view: memoryview) -> None:
        assert self._fd is not None
        done = 0
        while done < view.nbytes:
            n = os.preadv(self._fd, [view[done : done + (1 << 30)]], offset + done)
            if n == 0:
                raise CorruptDataError(
                    f"{self.url} shrank while it was read, at byte {offset + done}."
                )
            done += n

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""
        buffer = bytearray(length)
        self.readinto(offset, buffer)
        return bytes(buffer)

    def close(self) -> None:
        """Release the descriptor. May be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it never came to opening the file
            self.close()

    def __enter__(self) -> "RangeReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# --- Writing -------------------------------------------------------------------------------


@contextlib.contextmanager
def open_write(url: str | os.PathLike) -> Iterator[tp.BinaryIO]:
    """A binary file that is published under ``url`` when the block ends, and dropped if it raises.

    Local: a temporary file in the same folder, fsync, rename, fsync of the folder. Object stores:
    one (multipart) upload, completed at the end. A reader never sees a part of it.
    """
    text = normalize(url)
    path = local_path(text)
    with _explained(text, "write"):
        if path is not None:
            with _open_write_local(path) as handle:
                yield handle
        else:
            with _open_write_remote(text) as handle:
                yield handle


@contextlib.contextmanager
def _open_write_remote(url: str) -> Iterator[tp.BinaryIO]:
    fs, key = _fs(url)
    if isinstance(fs, MemoryFileSystem):  # would show the object while it grows
        buffer = io.BytesIO()
        yield buffer
        fs.pipe_file(key, buffer.getvalue())
        return
    remote = fs.open(key, "wb", autocommit=False)
    try:
        yield tp.cast(tp.BinaryIO, remote)
        remote.close()
        remote.commit()
    except BaseException:
        with contextlib.suppress(Exception):
            remote.discard()
        # A buffered file that is garbage-collected while open would flush itself.
        remote.closed = True
        raise


@contextlib.contextmanager
def _open_write_local(path: Path) -> Iterator[tp.BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, fd = _create_temporary(path)
    try:
        with os.fdopen(fd, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(fd)
            temporary.replace(path)  # while it is open: the lock says that its writer lives
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can sync a folder
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _create_temporary(path: Path) -> tuple[Path, int]:
    """A new file beside ``path``, locked for as long as its descriptor is open.

    The lock only tells :func:`clean_temporary` that the writer is alive; where a file system has no
    locks, nothing is cleaned and everything else works.
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
        os.close(fd)  # a cleaner was faster than the lock: take another name


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
        with _explained(self.url, "write"):
            while done < view.nbytes:
                done += os.pwrite(self._fd, view[done : done + (1 << 30)], offset + done)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy bytes towards the front; the two ranges may overlap."""
        if target > source:
            raise ValueError(f"move goes towards the front only, not from {source} to {target}")
        with _explained(self.url, "write"):
            for start in range(0, length, _CHUNK):
                block = os.pread(self._fd, min(_CHUNK, length - start), source + start)
                self.write(target + start, block)

    def truncate(self, size: int) -> None:
        """Cut off what lies behind ``size`` bytes, or fill up with zeros."""
        with _explained(self.url, "write"):
            os.ftruncate(self._fd, size)


@contextlib.contextmanager
def open_write_at(url: str | os.PathLike) -> Iterator[PositionalWriter]:
    """Like :func:`open_write`, for an object that is not written from front to back.

    Local: a temporary file in the same folder. Object stores, which cannot do that: a nameless
    scratch file in the folder for temporary files (``TMPDIR``), which vanishes with the process,
    uploaded as one stream when the block ends.
    """
    text = normalize(url)
    path = local_path(text)
    if path is not None:
        with contextlib.ExitStack() as stack:
            with _explained(text, "write"):
                handle = stack.enter_context(_open_write_local(path))
            yield PositionalWriter(text, handle.fileno())
            with _explained(text, "write"):  # only what is ours: the block's errors are not
                stack.close()
        return
    scratch = f"scratch file in {tempfile.gettempdir()} (TMPDIR) for {text}"
    with contextlib.ExitStack() as stack:
        with _explained(scratch, "write"):
            handle = stack.enter_context(tempfile.TemporaryFile(buffering=0))
        yield PositionalWriter(scratch, handle.fileno())
        with _explained(text, "write"):
            _upload(handle.fileno(), text)


@_retry_reads
def _upload(fd: int, url: str) -> None:
    """Stream a local file into an object; begins again after a transient failure."""
    size_ = os.fstat(fd).st_size
    with _open_write_remote(url) as remote:
        for start in range(0, size_, _CHUNK):
            remote.write(os.pread(fd, min(_CHUNK, size_ - start), start))


def write_bytes(url: str | os.PathLike, data: bytes | bytearray | memoryview) -> None:
    """Publish one object, whole or not at all."""
    text = normalize(url)
    if local_path(text) is not None:
        with open_write(text) as handle:
            handle.write(data)
        return
    fs, key = _fs(text)
    with _explained(text, "write"):  # one PUT (or a multipart upload that fsspec completes)
        _retry_reads(fs.pipe_file)(key, bytes(data))


_MEMORY_LOCK = threading.Lock()


def create(url: str | os.PathLike, data: bytes) -> bool:
    """Publish one object if nothing has its name: of any number of callers, one gets True.

    A request whose answer was lost is sent again and then finds its own object. So an object that
    holds exactly ``data`` counts as the caller's: put something into it that no one else writes.

    Returns:
        Whether the object is the caller's.

    Raises:
        StorageError: also where the store cannot do this: one without hard links (local) or without
            conditional writes (object stores).
    """
    text = normalize(url)
    path = local_path(text)
    with _explained(text, "create"):
        made = _create_remote(text, data) if path is None else _create_local(path, data)
    if made:
        return True
    try:
        return read_bytes(text) == data
    except StorageError:
        if exists(text):
            raise
        return False  # it was another's, and is gone since


def _create_local(path: Path, data: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, fd = _create_temporary(path)
    try:
        with os.fdopen(fd, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(fd)
            os.link(temporary, path)  # unlike a rename it never replaces, and NFS has it
    except FileExistsError:
        return False
    except OSError as err:
        if err.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise StorageError(
                f"Cannot create {path}: its file system has no hard links ({err.strerror}). "
                "Use a root on another file system (ext4, XFS, NFS, CephFS) or on s3://."
            ) from err
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)
    return True


def _create_remote(url: str, data: bytes) -> bool:
    fs, key = _fs(url)
    if isinstance(fs, MemoryFileSystem):
        with _MEMORY_LOCK:
            if fs.exists(key):
                return False
            fs.pipe_file(key, data)
            return True
    put = functools.partial(fs.pipe_file, key, data, mode="create")
    if not _conditional(put, url):
        return False
    # A store, or a client, that ignores the condition says yes to everybody, and to us again.
    if _conditional(put, url):
        raise StorageError(
            f"Cannot create {url} safely: its object store ignores the condition that the object "
            "be absent (If-None-Match). Use a store with conditional writes, or a mounted volume."
        )
    return True


def _conditional(put: tp.Callable[[], object], url: str) -> bool:
    """Whether a write was let through; False: the object was there already."""
    try:
        _retry_reads(put)()
    except FileExistsError:
        return False
    except OSError as err:
        response = getattr(err.__cause__, "response", None) or {}
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status == 412:  # with a body that s3fs does not know
            return False
        if status == 501 or err.errno == errno.ENOSYS:
            raise StorageError(
                f"Cannot create {url}: its object store has no conditional writes "
                "(If-None-Match). Use a store that has them, or a mounted volume."
            ) from err
        raise
    return True


def write_text(url: str | os.PathLike, text: str) -> None:
    """Publish a UTF-8 object."""
    write_bytes(url, text.encode("utf-8"))


def canonical_json(obj: tp.Any) -> str:
    """The one JSON text of ``obj``: sorted keys, no spaces, no NaN. What content hashes are of."""
    return json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def content_hash(obj: tp.Any, n_digits: int = 64) -> str:
    """The first hex digits of the SHA-256 of the canonical JSON: equal objects, equal names."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()[:n_digits]


def write_json(url: str | os.PathLike, obj: tp.Any) -> None:
    """Publish ``obj`` as indented JSON with sorted keys, so that equal objects give equal bytes."""
    write_text(
        url, json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )


def delete(url: str | os.PathLike, *, recursive: bool = False) -> None:
    """Remove an object (or a folder). A missing one is not an error."""
    text = normalize(url)
    fs, key = _fs(text)
    with _explained(text, "delete"), contextlib.suppress(FileNotFoundError):
        fs.rm(key, recursive=recursive)
        fs.invalidate_cache(key)


def clean_temporary(url: str | os.PathLike) -> None:
    """Remove what killed local writers left in a folder. Files of living writers stay."""
    path = local_path(url)
    if path is None or not path.is_dir():
        return
    for leftover in path.glob(f"{TMP_PREFIX}*"):
        with contextlib.suppress(OSError):
            _remove_temporary(leftover)


def remove_temporary(url: str | os.PathLike) -> bool:
    """Remove one unfinished write, unless its writer is alive; returns whether it is gone."""
    text = normalize(url)
    path = local_path(text)
    if path is None:
        delete(text)
        return not exists(text)
    with _explained(text, "delete"):
        try:
            _remove_temporary(path)
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False
    return True


def _remove_temporary(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
        path.unlink()
    finally:
        os.close(fd)


def check_writable(url: str | os.PathLike) -> None:
    """Fail now, with one clear error, if nothing can be written below ``url``."""
    probe = join(url, f"{TMP_PREFIX}probe-{uuid.uuid4().hex[:12]}")
    write_bytes(probe, b"")
    delete(probe)


# --- Checksums -----------------------------------------------------------------------------


def crc32c(data: tp.Any, value: int = 0) -> int:
    """CRC-32C (Castagnoli) of a contiguous buffer, continuing from ``value``. Releases the GIL."""
    return _crc32c.crc32c(memoryview(data).cast("B"), value)


def format_checksum(value: int) -> str:
    """How a checksum is written in JSON: ``crc32c:`` and eight hex digits."""
    return f"crc32c:{value:08x}"


class ChecksumWriter(io.RawIOBase):
    """Passes writes on to ``handle`` and keeps their running CRC-32C and length."""

    def __init__(self, handle: tp.BinaryIO):
        self._handle = handle
        self.crc = 0
        self.n_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: tp.Any) -> int:
        view = memoryview(data).cast("B")
        self._handle.write(view)
        self.crc = crc32c(view, self.crc)
        self.n_bytes += view.nbytes
        return view.nbytes

    @property
    def checksum(self) -> str:
        """Checksum of everything written so far, as it stands in JSON."""
        return format_checksum(self.crc)


def checksum(url: str | os.PathLike) -> str:
    """Checksum of a stored object, read in chunks."""
    crc = 0
    buffer = memoryview(bytearray(_CHUNK))
    with RangeReader(url) as reader:
        for start in range(0, reader.size, _CHUNK):
            part = buffer[: min(_CHUNK, reader.size - start)]
            reader.readinto(start, part)
            crc = crc32c(part, crc)
    return format_checksum(crc)
