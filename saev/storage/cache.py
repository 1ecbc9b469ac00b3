"""Ranges of remote objects, kept on a disk of the node for all processes there.

``SAEV_CACHE_DIR`` names the folder, ``SAEV_CACHE_GB`` bounds it. An object is cut into segments of
64 MiB, one sparse file each: a table with a checksum per chunk of 64 KiB, then the chunks. A chunk
is written before its entry in the table, so whoever finds the entry finds the chunk; every chunk
is verified when it is read, so nothing else has to hold when a process or the node dies. A file's
name is made of URL, size and entity tag, so an object that was replaced is another one.

Of what exists, fsspec's file caches are made for one process and never evict, and diskcache keeps a
database that every hit writes to, copies once more, and verifies nothing.
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

log = logging.getLogger(__name__)

CHUNK = 64 << 10
"""Bytes that have one checksum: the least that is read."""
SEGMENT = 64 << 20
"""Bytes of an object in one file: the least that is evicted."""
DEFAULT_GB = 50.0

_FOLDER = "saev-ranges-1"
"""Below the given folder, which may hold other things. The number is that of the format."""
_TABLE = 8 * (SEGMENT // CHUNK)
_PRESENT = np.uint64(1 << 32)
"""In a table's entry, above the CRC-32C: an entry that was never written is 0."""
_MAX_OPEN = 256
_TOUCH_S = 60.0
_LOOK_AGAIN_S = 30.0
"""How long a full cache is taken to be full: looking for what may go reads all names."""
_SPARE = 0.05
"""Share of the bound that is freed at once, for the same reason."""


def from_environment() -> "NodeCache | None":
    """The cache that SAEV_CACHE_DIR and SAEV_CACHE_GB describe, one per process; None without.

    Raises:
        StorageError: SAEV_CACHE_GB is no positive number.
    """
    folder = os.environ.get("SAEV_CACHE_DIR", "")
    gb = os.environ.get("SAEV_CACHE_GB", "")
    # A forked process must not wait for a lock that a thread of its parent held.
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

    What was not used longest goes first, but nothing that was used since this process began: an
    epoch over more than fits would otherwise evict each range shortly before it comes again. What
    then finds no room is read from the store, and only that much of it.

    A cache never fails: where its folder cannot be used, one warning says so.

    Args:
        folder: on a local disk; made if missing.
        max_bytes: most bytes of all files, but for what is being written.
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
        with self.or_without("be used"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(0)

    def over(self, source: Source) -> Source:
        """``source`` with this cache before it, if it can be told from other contents."""
        if isinstance(source, FsspecObject) and source.etag:
            return _CachedObject(self, source)
        return source

    def admits(self) -> bool:
        """Whether there may be room."""
        return self._writable and time.monotonic() >= self._full_until

    def scratch(self, n_bytes: int) -> memoryview:
        """Memory of this thread, until it asks again."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or buffer.nbytes < n_bytes:
            buffer = self._local.buffer = memoryview(bytearray(n_bytes))
        return tp.cast(memoryview, buffer[:n_bytes])

    # --- Segments --------------------------------------------------------------------------

    def segment(self, name: str, *, create: bool = False) -> "_Segment | None":
        """One file of the cache, opened; None if there is none, or it cannot be used."""
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
        """Keep what lies at ``start`` of a segment: whole chunks, but for the object's last."""
        if not self.admits() or not self._has_room(data.nbytes + _TABLE):
            return
        with self.or_without("be written"):
            segment = self.segment(name, create=True)
            if segment is not None:
                segment.write(start, data)

    def drop(self, name: str, why: str) -> None:
        """Remove a segment that is damaged."""
        with self._lock, contextlib.suppress(OSError):
            self._open.pop(name, None)
            (self.folder / name[:2] / name).unlink()
            log.warning("Dropped %s from the cache: %s", self.folder / name[:2] / name, why)

    # --- Room ------------------------------------------------------------------------------

    def _has_room(self, n_bytes: int) -> bool:
        """Reserve bytes. The sum of all processes' reservations is in the lock's own file."""
        with self.or_without("be written"), self._locked() as fd:
            used = struct.unpack("<q", os.pread(fd, 8, 0).ljust(8, b"\0"))[0]
            if used + n_bytes <= self.max_bytes:
                os.pwrite(fd, struct.pack("<q", used + n_bytes), 0)
                return True
            if self._evict(fd, n_bytes):
                return True
            self._full_until = time.monotonic() + _LOOK_AGAIN_S
        return False

    def _make_room(self, n_bytes: int) -> None:
        with self._locked() as fd:
            self._evict(fd, n_bytes)

    def _evict(self, fd: int, n_bytes: int) -> bool:
        """Count what is there, and remove old segments until ``n_bytes`` fit, which are reserved.

        A process that has a removed file open goes on reading it.
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
        """Alone among the threads and processes that count; yields the file with the sum."""
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

    # --- Without it ------------------------------------------------------------------------

    @contextlib.contextmanager
    def or_without(self, what: str) -> Iterator[None]:
        """A fault of the disk in the block ends the cache's use, and is no error."""
        try:
            yield
        except OSError as err:
            self._stop(err, what)

    def _stop(self, err: OSError, what: str) -> None:
        with self._lock:
            if self._writable:
                log.warning(
                    "The cache %s cannot %s any more (%s); going on without. "
                    "SAEV_CACHE_DIR says where it is, SAEV_CACHE_GB how large.",
                    self.folder,
                    what,
                    err.strerror or err,
                )
            self._writable = False
            self._readable = self._readable and what == "be written"


class _Segment:
    """A file of the cache, closed when nobody refers to it."""

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
        """Whether it still has a name."""
        return os.fstat(self._fd).st_nlink > 0

    def present(self, first: int, stop: int) -> np.ndarray:
        """Entries of the table, uint64 [stop - first]; 0 for chunks that are not there."""
        raw = os.pread(self._fd, 8 * (stop - first), 8 * first)
        return np.frombuffer(raw.ljust(8 * (stop - first), b"\0"), dtype="<u8")

    def read(self, start: int, view: memoryview, size: int, entries: np.ndarray) -> bool:
        """Fill ``view`` from byte ``start``; returns whether every chunk is as it was written.

        Args:
            start: counted inside the segment.
            view: what to fill.
            size: bytes of the object in this segment.
            entries: the table's entries of all chunks that are touched.
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

    def write(self, start: int, data: memoryview) -> None:
        """Chunks first, then their entries."""
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
    """An object with the cache before it."""

    def __init__(self, cache: NodeCache, source: FsspecObject):
        self.size = source.size
        self._cache = cache
        self._source = source
        self._key = content_hash([source.url, source.size, source.etag], 32)

    def readinto(self, offset: int, view: memoryview) -> None:
        for start, stop in self._missing(offset, view):
            self._fetch(start, stop, offset, view)

    def reread(self, offset: int, view: memoryview) -> None:
        # If a bit flipped on the way from the store, the cache's checksum is of the wrong bytes.
        for number in range(offset // SEGMENT, -(-(offset + view.nbytes) // SEGMENT)):
            self._cache.drop(self._name(number), "its bytes are not those that were recorded")
        self._source.reread(offset, view)

    def _missing(self, offset: int, view: memoryview) -> list[tuple[int, int]]:
        """Fill what the cache has; returns the ranges of the object that it has not, in order."""
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
        """The same for one segment; ``start`` and the result are counted inside it."""
        stop = start + view.nbytes
        name = self._name(number)
        segment = self._cache.segment(name)
        if segment is None:
            return [(start, stop)]
        first, last = start // CHUNK, -(-stop // CHUNK)
        size = min(SEGMENT, self.size - number * SEGMENT)
        missing = []
        with self._cache.or_without("be read"):
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
        """Read a range from the store into its place in ``view``, and keep it in whole chunks."""
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
