"""Ranged reads of one object by many threads."""

import contextlib
import os
import typing as tp

from saev.errors import CorruptDataError
from saev.storage.faults import explained, retry_reads
from saev.storage.urls import filesystem, local_path, normalize


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
        with explained(self.url, "read"):
            if path is not None:
                self._fd = os.open(path, os.O_RDONLY)
                self.size = os.fstat(self._fd).st_size
            else:
                self._fs, self._key = filesystem(self.url)
                self._fs.invalidate_cache(self._key)
                self.size = int(retry_reads(self._fs.size)(self._key))

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
        with explained(self.url, "read"):
            if self._fd is not None:
                self._pread(offset, view)
            else:
                data = retry_reads(self._fs.cat_file)(self._key, start=offset, end=end)
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
