"""Sources of ranges: a local file, or an object that fsspec reads."""

import contextlib
import errno
import mmap
import os
import threading
import typing as tp
from pathlib import Path

import fsspec
import numpy as np
from fsspec.implementations.cached import CachingFileSystem

from saev.errors import CorruptDataError
from saev.storage.faults import retry

_ALIGNMENT = 4096
_DIRECT_BYTES = 4 << 20
_LOCAL = threading.local()


class Source(tp.Protocol):
    """One object that is read in ranges, by any number of threads."""

    size: int
    """Bytes."""

    def readinto(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from byte ``offset``. It is not empty and ends inside the object."""

    def reread(self, offset: int, view: memoryview) -> None:
        """As :meth:`readinto`, but bypass all caches and remove these bytes from them."""

    def close(self) -> None:
        """Release the descriptors. May be called twice."""


class LocalFile:
    """A file, read with ``preadv`` on one descriptor.

    Args:
        path: the file.
        direct: bypass the page cache if the file system can. Readers' offsets, lengths and buffers
            are not aligned, so the bytes are copied from an aligned buffer of the thread. This copy
            costs half as much as the page cache does.
    """

    def __init__(self, path: Path, *, direct: bool = False):
        self._path = path
        self._fd: int | None = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._fd).st_size
        self._direct_fd: int | None = None
        if direct:
            with contextlib.suppress(OSError, AttributeError):  # tmpfs and macOS cannot
                self._direct_fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def readinto(self, offset: int, view: memoryview) -> None:
        if self._direct_fd is None:
            self._buffered(offset, view)
            return
        step = _DIRECT_BYTES - _ALIGNMENT
        for start in range(0, view.nbytes, step):
            self._direct(offset + start, view[start : start + step])

    def reread(self, offset: int, view: memoryview) -> None:
        with contextlib.suppress(OSError, AttributeError):  # macOS has no such call
            os.posix_fadvise(tp.cast(int, self._fd), offset, view.nbytes, os.POSIX_FADV_DONTNEED)
        if self._direct_fd is not None:
            self.readinto(offset, view)
            return
        other = LocalFile(self._path, direct=True)
        try:
            other.readinto(offset, view)
        finally:
            other.close()

    def _buffered(self, offset: int, view: memoryview) -> None:
        assert self._fd is not None
        done = 0
        while done < view.nbytes:
            n = os.preadv(self._fd, [view[done : done + (1 << 30)]], offset + done)
            if n == 0:
                raise CorruptDataError(
                    f"{self._path} shrank while it was read, at byte {offset + done}."
                )
            done += n

    def _direct(self, offset: int, view: memoryview) -> None:
        assert self._direct_fd is not None
        begin = offset // _ALIGNMENT * _ALIGNMENT
        end = -(-(offset + view.nbytes) // _ALIGNMENT) * _ALIGNMENT
        block = _aligned()
        try:
            n = os.preadv(self._direct_fd, [block[: end - begin]], begin)
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            n = 0  # the file system accepted O_DIRECT, but refuses this alignment
        done = min(max(0, begin + n - offset), view.nbytes)
        first = offset - begin
        np.copyto(np.asarray(view[:done]), np.asarray(block[first : first + done]))
        if done < view.nbytes:
            self._buffered(offset + done, view[done:])

    def close(self) -> None:
        for fd in (self._fd, self._direct_fd):
            if fd is not None:
                os.close(fd)
        self._fd = self._direct_fd = None


def _aligned() -> memoryview:
    """This thread's buffer for direct reads. It is aligned to a page, which all devices accept."""
    block = getattr(_LOCAL, "block", None)
    if block is None:
        block = _LOCAL.block = memoryview(mmap.mmap(-1, _DIRECT_BYTES))
    return tp.cast(memoryview, block)


class FsspecObject:
    """An object of any store. Each range is one request and one extra copy."""

    def __init__(
        self, url: str, fs: fsspec.AbstractFileSystem, key: str, size: int | None, etag: str
    ):
        self.url = url
        self._fs, self._key = fs, key
        if size is None:
            fs.invalidate_cache(key)
            info = retry(fs.info)(key)
            if info["type"] == "directory":
                raise IsADirectoryError(url)
            size, etag = int(info["size"]), entity_tag(info)
        self.size = size
        self.etag = etag

    def readinto(self, offset: int, view: memoryview) -> None:
        self._read(self._fs, self._key, offset, view)

    def reread(self, offset: int, view: memoryview) -> None:
        self._read(*past_caches(self._fs, self._key), offset, view)

    @staticmethod
    @retry
    def _read(fs: fsspec.AbstractFileSystem, key: str, offset: int, view: memoryview) -> None:
        data = cat_file(fs, key, start=offset, end=offset + view.nbytes)
        if len(data) != view.nbytes:
            raise ConnectionError(
                f"{view.nbytes} bytes at {offset} were asked for, got {len(data)}"
            )
        view[:] = data

    def close(self) -> None:
        """There is nothing to release: connections belong to the file system."""


def cat_file(fs: fsspec.AbstractFileSystem, key: str, **span: int) -> bytes:
    """Read an object or a range of it.

    Raises:
        ConnectionError: the client found that bytes were damaged during the transfer.
    """
    try:
        return tp.cast(bytes, fs.cat_file(key, **span))
    except Exception as err:
        if type(err).__name__ != "FlexibleChecksumError":  # of botocore, which may not be installed
            raise
        raise ConnectionError(
            f"the bytes arrived with another checksum than was sent: {err}"
        ) from err


def past_caches(fs: fsspec.AbstractFileSystem, key: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind fsspec's caches (simplecache::…). Removes the object from them."""
    while isinstance(fs, CachingFileSystem):
        with contextlib.suppress(Exception):  # not in the cache, or a cache that cannot drop it
            fs.pop_from_cache(key)
        fs = fs.fs
    return fs, key


def entity_tag(row: dict[str, tp.Any]) -> str:
    """The entity tag in a row of a listing, without quotes; empty if the store has none."""
    return str(row.get("ETag") or row.get("etag") or "").strip('"')
