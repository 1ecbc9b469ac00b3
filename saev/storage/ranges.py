"""Reading ranges of one object from many threads."""

import contextlib
import io
import os
import typing as tp
from collections.abc import Callable

from saev.errors import CorruptDataError
from saev.storage import s3
from saev.storage.cache import NodeCache
from saev.storage.faults import explained
from saev.storage.sources import FsspecObject, LocalFile, Source
from saev.storage.urls import filesystem, local_path, normalize


class RangeReader:
    """Reads ranges of one object, from any number of threads.

    Local files use ``preadv`` on one descriptor, so threads share no file position and no lock.
    ``s3://`` uses one connection per thread (:mod:`saev.storage.s3`). Other schemes use fsspec.

    Args:
        url: the object.
        size: its size in bytes, if known from a listing; saves a request on object stores. For
            local files it is not used.
        etag: its entity tag from the same listing. If the object has another tag when it is read,
            it was replaced, which is an error.
        cache: keeps ranges of remote objects on a local disk; see :func:`saev.storage.node_cache`.
        direct: bypass the page cache if the file system can (O_DIRECT). For files that are read
            once, or are larger than memory.

    Raises:
        StorageError: there is no such object, or it may not be read. If ``size`` was given, the
            first read raises this error.
    """

    def __init__(
        self,
        url: str | os.PathLike,
        *,
        size: int | None = None,
        etag: str = "",
        cache: NodeCache | None = None,
        direct: bool = False,
    ):
        self.url = normalize(url)
        with explained(self.url, "read"):
            path = local_path(self.url)
            if path is not None:
                self._source: Source = LocalFile(path, direct=direct)
            else:
                remote = _open(self.url, size, etag)
                self._source = remote if cache is None else cache.wrap(remote)
        self.size = self._source.size

    def readinto(self, offset: int, buffer: tp.Any) -> None:
        """Fill ``buffer`` (writable, contiguous) from byte ``offset``.

        Raises:
            CorruptDataError: the object ends before the buffer is full, or was replaced.
        """
        self._fill(offset, buffer, self._source.readinto)

    def reread(self, offset: int, buffer: tp.Any) -> None:
        """As :meth:`readinto`, but bypass all caches and remove these bytes from them."""
        self._fill(offset, buffer, self._source.reread)

    def _fill(
        self, offset: int, buffer: tp.Any, read: tp.Callable[[int, memoryview], None]
    ) -> None:
        view = memoryview(buffer).cast("B")
        self._check_inside(offset, view.nbytes)
        if not view.nbytes:
            return
        with explained(self.url, "read"):
            read(offset, view)

    def _check_inside(self, offset: int, length: int) -> None:
        end = offset + length
        if end > self.size:
            raise CorruptDataError(
                f"{self.url} is truncated: bytes {offset}-{end} were asked for, it has {self.size}."
            )

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""
        self._check_inside(offset, length)
        buffer = bytearray(length)
        self.readinto(offset, buffer)
        return bytes(buffer)

    def close(self) -> None:
        """Release the descriptor. May be called twice."""
        self._source.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # __init__ failed before the file was open
            self.close()

    def __enter__(self) -> "RangeReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _open(url: str, size: int | None, etag: str) -> FsspecObject:
    fs, key = filesystem(url)
    bucket = s3.bucket_of(fs, key)
    if bucket is not None:
        return s3.S3Object(url, fs, key, size, etag, bucket)
    return FsspecObject(url, fs, key, size, etag)


class RangeFile(io.RawIOBase):
    """Ranges of an object as a file, for libraries that read files.

    Args:
        size: of the object in bytes.
        read: returns n bytes from an offset. It is never asked for bytes behind the end.
    """

    def __init__(self, size: int, read: Callable[[int, int], bytes]):
        self._size, self._read, self._at = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("a place before the file")
        self._at = base + offset
        return self._at

    def read(self, n: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        n = left if n is None or n < 0 else min(n, left)
        data = self._read(self._at, n)
        self._at += n
        return data
