"""A cache of ranges of remote objects, on a disk of the node, for all processes of the node.

``SAEV_CACHE_DIR`` is the folder, ``SAEV_CACHE_GB`` limits its size. An object is divided into
segments of 64 MiB, with one sparse file each: a table with a checksum per chunk of 64 KiB, and then
the chunks. A chunk is written before its entry in the table, so a process that finds an entry also
finds the chunk. Chunks are verified when they are read, so the cache may be used after a process or
the node was killed. The name of a file is a hash of URL, size and entity tag, so a replaced object
has other files.

fsspec's own caches (blockcache, filecache) are not used. They are made for one process, have no
limit of size, and return damaged bytes (benchmarks/node_cache.py compares them). diskcache writes
to its database at every hit, and verifies nothing.
"""

import collections
import contextlib
import fcntl
import functools
import itertools
import logging
import os
import struct
import threading
import time
import typing as tp
from collections.abc import Iterator
from pathlib import Path

import crc32c
import numpy as np

from saev.errors import StorageError
from saev.storage.hashes import content_hash
from saev.storage.sources import FsspecObject, Source

logger = logging.getLogger(__name__)

CHUNK = 64 << 10
"""Bytes per checksum, and the smallest read."""
SEGMENT = 64 << 20
"""Bytes of an object per file, which is the unit of eviction."""
DEFAULT_GB = 50.0

_FOLDER = "saev-ranges-1"
"""Name of the cache's folder. The number is the version of the format."""
_TABLE = 8 * (SEGMENT // CHUNK)
_PRESENT = np.uint64(1 << 32)
"""Bit of a written entry of the table, above the CRC-32C. An entry that was never written is 0."""
_MAX_OPEN = 256
_TOUCH_S = 60.0
_LOOK_AGAIN_S = 30.0
"""Seconds before a full cache is checked again, because looking for old files lists all files."""
_SPARE = 0.05
"""Share of the limit that is freed at once, for the same reason."""


def from_environment() -> "NodeCache | None":
    """The cache of this process, as SAEV_CACHE_DIR and SAEV_CACHE_GB say. None without the former.

    Raises:
        StorageError: SAEV_CACHE_GB is not a positive number.
    """
    folder = os.environ.get("SAEV_CACHE_DIR", "")
    gb = os.environ.get("SAEV_CACHE_GB", "")
    # By process id, because a forked process must not use the locks of its parent.
    return _of(folder, gb, os.getpid()) if folder else None


@functools.cache
def _of(folder: str, gb: str, pid: int) -> "NodeCache":
    try:
        bound = float(gb or DEFAULT_GB)
    except ValueError:
        bound = 0.0
    if not 0 < bound < float("inf"):
        raise StorageError(f"SAEV_CACHE_GB is {gb!r}, expected a positive number of GB, like 200.")
    return NodeCache(folder, int(bound * 1e9))


class NodeCache:
    """Ranges of objects in a folder, for any number of threads and processes.

    The least recently used segments are evicted first. Segments that were used since this process
    started are never evicted: otherwise an epoch over more data than fits would evict each range
    shortly before it is needed again. Ranges for which there is no space are read from the store.

    A failing disk is not an error. It disables the cache with one warning.

    Args:
        folder: on a local disk; made if missing.
        max_bytes: most bytes of all files. On macOS, writes in progress may exceed it.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int):
        self.folder = Path(folder) / _FOLDER
        self.max_bytes = max_bytes
        self._began = time.time()
        self._full_until = 0.0
        self._readable = self._writable = True
        self._open: collections.OrderedDict[str, _Segment] = collections.OrderedDict()
        self._lock = threading.RLock()
        self._local = threading.local()
        self._size_fd = -1
        with self.disabled_on_error("be used"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(0)

    def wrap(self, source: Source) -> Source:
        """``source`` read through this cache. Sources without entity tag are returned unchanged."""
        if isinstance(source, FsspecObject) and source.etag:
            return _CachedObject(self, source)
        return source

    def admits(self) -> bool:
        """Whether there may be space for new data."""
        return self._writable and time.monotonic() >= self._full_until

    def scratch(self, n_bytes: int) -> memoryview:
        """A buffer of this thread. It is valid until the thread's next call."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or buffer.nbytes < n_bytes:
            buffer = self._local.buffer = memoryview(bytearray(n_bytes))
        return tp.cast(memoryview, buffer[:n_bytes])

    # --- Segments --------------------------------------------------------------------------

    def segment(self, name: str, *, create: bool = False) -> "_Segment | None":
        """Open a segment's file. Returns None if it does not exist or cannot be used."""
        if not self._readable:
            return None
        with self._lock:
            found = self._open.get(name)
            if found is not None and found.is_linked():
                self._open.move_to_end(name)
                return found
            path = self.folder / name[:2] / name
            try:
                found = _Segment(path, create=create)
            except FileNotFoundError:
                return None
            except OSError as err:
                self._stop(err, "be read")
                return None
            self._open[name] = found
            if len(self._open) > _MAX_OPEN:  # closed when its last user is done
                self._open.popitem(last=False)
            return found

    def put(self, name: str, start: int, data: memoryview) -> None:
        """Store data at ``start`` of a segment. It must be whole chunks; the object's last chunk
        may be shorter."""
        if not self.admits():
            return
        with self.disabled_on_error("be written"):
            segment = self._reserve(name, start, data.nbytes)
            if segment is not None:
                segment.write(start, data)

    def drop(self, name: str, why: str) -> None:
        """Delete a damaged segment."""
        with self._lock, contextlib.suppress(OSError):
            self._open.pop(name, None)
            (self.folder / name[:2] / name).unlink()
            logger.warning("Dropped %s from the cache: %s", self.folder / name[:2] / name, why)

    # --- Space -----------------------------------------------------------------------------

    def _reserve(self, name: str, start: int, n_bytes: int) -> "_Segment | None":
        """The segment with disk space for ``n_bytes`` at ``start``. None if there is no space.

        The lock file holds the sum of all processes' files. The space is allocated before the lock
        is released, so that a process that counts the files also counts writes in progress.
        """
        wanted = n_bytes + _TABLE
        with self._locked() as fd:
            used = struct.unpack("<q", os.pread(fd, 8, 0).ljust(8, b"\0"))[0]
            if used + wanted <= self.max_bytes:
                os.pwrite(fd, struct.pack("<q", used + wanted), 0)
            elif not self._evict(fd, wanted):
                self._full_until = time.monotonic() + _LOOK_AGAIN_S
                return None
            segment = self.segment(name, create=True)
            if segment is not None:
                segment.allocate(start, n_bytes)
            return segment

    def _make_room(self, n_bytes: int) -> None:
        with self._locked() as fd:
            self._evict(fd, n_bytes)

    def _evict(self, fd: int, n_bytes: int) -> bool:
        """Count all files, and delete old segments until there is space for ``n_bytes``. Reserves
        this space and returns True if there is enough.

        A process that has a deleted file open can still read it.
        """
        files = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime, status.st_blocks * 512, path))
        used = sum(size for _, size, _ in files)
        if used + n_bytes > self.max_bytes:
            wanted = self.max_bytes * (1 - _SPARE) - n_bytes
            for last_used, size, path in sorted(files):
                if used <= wanted or last_used >= self._began:
                    break
                path.unlink(missing_ok=True)
                used -= size
        fits = used + n_bytes <= self.max_bytes
        os.pwrite(fd, struct.pack("<q", used + n_bytes * fits), 0)
        return fits

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the lock of all threads and processes. Yields the file with the sum."""
        with self._lock:
            if self._size_fd < 0:
                self._size_fd = os.open(
                    self.folder / "size", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666
                )
            fcntl.flock(self._size_fd, fcntl.LOCK_EX)
            try:
                yield self._size_fd
            finally:
                fcntl.flock(self._size_fd, fcntl.LOCK_UN)

    # --- Faults of the disk ----------------------------------------------------------------

    @contextlib.contextmanager
    def disabled_on_error(self, what: str) -> Iterator[None]:
        """Disable the cache if the block raises OSError, which is suppressed."""
        try:
            yield
        except OSError as err:
            self._stop(err, what)

    def _stop(self, err: OSError, what: str) -> None:
        with self._lock:
            if self._writable:
                logger.warning(
                    "The cache %s cannot %s any more (%s); going on without. "
                    "SAEV_CACHE_DIR sets its folder, SAEV_CACHE_GB its size.",
                    self.folder,
                    what,
                    err.strerror or err,
                )
            self._writable = False
            self._readable = self._readable and what == "be written"


class _Segment:
    """A file of the cache. It is closed when nothing refers to it."""

    def __init__(self, path: Path, *, create: bool):
        flags = os.O_RDWR | os.O_CLOEXEC
        if create:
            path.parent.mkdir(exist_ok=True)
            flags |= os.O_CREAT
        self._touched = 0.0
        self._fd = -1
        self._fd = os.open(path, flags, 0o666)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def is_linked(self) -> bool:
        """Whether the file has not been deleted."""
        return os.fstat(self._fd).st_nlink > 0

    def present(self, first: int, stop: int) -> np.ndarray:
        """Entries of the table, uint64 [stop - first]; 0 for missing chunks."""
        raw = os.pread(self._fd, 8 * (stop - first), 8 * first)
        return np.frombuffer(raw.ljust(8 * (stop - first), b"\0"), dtype="<u8")

    def read(self, start: int, view: memoryview, size: int, entries: np.ndarray) -> bool:
        """Fill ``view`` from byte ``start``. Returns whether all chunks have the right checksum.

        Args:
            start: offset inside the segment.
            view: target.
            size: bytes of the object in this segment.
            entries: entries of the table for all chunks of the range.
        """
        self._touch()
        begin = start // CHUNK * CHUNK
        end = min(-(-(start + view.nbytes) // CHUNK) * CHUNK, size)
        head, tail = bytearray(start - begin), bytearray(end - start - view.nbytes)
        parts = [memoryview(head), view, memoryview(tail)]
        if os.preadv(self._fd, parts, _TABLE + begin) != end - begin:
            return False
        for i, entry in enumerate(entries.tolist()):
            crc, low = 0, i * CHUNK
            high = min(low + CHUNK, end - begin)
            for part in parts:
                if low < part.nbytes and high > 0:
                    crc = crc32c.crc32c(part[max(low, 0) : min(high, part.nbytes)], crc)
                low, high = low - part.nbytes, high - part.nbytes
            if entry != int(_PRESENT) | crc:
                return False
        return True

    def allocate(self, start: int, n_bytes: int) -> None:
        """Allocate disk space for the table and for ``n_bytes`` of chunks."""
        with contextlib.suppress(AttributeError):  # macOS has no such call
            os.posix_fallocate(self._fd, 0, _TABLE)
            os.posix_fallocate(self._fd, _TABLE + start, n_bytes)

    def write(self, start: int, data: memoryview) -> None:
        """Write chunks, and then their entries."""
        entries = [
            int(_PRESENT) | crc32c.crc32c(data[i : i + CHUNK]) for i in range(0, data.nbytes, CHUNK)
        ]
        _write(self._fd, data, _TABLE + start)
        _write(self._fd, memoryview(np.array(entries, dtype="<u8").tobytes()), start // CHUNK * 8)
        self._touch()

    def _touch(self) -> None:
        now = time.monotonic()
        if now - self._touched > _TOUCH_S or not self._touched:
            self._touched = now
            os.utime(self._fd)


def _write(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < data.nbytes:
        done += os.pwrite(fd, data[done:], offset + done)


class _CachedObject:
    """An object that is read through the cache."""

    def __init__(self, cache: NodeCache, source: FsspecObject):
        self.size = source.size
        self._cache = cache
        self._source = source
        self._key = content_hash([source.url, source.size, source.etag], 32)

    def readinto(self, offset: int, view: memoryview) -> None:
        for start, stop in self._missing(offset, view):
            self._fetch(start, stop, offset, view)

    def reread(self, offset: int, view: memoryview) -> None:
        # If a bit flipped before the bytes were cached, their checksum in the cache is right.
        for number in range(offset // SEGMENT, -(-(offset + view.nbytes) // SEGMENT)):
            self._cache.drop(self._name(number), "its bytes are not those that were recorded")
        self._source.reread(offset, view)

    def _missing(self, offset: int, view: memoryview) -> list[tuple[int, int]]:
        """Fill ``view`` from the cache. Returns the missing ranges of the object, in order."""
        missing: list[tuple[int, int]] = []
        end = offset + view.nbytes
        for number in range(offset // SEGMENT, -(-end // SEGMENT)):
            base = number * SEGMENT
            start, stop = max(offset, base), min(end, base + SEGMENT)
            part = view[start - offset : stop - offset]
            for a, b in self._missing_of(number, start - base, part):
                if missing and missing[-1][1] == base + a:
                    missing[-1] = (missing[-1][0], base + b)
                else:
                    missing.append((base + a, base + b))
        return missing

    def _missing_of(self, number: int, start: int, view: memoryview) -> list[tuple[int, int]]:
        """The same for one segment. ``start`` and the result are offsets inside the segment."""
        stop = start + view.nbytes
        name = self._name(number)
        segment = self._cache.segment(name)
        if segment is None:
            return [(start, stop)]
        first, last = start // CHUNK, -(-stop // CHUNK)
        size = min(SEGMENT, self.size - number * SEGMENT)
        missing = []
        with self._cache.disabled_on_error("be read"):
            entries = segment.present(first, last)
            there = entries != 0
            cuts = [0, *(np.flatnonzero(there[1:] != there[:-1]) + 1).tolist(), last - first]
            for i, j in itertools.pairwise(cuts):
                a, b = max(start, (first + i) * CHUNK), min(stop, (first + j) * CHUNK)
                if not there[i]:
                    missing.append((a, b))
                elif not segment.read(a, view[a - start : b - start], size, entries[i:j]):
                    self._cache.drop(name, "a chunk differs from its checksum")
                    return [(start, stop)]
            return missing
        return [(start, stop)]

    def _fetch(self, start: int, stop: int, offset: int, view: memoryview) -> None:
        """Read a range from the store into ``view``, and store its whole chunks in the cache."""
        wanted = view[start - offset : stop - offset]
        if not self._cache.admits():
            self._source.readinto(start, wanted)
            return
        begin, end = start // CHUNK * CHUNK, min(-(-stop // CHUNK) * CHUNK, self.size)
        data = self._cache.scratch(end - begin)
        self._source.readinto(begin, data)
        np.copyto(np.asarray(wanted), np.asarray(data[start - begin : stop - begin]))
        for number in range(begin // SEGMENT, -(-end // SEGMENT)):
            base = number * SEGMENT
            a, b = max(begin, base), min(end, base + SEGMENT)
            self._cache.put(self._name(number), a - base, data[a - begin : b - begin])

    def _name(self, number: int) -> str:
        return f"{self._key}-{number:06d}"

    def close(self) -> None:
        self._source.close()
