"""Writes sparse matrices as `.npz` files, without holding a whole matrix in memory.

An `.npz` is a ZIP file of `.npy` arrays. `scipy.sparse.load_npz` reads the arrays `data`,
`indices`, `indptr`, `format` and `shape`, and ignores others. The arrays are not compressed,
because compression hardly makes floats smaller. Time stamps are constant and the stream cannot
seek, so that equal codes give equal bytes at any time and on any storage.
"""

import io
import types
import typing as tp
import zipfile
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from saev import storage
from saev.inference.codes import Piece, StoredCodes

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that ZIP can store
_UNIX = 3


class _Stream(io.RawIOBase):
    """Has `write`, `flush` and `tell` only, so that zipfile does not go back to change headers."""

    def __init__(self, handle: tp.BinaryIO):
        self._handle = handle
        self._n_bytes = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        return self._n_bytes

    def seek(self, *args: int) -> int:
        raise io.UnsupportedOperation("seek")

    def write(self, data: tp.Any) -> int:
        self._handle.write(data)
        n = memoryview(data).nbytes
        self._n_bytes += n
        return n


class NpzWriter:
    """Writes arrays as members of an `.npz`, each from an iterable of its chunks.

    Args:
        handle: from `storage.open_write`.
    """

    def __init__(self, handle: tp.BinaryIO):
        # The cast is safe: io.RawIOBase has all methods that ZipFile calls.
        self._zip = zipfile.ZipFile(tp.cast(tp.BinaryIO, _Stream(handle)), "w", zipfile.ZIP_STORED)

    def write(self, name: str, shape: tuple[int, ...], chunks: Iterable[np.ndarray]) -> None:
        """Write one array.

        Args:
            name: of the array.
            shape: of the whole array.
            chunks: at least one, consecutive along the first axis, all of one dtype.

        Raises:
            ValueError: the chunks do not make up the shape.
        """
        stream: Iterator[np.ndarray] = iter(chunks)
        chunk = next(stream)
        dtype = chunk.dtype
        info = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
        info.create_system, info.external_attr = _UNIX, 0o644 << 16
        n_written = 0
        with self._zip.open(info, "w", force_zip64=True) as member:
            descr = np.lib.format.dtype_to_descr(dtype)
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            while True:
                if chunk.dtype != dtype:
                    raise ValueError(f"{name}: a chunk is {chunk.dtype}, expected {dtype}.")
                if chunk.size:
                    member.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
                n_written += chunk.size
                following = next(stream, None)
                if following is None:
                    break
                chunk = following
        if n_written != int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"{name}: {n_written} elements were written, the shape is {shape}.")

    def __enter__(self) -> tp.Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Write the ZIP directory, unless there was an error."""
        if error is not None:
            self._zip.fp = None  # otherwise ZipFile writes when it is garbage-collected
        self._zip.close()


def index_dtype(nnz: int) -> np.dtype:
    """dtype of `indptr`: int32 if it can count the entries, else int64. SciPy chooses the same."""
    return np.dtype("<i4" if nnz <= np.iinfo(np.int32).max else "<i8")


ByRow = tuple[np.ndarray, np.ndarray, np.ndarray]
"""What `Columns.to_rows` returns."""


def write_codes(
    url: str,
    codes: StoredCodes,
    extra: tp.Mapping[str, np.ndarray] | None = None,
    seen: Callable[[Piece, ByRow], None] = lambda piece, rows: None,
) -> storage.Listed:
    """Publish stored codes as a CSR matrix [tokens, latents].

    Beside SciPy's arrays, the file holds `example_idx` int64 [tokens] and `token_idx` int32
    [tokens], which say of which token each row is.

    Args:
        url: of the file.
        codes: the pieces, in dataset order.
        extra: further small arrays.
        seen: is given each piece once, with its codes by row.

    Returns:
        Size and checksums of the file.
    """
    nnz, n_rows = codes.nnz, codes.n_rows
    with storage.open_write(url) as handle:
        writer = storage.ChecksumWriter(handle)
        with NpzWriter(tp.cast(tp.BinaryIO, writer)) as npz:
            npz.write("data", (nnz,), _with_first("<f4", (rows[2] for rows in by_row(codes, seen))))
            npz.write("indices", (nnz,), _with_first("<i4", (rows[1] for rows in by_row(codes))))
            npz.write("indptr", (n_rows + 1,), _indptr(codes, index_dtype(nnz)))
            npz.write("format", (), [np.array("csr").astype("S3")])
            npz.write("shape", (2,), [np.array([n_rows, codes.n_latents], dtype="<i8")])
            for name, dtype in (("example_idx", "<i8"), ("token_idx", "<i4")):
                npz.write(name, (n_rows,), _with_first(dtype, (p.array(name) for p in codes)))
            for name, array in (extra or {}).items():
                npz.write(name, array.shape, [array])
    return storage.Listed.written(writer)


def _with_first(dtype: str, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The chunks behind an empty one, which gives the dtype if there are no chunks."""
    yield np.empty(0, dtype=dtype)
    yield from chunks


def by_row(
    codes: StoredCodes, seen: Callable[[Piece, ByRow], None] = lambda piece, rows: None
) -> Iterator[ByRow]:
    """The codes of each piece by row; before it goes on, ``seen`` is given them, too."""
    for piece in codes:
        rows = piece.columns().to_rows(piece.info.n_rows)
        seen(piece, rows)
        yield rows


def _indptr(codes: StoredCodes, dtype: np.dtype) -> Iterator[np.ndarray]:
    yield np.zeros(1, dtype=dtype)
    total = 0
    for piece in codes:
        row_nnz = np.bincount(piece.array("rows"), minlength=piece.info.n_rows)
        yield (total + np.cumsum(row_nnz)).astype(dtype)
        total += piece.info.nnz
