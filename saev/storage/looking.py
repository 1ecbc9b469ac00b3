"""Existence, sizes and listings. None of them comes from a cache."""

import contextlib
import contextvars
import datetime
import errno
import itertools
import os
import stat
import typing as tp
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from saev.errors import StorageError
from saev.storage import s3, s3_listing
from saev.storage.faults import explained, retry
from saev.storage.sources import entity_tag
from saev.storage.urls import (
    TMP_PREFIX,
    filesystem,
    is_s3,
    join,
    local_path,
    name,
    normalize,
    with_scheme,
)

_PAGE = 1000
"""Files between two reports of progress: the page size of listings of S3."""
_listener: contextvars.ContextVar[Callable[[int], object]] = contextvars.ContextVar(
    "saev_files_found", default=lambda n: None
)


class Entry(tp.NamedTuple):
    """One child of a folder."""

    url: str
    name: str
    """Last path component, without a trailing slash."""
    size: int
    """Number of bytes; 0 for folders."""
    is_dir: bool
    etag: str = ""
    """The object store's entity tag without quotes; empty if there is none."""


class Object(tp.NamedTuple):
    """One file below a folder."""

    key: str
    """Path below the folder that was listed, with slashes."""
    size: int
    """Bytes."""
    etag: str
    """Differs if the content was replaced: the object store's entity tag without quotes, or the
    mtime of a local file, which copies may preserve. Empty if there is neither."""
    changed: float | None
    """Time of the last write in seconds since the epoch, UTC; for local files the later of mtime
    and ctime. None if the store does not tell it."""

    @property
    def modified(self) -> float:
        """Time of the last write. Raises StorageError if the store does not tell it."""
        if self.changed is None:
            raise StorageError(
                f"The store of {self.key} does not say when it was changed. Use a path, s3:// or "
                "gs://."
            )
        return self.changed


def exists(url: str | os.PathLike) -> bool:
    """Whether there is an object or a folder. Never uses a cached listing."""
    text = normalize(url)
    path = local_path(text)
    with explained(text, "look at"):
        if path is not None:
            return path.exists()
        fs: tp.Any
        fs, key = filesystem(text)
        fs.invalidate_cache(key)
        if is_s3(fs) and not fs.split_path(key)[1]:
            return _bucket_exists(fs, key)
        return bool(retry(fs.exists)(key))


def _bucket_exists(fs: tp.Any, bucket: str) -> bool:
    """Whether there is a bucket. s3fs also returns False if the store does not answer."""
    try:
        retry(fs.call_s3)("head_bucket", Bucket=bucket)
    except FileNotFoundError:
        return False
    except PermissionError:  # perhaps only some of its objects may be read
        return bool(retry(fs.exists)(bucket))
    return True


def is_dir(url: str | os.PathLike) -> bool:
    """Whether ``url`` is a folder (on object storage: a prefix of at least one object)."""
    text = normalize(url)
    path = local_path(text)
    with explained(text, "look at"):
        if path is not None:
            return path.is_dir()
        fs, key = filesystem(text)
        fs.invalidate_cache(key)
        return bool(retry(fs.isdir)(key))


def size(url: str | os.PathLike) -> int:
    """Size in bytes. Raises StorageError if there is no such object."""
    text = normalize(url)
    path = local_path(text)
    with explained(text, "look at"):
        if path is not None:
            return path.stat().st_size
        fs, key = filesystem(text)
        fs.invalidate_cache(key)
        return int(retry(fs.size)(key))


def list_dir(url: str | os.PathLike, *, missing_ok: bool = False) -> list[Entry]:
    """Children of a folder, sorted by name.

    Raises:
        StorageError: it cannot be listed, or it is missing. With ``missing_ok`` a missing folder
            counts as empty.
    """
    text = normalize(url)
    path = local_path(text)
    with explained(text, "list"):
        try:
            entries = _list_local(path) if path is not None else _list_remote(text)
        except FileNotFoundError:
            if missing_ok:
                return []
            raise
    shown = (e for e in entries if not e.name.startswith(TMP_PREFIX))
    return sorted(shown, key=lambda e: e.name)


def _list_local(folder: Path) -> list[Entry]:
    entries = []
    try:
        with os.scandir(folder) as rows:
            for row in rows:
                try:
                    status = _status(row)
                except FileNotFoundError:  # deleted since the folder was listed
                    continue
                is_folder = stat.S_ISDIR(status.st_mode)
                n_bytes = 0 if is_folder else status.st_size
                entries.append(Entry(row.path, row.name, n_bytes, is_folder))
    except NotADirectoryError as err:
        raise StorageError(f"Cannot list {folder}: it is a file, expected a folder.") from err
    return entries


def _status(row: os.DirEntry[str]) -> os.stat_result:
    """Status of a file; for a broken symbolic link, that of the link itself."""
    try:
        return row.stat()
    except OSError:
        return row.stat(follow_symlinks=False)


def _list_remote(url: str) -> list[Entry]:
    fs, key = filesystem(url)
    fs.invalidate_cache(key)
    entries = []
    for row in retry(fs.ls)(key, detail=True):
        child = _child(fs, url, key, row["name"])
        if child == url:
            if row["type"] == "file" and not is_marker(row["name"]):
                raise StorageError(f"Cannot list {url}: it is a file, expected a folder.")
            continue
        is_folder = row["type"] == "directory"
        n_bytes, etag = (0, "") if is_folder else (int(row["size"]), entity_tag(row))
        entries.append(Entry(child, child.rpartition("/")[2], n_bytes, is_folder, etag))
    return entries


def _child(fs: tp.Any, url: str, key: str, found: str) -> str:
    """URL of an object in the listing of a folder.

    Args:
        fs: the file system.
        url: URL of the folder.
        key: fsspec's key of the folder.
        found: fsspec's key of the object.
    """
    if found.startswith(f"{key}/"):  # with_scheme would take a minute for a million names
        return f"{url}{found[len(key) :].rstrip('/')}"
    return with_scheme(fs, found)


def walk(
    url: str | os.PathLike,
    *,
    temporary: bool = False,
    missing_ok: bool = False,
    seen: Callable[[int], object] = lambda n: None,
) -> Iterator[Object]:
    """All files below a folder, yielded as they are found, in constant memory.

    The order is not defined; ``sorted`` orders them by key. Symbolic links are followed. On an
    object store it is one recursive listing, which never comes from a cache.

    Args:
        url: the folder.
        temporary: whether unfinished local writes are listed too.
        missing_ok: whether a missing folder counts as empty. A missing bucket is always an error.
        seen: called with the number of new files, after every thousand files.

    Raises:
        StorageError: the folder, or one below it, is missing, is a file, or may not be read.
    """
    return _walk(normalize(url), temporary, missing_ok, (seen, _listener.get()))


@contextlib.contextmanager
def told_of_files(seen: Callable[[int], object]) -> Iterator[None]:
    """Until the block ends, tell a function how many files :func:`walk` finds in this thread."""
    token = _listener.set(seen)
    try:
        yield
    finally:
        _listener.reset(token)


def _walk(
    text: str, temporary: bool, missing_ok: bool, listeners: Iterable[Callable[[int], object]]
) -> Iterator[Object]:
    objects = _objects(text, temporary)
    try:
        while group := list(itertools.islice(objects, _PAGE)):
            for seen in listeners:
                seen(len(group))
            yield from group
    except StorageError as err:
        is_missing = isinstance(err.__cause__, FileNotFoundError)
        if not missing_ok or not is_missing or _bucket_is_missing(text):
            raise


def _bucket_is_missing(url: str) -> bool:
    """Whether the bucket is missing. For S3 the listing itself raises an error; other stores are
    asked here."""
    if local_path(url) is not None or url.startswith(("s3://", "memory://")):
        return False
    fs, key = filesystem(url)
    try:
        fs.info(key.split("/", 1)[0])
    except FileNotFoundError:
        return True
    except Exception:  # the user may not look at the bucket, but may be allowed to list it
        return False
    return False


def _objects(text: str, temporary: bool) -> Iterator[Object]:
    path = local_path(text)
    start = len(join(text, "x")) - 1
    if path is None:
        for file, row in _walk_remote(text):
            yield Object(file[start:], int(row["size"]), entity_tag(row), _modified(row))
        return
    for file, status in _walk_local(path, temporary=temporary):
        changed = max(status.st_mtime, status.st_ctime)
        yield Object(file[start:], status.st_size, f"mtime:{status.st_mtime_ns}", changed)


def _modified(row: dict[str, tp.Any]) -> float | None:
    """Time of an object's last write. Stores name this field differently."""
    for field in ("LastModified", "updated", "last_modified", "mtime", "created"):
        value = row.get(field)
        if isinstance(value, str):
            value = datetime.datetime.fromisoformat(value)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if value is not None:
            return float(value)
    return None


def _walk_remote(url: str) -> Iterator[tuple[str, dict[str, tp.Any]]]:
    """URLs of the files below a remote folder, each with its row of the listing."""
    fs, key = filesystem(url)
    is_folder = False
    with explained(url, "list"):
        fs.invalidate_cache(key)
        for found, row in _rows(fs, key):
            # An object may have the same name as the folder. It is not below the folder.
            is_below = found.rstrip("/") != key
            is_folder = is_folder or is_below or is_marker(found)
            if is_below and not is_marker(found):
                yield _child(fs, url, key, found), row
        if not is_folder and retry(fs.info)(key)["type"] != "directory":
            raise NotADirectoryError(url)


def _rows(fs: tp.Any, folder: str) -> Iterator[tuple[str, dict[str, tp.Any]]]:
    """fsspec's keys of the objects below a folder, each with its row of the listing."""
    bucket = s3.bucket_of(fs, folder)
    if bucket is not None:
        name_, prefix, _ = fs.split_path(folder)
        rows = s3_listing.objects(bucket, f"{prefix.rstrip('/')}/" if prefix else "")
        if rows is not None:
            for row in rows:
                yield f"{name_}/{row['Key']}", row
            return
    yield from retry(fs.find)(folder, detail=True).items()


def is_marker(key: str) -> bool:
    """Whether an object is only a marker of a folder, which some tools create."""
    return key.endswith("/")


def _walk_local(
    folder: Path, above: frozenset[tuple[int, int]] = frozenset(), *, temporary: bool = False
) -> Iterator[tuple[str, os.stat_result]]:
    """Files below ``folder``. ``above`` are its parent folders; it stops cycles of links."""
    with explained(str(folder), "list"):
        try:
            status = folder.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                return
            with os.scandir(folder) as rows:
                names = sorted(row.name for row in rows)
        except FileNotFoundError:
            if above:  # deleted since its parent was listed
                return
            raise
    for child in names:  # only names are kept in memory, because there may be a million
        if child.startswith(TMP_PREFIX) and not temporary:
            continue
        place = folder / child
        with explained(str(place), "look at"):
            try:
                status = place.stat()
            except OSError as err:
                if err.errno not in (errno.ENOENT, errno.ELOOP):  # deleted, or a broken link
                    raise
                continue
        if stat.S_ISDIR(status.st_mode):
            yield from _walk_local(place, above | {identity}, temporary=temporary)
        elif stat.S_ISREG(status.st_mode):  # not a socket or a device
            yield str(place), status


def glob(pattern: str) -> list[Entry]:
    """Files and folders that match a pattern (``*``, ``?``, ``[]``, ``**``), sorted by URL."""
    text = normalize(pattern)
    fs, key = filesystem(text)
    with explained(text, "list"):
        fs.invalidate_cache()
        rows = retry(fs.glob)(key, detail=True)
    entries = []
    for found, row in rows.items():
        if is_marker(found):
            continue
        place, is_folder = with_scheme(fs, found), row["type"] == "directory"
        if not name(place).startswith(TMP_PREFIX):
            size_ = 0 if is_folder else int(row["size"])
            entries.append(Entry(place, name(place), size_, is_folder))
    return sorted(entries, key=lambda e: e.url)
