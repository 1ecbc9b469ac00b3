"""Creating an object that must not exist yet: only the first of many callers succeeds."""

import contextlib
import errno
import functools
import os
import threading
import time
import typing as tp
from pathlib import Path

from fsspec.implementations.memory import MemoryFileSystem

from saev.errors import StorageError
from saev.storage.faults import explained, retry
from saev.storage.reading import read_bytes
from saev.storage.urls import filesystem, local_path, normalize
from saev.storage.writing import create_temporary, sync_folder

_LOOKS = 5
_MEMORY_LOCK = threading.Lock()


def create(url: str | os.PathLike, data: bytes) -> bool:
    """Publish an object if there is none with its name. Of all callers, only one gets True.

    If the answer to a request is lost, the request is sent again and finds the caller's own object.
    So an existing object with exactly ``data`` counts as created by the caller. Callers must put
    something unique into ``data``.

    Returns:
        Whether the caller created the object.

    Raises:
        StorageError: the object cannot be written, or the storage has no hard links (local) or no
            conditional writes (object stores).
    """
    text = normalize(url)
    path = local_path(text)
    with explained(text, "create"):
        made = _create_remote(text, data) if path is None else _create_local(path, data)
    if made:
        return True
    for look in range(_LOOKS):
        try:
            return read_bytes(text) == data
        except StorageError as err:
            # A store may refuse one of two writers before the object of the other can be read.
            if not isinstance(err.__cause__, FileNotFoundError):
                raise
            time.sleep(0.02 * look)
    return False  # another caller created it, and it has been deleted since


def _create_local(path: Path, data: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, fd = create_temporary(path)
    try:
        with os.fdopen(fd, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(fd)
            os.link(temporary, path)  # never replaces a file, unlike a rename; works on NFS
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
    sync_folder(path.parent)
    return True


def _create_remote(url: str, data: bytes) -> bool:
    fs, key = filesystem(url)
    if isinstance(fs, MemoryFileSystem):
        with _MEMORY_LOCK:
            if fs.exists(key):
                return False
            fs.pipe_file(key, data)
            return True
    put = functools.partial(fs.pipe_file, key, data, mode="create")
    if not _conditional(put, url):
        return False
    # A store or client that ignores the condition accepts the same write a second time.
    if _conditional(put, url):
        raise StorageError(
            f"Cannot create {url} safely: its object store ignores the condition that the object "
            "be absent (If-None-Match). Use a store with conditional writes, or a mounted volume."
        )
    return True


def _conditional(put: tp.Callable[[], object], url: str) -> bool:
    """Send a conditional write. Returns False if the object existed already."""
    try:
        retry(put)()
    except FileExistsError:
        return False
    except OSError as err:
        response = getattr(err.__cause__, "response", None) or {}
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status == 412:  # s3fs does not know this store's body of the answer
            return False
        if status == 501 or err.errno == errno.ENOSYS:
            raise StorageError(
                f"Cannot create {url}: its object store has no conditional writes "
                "(If-None-Match). Use a store that has them, or a mounted volume."
            ) from err
        raise
    return True
