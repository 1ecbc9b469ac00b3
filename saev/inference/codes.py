"""Sparse codes in pieces: how one shard's latent values wait on storage for `finish`.

A piece covers consecutive tokens and is kept by column (latent), like `scipy.sparse.csc_array`:
statistics, top examples and concept alignment all ask for one latent's values, and a block of
latents is then one contiguous range of bytes. `token_acts.npz` is by row; each piece is turned
while it is copied there.
"""

import concurrent.futures
import dataclasses
import itertools
import typing as tp
from collections.abc import Iterator

import numpy as np
import pydantic
import scipy.sparse

from saev import storage
from saev.config.base import Config, FileName
from saev.errors import CorruptDataError

_READERS = 8
"""Pieces that are read at once."""

T = tp.TypeVar("T")


class TokenRows(tp.NamedTuple):
    """Which tokens the rows of some codes are."""

    example_idx: np.ndarray
    """Example of each row, int64 [n_rows], ascending."""
    token_idx: np.ndarray
    """Content token of each row, int32 [n_rows]; -1 for the class token."""
    label: np.ndarray
    """Label of each row, int16 [n_rows]; -1 if it has none."""

    @classmethod
    def concatenate(cls, parts: tp.Sequence["TokenRows"]) -> "TokenRows":
        """One after another."""
        return cls(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


class Columns(tp.NamedTuple):
    """Sparse values of a piece, by latent."""

    indptr: np.ndarray
    """Where each latent's entries begin, int64 [d_sae + 1]."""
    rows: np.ndarray
    """Row of each entry, int32 [nnz], ascending within a latent."""
    values: np.ndarray
    """Value of each entry, float32 [nnz]; never 0."""

    @classmethod
    def from_rows(
        cls, row_nnz: np.ndarray, latents: np.ndarray, values: np.ndarray, n_latents: int
    ) -> "Columns":
        """Turn row-wise codes.

        Args:
            row_nnz: entries per row, [n_rows].
            latents: latent of each entry, [nnz], rows one after another.
            values: value of each entry, [nnz].
            n_latents: number of columns.
        """
        indptr = np.concatenate([[0], np.cumsum(row_nnz)])
        by_row = scipy.sparse.csr_array(
            (values.astype(np.float32, copy=False), latents.astype(np.int32, copy=False), indptr),
            shape=(len(row_nnz), n_latents),
        )
        by_column = by_row.tocsc()
        return cls(
            by_column.indptr.astype(np.int64, copy=False),
            by_column.indices.astype(np.int32, copy=False),
            by_column.data,
        )

    def to_rows(self, n_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Entries per row int64 [n_rows], latents int32 [nnz] ascending in a row, values [nnz]."""
        return self._by_row(n_rows, self.values)

    def row_order(self, n_rows: int) -> np.ndarray:
        """The entries' positions, by row, then by latent, int32 [nnz]."""
        return self._by_row(n_rows, np.arange(len(self.rows), dtype=np.int32))[2]

    def _by_row(self, n_rows: int, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shape = (n_rows, len(self.indptr) - 1)
        by_row = scipy.sparse.csc_array((values, self.rows, self.indptr), shape=shape).tocsr()
        return (
            np.diff(by_row.indptr).astype(np.int64, copy=False),
            by_row.indices.astype(np.int32, copy=False),
            by_row.data,
        )

    def select(self, latents: np.ndarray) -> "Columns":
        """The columns of a few latents, in the order given."""
        spans = [slice(self.indptr[j], self.indptr[j + 1]) for j in latents]
        lengths = [span.stop - span.start for span in spans]
        return Columns(
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([self.rows[:0], *(self.rows[span] for span in spans)]),
            np.concatenate([self.values[:0], *(self.values[span] for span in spans)]),
        )

    def where(self, is_wanted: np.ndarray) -> "Columns":
        """The entries of some rows, whose numbers stay; ``is_wanted`` is bool [n_rows]."""
        keep = is_wanted[self.rows]
        before = np.concatenate([[0], np.cumsum(keep)])
        return Columns(before[self.indptr], self.rows[keep], self.values[keep])

    @property
    def counts(self) -> np.ndarray:
        """Entries per latent, int64 [d_sae]."""
        return np.diff(self.indptr)

    @property
    def latents(self) -> np.ndarray:
        """Latent of each entry, int64 [nnz]."""
        return np.repeat(np.arange(len(self.indptr) - 1), self.counts)


class PieceInfo(Config):
    """Where a piece lies in its file."""

    offset: int = pydantic.Field(ge=0)
    """First byte."""
    n_rows: int = pydantic.Field(ge=0)
    """Tokens."""
    nnz: int = pydantic.Field(ge=0)
    """Entries."""


class CodesInfo(Config):
    """A file of pieces."""

    name: FileName
    """Object name, beside the record that holds this."""
    n_latents: int = pydantic.Field(ge=0)
    """Columns."""
    n_bytes: int = pydantic.Field(ge=0)
    """Size."""
    checksum: str
    """CRC-32C of the file."""
    blocks: str = ""
    """CRC-32C of each MiB of it, eight hex digits each, if there is more than one."""
    pieces: tuple[PieceInfo, ...]
    """In dataset order."""
    by_image: bool = False
    """Whether rows are images, whose entries have a largest and a mean value."""

    @property
    def has_blocks(self) -> bool:
        """Whether parts of the file can be checked; an earlier version had one checksum for all."""
        return bool(self.blocks) or self.n_bytes <= storage.BLOCK

    @property
    def n_rows(self) -> int:
        """Tokens in the file."""
        return sum(piece.n_rows for piece in self.pieces)

    @property
    def nnz(self) -> int:
        """Entries in the file."""
        return sum(piece.nnz for piece in self.pieces)


@dataclasses.dataclass(frozen=True)
class _Field:
    name: str
    dtype: np.dtype
    offset: int
    count: int


def _fields(piece: PieceInfo, n_latents: int, *, by_image: bool) -> dict[str, _Field]:
    """Arrays of a piece, in file order; widest first, so that all are aligned."""
    layout = [
        ("indptr", "<i8", n_latents + 1), ("example_idx", "<i8", piece.n_rows),
        ("rows", "<i4", piece.nnz), ("values", "<f4", piece.nnz),
    ]  # fmt: skip
    if by_image:
        layout += [("means", "<f4", piece.nnz)]
    else:
        layout += [("token_idx", "<i4", piece.n_rows), ("label", "<i2", piece.n_rows)]
    fields, offset = {}, piece.offset
    for name, dtype, count in layout:
        fields[name] = _Field(name, np.dtype(dtype), offset, count)
        offset += np.dtype(dtype).itemsize * count
    return fields


class CodesWriter:
    """Appends pieces to an open file.

    Args:
        handle: from `storage.open_write`.
        name: object name, for the record.
        n_latents: columns of every piece.
        by_image: whether rows are images.
    """

    def __init__(self, handle: tp.BinaryIO, name: str, n_latents: int, *, by_image: bool = False):
        self._writer = storage.ChecksumWriter(handle)
        self._name, self._n_latents, self._by_image = name, n_latents, by_image
        self._pieces: list[PieceInfo] = []

    def append(self, columns: Columns, tokens: TokenRows) -> None:
        """Write one piece of tokens."""
        self._append({**columns._asdict(), **tokens._asdict()})

    def append_images(self, columns: Columns, means: np.ndarray, example_idx: np.ndarray) -> None:
        """Write one piece of images; see :class:`saev.inference.images.ImageActs`."""
        self._append({**columns._asdict(), "means": means, "example_idx": example_idx})

    def _append(self, arrays: tp.Mapping[str, np.ndarray]) -> None:
        piece = PieceInfo(
            offset=self._writer.n_bytes,
            n_rows=len(arrays["example_idx"]),
            nnz=len(arrays["values"]),
        )
        for field in _fields(piece, self._n_latents, by_image=self._by_image).values():
            self._writer.write(np.ascontiguousarray(arrays[field.name], dtype=field.dtype))
        self._pieces.append(piece)

    def info(self) -> CodesInfo:
        """What was written."""
        return CodesInfo(
            name=self._name,
            n_latents=self._n_latents,
            n_bytes=self._writer.n_bytes,
            checksum=self._writer.checksum,
            blocks=self._writer.blocks,
            pieces=tuple(self._pieces),
            by_image=self._by_image,
        )


class Piece:
    """One piece of a stored file; arrays are read when they are asked for."""

    def __init__(
        self,
        reader: storage.RangeReader | storage.CheckedReader,
        info: PieceInfo,
        n_latents: int,
        *,
        by_image: bool = False,
    ):
        self.info = info
        self._reader = reader
        self._fields = _fields(info, n_latents, by_image=by_image)
        self._n_latents = n_latents

    def array(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements ``start:stop`` of an array of the piece."""
        field = self._fields[name]
        stop = field.count if stop is None else stop
        if not 0 <= start <= stop <= field.count:
            raise CorruptDataError(
                f"{self._reader.url}: entries {start}:{stop} of {name} were asked for, which "
                f"has {field.count}. Delete the folder and run the same command again."
            )
        out = np.empty(stop - start, dtype=field.dtype)
        if out.size:
            self._reader.readinto(field.offset + start * field.dtype.itemsize, out)
        return out

    def columns(self, start: int = 0, stop: int | None = None) -> Columns:
        """Latents ``start:stop``."""
        stop = self._n_latents if stop is None else stop
        indptr = self.array("indptr", start, stop + 1)
        first, last = int(indptr[0]), int(indptr[-1])
        return Columns(
            indptr - first, self.array("rows", first, last), self.array("values", first, last)
        )


class StoredCodes:
    """The pieces of several files, in order.

    Args:
        place: URL of the folder that holds the files.
        infos: the files, in dataset order.
    """

    def __init__(self, place: str, infos: tp.Sequence[CodesInfo]):
        self._place = place
        self.infos = tuple(infos)

    @property
    def n_latents(self) -> int:
        """Columns."""
        return self.infos[0].n_latents if self.infos else 0

    @property
    def n_rows(self) -> int:
        """Tokens."""
        return sum(info.n_rows for info in self.infos)

    @property
    def nnz(self) -> int:
        """Entries."""
        return sum(info.nnz for info in self.infos)

    def __iter__(self) -> Iterator[Piece]:
        for info in self.infos:
            with self._open(info) as reader:
                for piece in info.pieces:
                    yield Piece(reader, piece, info.n_latents, by_image=info.by_image)

    def map(self, read: tp.Callable[[Piece], T]) -> Iterator[T]:
        """``read`` of every piece, in order; a few at a time, to hide the storage's latency."""

        def task(info: CodesInfo, piece: PieceInfo) -> T:
            with self._open(info) as reader:
                return read(Piece(reader, piece, info.n_latents, by_image=info.by_image))

        pieces = ((info, piece) for info in self.infos for piece in info.pieces)
        with concurrent.futures.ThreadPoolExecutor(_READERS, "saev-codes") as pool:
            while window := list(itertools.islice(pieces, _READERS)):
                yield from [
                    future.result() for future in [pool.submit(task, *pair) for pair in window]
                ]

    def _open(self, info: CodesInfo) -> storage.RangeReader | storage.CheckedReader:
        place = storage.join(self._place, storage.check_name(info.name, self._place))
        if not info.has_blocks:
            return storage.RangeReader(place)
        remedy = _remedy(info)
        listed = {"n_bytes": info.n_bytes, "checksum": info.checksum}
        if info.blocks:
            listed["blocks"] = info.blocks
        return storage.CheckedReader(place, storage.Listed.from_dict(listed, place), remedy)

    def verify(self) -> None:
        """Compare every file with its record. Of files with checksums of blocks only the size is
        compared, because their bytes are compared whenever they are read.

        Raises:
            CorruptDataError: names the first file that differs.
        """
        for info in self.infos:
            place = storage.join(self._place, storage.check_name(info.name, self._place))
            size = storage.size(place)
            if size != info.n_bytes:
                raise CorruptDataError(
                    f"{place} is damaged: it has {size} bytes, expected {info.n_bytes}. "
                    f"{_remedy(info)}"
                )
            if not info.has_blocks:  # of an earlier version
                storage.verify(place, info.checksum, _remedy(info))


def _remedy(info: CodesInfo) -> str:
    return f"Delete its record ({info.name.split('.')[0]}.json) and run the same command again."
