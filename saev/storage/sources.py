"""Where ranges come from: a local file, or an object of a store that fsspec knows."""

import os
import typing as tp
from pathlib import Path

import fsspec

from saev.errors import CorruptDataError
from saev.storage.faults import retry_reads


class Source(tp.Protocol):
    """One object that is read in ranges, by any number of threads."""

    size: int
    """Bytes."""

    def readinto(self, offset: int, view: memoryview) -> None:
        """Fill ``view``, which is not empty and ends inside the object."""

    def close(self) -> None:
        """Release what it holds. May be called twice."""


class LocalFile:
    """A file, read with ``preadv`` on one descriptor."""

    def __init__(self, path: Path):
        self._path = path
        self._fd: int | None = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._fd).st_size

    def readinto(self, offset: int, view: memoryview) -> None:
        assert self._fd is not None
        done = 0
        while done < view.nbytes:
            n = os.preadv(self._fd, [view[done : done + (1 << 30)]], offset + done)
            if n == 0:
                raise CorruptDataError(
                    f"{self._path} shrank while it was read, at byte {offset + done}."
                )
            done += n

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class FsspecObject:
    """An object of any store; each range is one request, and one copy more than need be."""

    def __init__(
        self, url: str, fs: fsspec.AbstractFileSystem, key: str, size: int | None, etag: str
    ):
        self.url = url
        self._fs, self._key = fs, key
        if size is None:
            fs.invalidate_cache(key)
            info = retry_reads(fs.info)(key)
            if info["type"] == "directory":
                raise IsADirectoryError(url)
            size, etag = int(info["size"]), entity_tag(info)
        self.size = size
        self.etag = etag

    def readinto(self, offset: int, view: memoryview) -> None:
        data = retry_reads(self._fs.cat_file)(self._key, start=offset, end=offset + view.nbytes)
        if len(data) != view.nbytes:
            raise CorruptDataError(
                f"{self.url}: {view.nbytes} bytes at {offset} were asked for, got {len(data)}."
            )
        view[:] = data

    def close(self) -> None:
        """There is nothing to release: connections belong to the file system."""


def entity_tag(row: dict[str, tp.Any]) -> str:
    """The entity tag in a row of a listing, without quotes; empty where a store has none."""
    return str(row.get("ETag") or row.get("etag") or "").strip('"')
