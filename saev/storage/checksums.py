"""Checksums of bytes."""

import io
import os
import typing as tp

import crc32c as _crc32c

from saev.errors import CorruptDataError
from saev.storage.combining import combine, concatenate
from saev.storage.confirming import confirmed
from saev.storage.ranges import RangeReader
from saev.storage.urls import normalize

BLOCK = 1 << 20
"""Bytes per checksum in lists of files."""
_CHUNK = 8 << 20


def crc32c(data: tp.Any, value: int = 0) -> int:
    """CRC-32C (Castagnoli) of a contiguous buffer, continuing from ``value``. Releases the GIL."""
    return _crc32c.crc32c(memoryview(data).cast("B"), value)


def format_checksum(value: int) -> str:
    """The checksum as it is written in JSON: ``crc32c:`` and eight hex digits."""
    return f"crc32c:{value:08x}"


def mismatch(url: str, found: str, expected: str, remedy: str = "") -> CorruptDataError | None:
    """The error for an object whose checksum is not the expected one; None if it is."""
    if found == expected:
        return None
    return CorruptDataError(
        f"{url} is damaged: it has checksum {found}, expected {expected}. {remedy}"
    )


class ChecksumWriter(io.RawIOBase):
    """Writes to ``handle``, counts the bytes, and computes the CRC-32C of every MiB."""

    def __init__(self, handle: tp.BinaryIO):
        self._handle = handle
        self._full: list[int] = []
        self._crc = 0
        self.n_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: tp.Any) -> int:
        view = memoryview(data).cast("B")
        self._handle.write(view)
        start = 0
        while start < view.nbytes:
            part = view[start : start + BLOCK - self.n_bytes % BLOCK]
            self._crc = crc32c(part, self._crc)
            self.n_bytes += part.nbytes
            start += part.nbytes
            if self.n_bytes % BLOCK == 0:
                self._full.append(self._crc)
                self._crc = 0
        return view.nbytes

    @property
    def checksum(self) -> str:
        """Checksum of all bytes written so far, in the format of JSON records."""
        full = concatenate(self._full, BLOCK)
        return format_checksum(combine(full, self._crc, self.n_bytes % BLOCK))

    @property
    def blocks(self) -> str:
        """Checksums of every MiB, eight hex digits each. The last MiB may be shorter. Empty if
        there is only one."""
        if self.n_bytes <= BLOCK:
            return ""
        rest = [self._crc] if self.n_bytes % BLOCK else []
        return "".join(f"{crc:08x}" for crc in [*self._full, *rest])


def checksum(url: str | os.PathLike, *, fresh: bool = False) -> str:
    """Checksum of a stored object, which is read in chunks.

    Args:
        url: the object.
        fresh: bypass all caches.
    """
    crc = 0
    buffer = memoryview(bytearray(_CHUNK))
    with RangeReader(url) as reader:
        for start in range(0, reader.size, _CHUNK):
            part = buffer[: min(_CHUNK, reader.size - start)]
            (reader.reread if fresh else reader.readinto)(start, part)
            crc = crc32c(part, crc)
    return format_checksum(crc)


def verify(url: str | os.PathLike, expected: str, remedy: str = "") -> None:
    """Read a whole object and compare it with its checksum.

    Raises:
        CorruptDataError: the checksum differs.
    """
    place = normalize(url)
    confirmed(
        place,
        lambda fresh: checksum(place, fresh=fresh).encode(),
        lambda found: mismatch(place, found.decode(), expected, remedy),
        lambda a, b: f"its checksum was {bytes(a).decode()}, then {bytes(b).decode()}",
    )
