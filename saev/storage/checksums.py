"""Checksums of bytes."""

import io
import os
import typing as tp

import crc32c as _crc32c

from saev.storage.ranges import RangeReader

_CHUNK = 8 << 20


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
