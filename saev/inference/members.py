"""Reads the arrays of an `.npz` file by ranges, and compares its headers with the file.

`numpy.load` trusts the headers of a zip file. Here, an array must be uncompressed, lie inside the
file, and have exactly the size that its own header says.
"""

import struct
import typing as tp
import zipfile
import zlib

import numpy as np

from saev import storage
from saev.errors import CorruptDataError

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Signature, length of the name, length of the extra field."""
_MAX_HEADER = 1 << 16
"""Most bytes before an array's values. Files that saev wrote have 128."""
_STEP = 16 << 20

Reader = storage.RangeReader | storage.CheckedReader


class Members:
    """The arrays of an `.npz`.

    Args:
        reader: of the file.
        remedy: a sentence for errors about damage.

    Raises:
        CorruptDataError: the file is no zip file.
    """

    def __init__(self, reader: Reader, remedy: str):
        self._reader, self._remedy = reader, remedy
        self.url = reader.url
        with self._parsed():
            # The cast is safe: io.RawIOBase has all methods that ZipFile calls.
            file = storage.RangeFile(reader.size, reader.read)
            self._zip = zipfile.ZipFile(tp.cast(tp.BinaryIO, file))

    def array(self, name: str, kinds: tp.Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
        """One array.

        Args:
            name: of the array.
            kinds: dtypes that it may have.
            shape: that it must have; -1 stands for any length.

        Raises:
            CorruptDataError: the array is missing or damaged, or has another dtype or shape.
        """
        with self._parsed():
            info = self._zip.getinfo(f"{name}.npy")
            start = self._start(info)
            dtype, found, first = self._header(start, info.file_size)
        if dtype.str not in kinds or not storage.fits(found, shape):
            raise CorruptDataError(
                f"{self.url}: {name} is {dtype.str} {list(found)}, expected {' or '.join(kinds)} "
                f"{list(shape)}. {self._remedy}"
            )
        values = np.empty(found, dtype=dtype)
        self._fill(start + first, values)
        self._check(info, start, first, values)
        return values

    def _parsed(self) -> tp.ContextManager[None]:
        return storage.parsed(self.url, "a zip file of arrays (.npz)", remedy=self._remedy)

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where the bytes of a member begin."""
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{info.filename} is compressed")
        offset = info.header_offset
        data = self._reader.read(offset, _LOCAL_HEADER.size)
        signature, n_name, n_extra = _LOCAL_HEADER.unpack(data)
        start = offset + _LOCAL_HEADER.size + n_name + n_extra
        if signature != b"PK\x03\x04" or start + info.file_size > self._reader.size:
            raise ValueError(f"{info.filename} does not lie where its directory says")
        return int(start)

    def _header(self, start: int, n_bytes: int) -> tuple[np.dtype, tuple[int, ...], int]:
        """dtype and shape of an array, and the number of bytes before its values."""
        head = self._reader.read(start, min(n_bytes, _MAX_HEADER))
        found = storage.npy_header(head, n_bytes)
        if found.is_fortran and len(found.shape) > 1:
            raise ValueError(f"an array of {list(found.shape)} is in Fortran order")
        return found.dtype, found.shape, found.n_bytes

    def _fill(self, start: int, values: np.ndarray) -> None:
        view = memoryview(values.reshape(-1).view(np.uint8).data if values.size else b"")
        for at in range(0, view.nbytes, _STEP):
            self._reader.readinto(start + at, view[at : at + _STEP])

    def _check(self, info: zipfile.ZipInfo, start: int, first: int, values: np.ndarray) -> None:
        """Compare with the zip's checksum, unless the reader compares with the list of files."""
        if isinstance(self._reader, storage.CheckedReader):
            return
        crc = zlib.crc32(self._reader.read(start, first))
        crc = zlib.crc32(np.ascontiguousarray(values).tobytes() if values.size else b"", crc)
        if crc != info.CRC:
            raise CorruptDataError(
                f"{self.url} is damaged: {info.filename} has CRC {crc:08x}, expected "
                f"{info.CRC:08x}. {self._remedy}"
            )
