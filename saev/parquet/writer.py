"""Writes tables in row groups that hold all rows of a key."""

import io
import typing as tp

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saev import storage
from saev.parquet.index import FileEntry, Group, Span, TableEntry

GROUP_ROWS = 1 << 16
"""A row group ends with the first key at which it has this number of rows or more. Elements of
lists count as rows."""
SPLIT_ROWS = 1 << 20
"""A key with more rows is cut into row groups of this size."""
MAX_GROUPS = 128
"""Most row groups of a file."""
MAX_BYTES = 120 << 20
"""A file of this size gets no further row group. A row group has a few MB at most, so a file stays
below 128 MiB."""


class TableWriter:
    """Writes rows that are sorted by a key, into one or several files.

    The ends of row groups and files depend on the rows, not on how they are divided among calls.

    Args:
        folder: URL.
        name: of the table; its files are `NAME.parquet`, `NAME-001.parquet`, ….
        schema: columns. Lists may not hold lists.
        key: column of integers by which the rows are sorted.
        group_rows: in place of GROUP_ROWS.
    """

    def __init__(
        self, folder: str, name: str, schema: pa.Schema, key: str, group_rows: int | None = None
    ):
        self._folder, self._name, self._schema, self._key = folder, name, schema, key
        self._group_rows = group_rows or GROUP_ROWS
        self._pending: list[pa.Table] = []
        self._weight = 0
        self._files: list[FileEntry] = []
        self._open: _File | None = None
        self.listed: dict[str, storage.Listed] = {}
        """Size and checksums of each file that is complete."""

    def write(self, rows: tp.Mapping[str, tp.Any] | pa.Table) -> None:
        """Append rows: a table, or columns by name, each an array or a list of values."""
        table = self._table(rows)
        if not len(table):
            return
        self._pending.append(table)
        self._weight += int(_weights(table).sum())
        if self._weight >= 2 * self._group_rows:
            self._flush(last=False)

    def close(self) -> TableEntry:
        """Write the remaining rows. A table without rows is one file without row groups."""
        self._flush(last=True)
        if self._open is None and not self._files:
            self._open = self._start()
        self._finish_file()
        return TableEntry(self._key, tuple(self._files))

    def __enter__(self) -> tp.Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: tp.Any
    ) -> None:
        if self._open is not None:
            self._open.abort(error or RuntimeError("the table was not closed"))

    def _table(self, rows: tp.Mapping[str, tp.Any] | pa.Table) -> pa.Table:
        if isinstance(rows, pa.Table):
            return rows.select(self._schema.names).cast(self._schema)
        arrays = []
        for field in self._schema:
            found = rows[field.name]
            is_array = isinstance(found, pa.Array)
            arrays.append(found.cast(field.type) if is_array else pa.array(found, field.type))
        return pa.Table.from_arrays(arrays, schema=self._schema)

    def _flush(self, *, last: bool) -> None:
        if not self._pending:
            return
        table = pa.concat_tables(self._pending)
        keys = table[self._key].to_numpy()
        weights = _weights(table)
        total = np.concatenate([[0], np.cumsum(weights)])
        starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
        # The next call may have more rows of the last key.
        ends = np.r_[starts[1:], len(keys)] if last else starts[1:]
        done = 0
        for start, end in zip(starts, ends, strict=False):
            if end - start > SPLIT_ROWS:
                self._group(table, done, int(start))
                for cut in range(start, end, SPLIT_ROWS):
                    self._group(table, int(cut), int(min(cut + SPLIT_ROWS, end)))
                done = end
            elif total[end] - total[done] >= self._group_rows:
                self._group(table, done, end)
                done = end
        if last:
            self._group(table, done, len(keys))
            done = len(keys)
        rest = table.slice(done)
        self._pending = [rest] if len(rest) else []
        self._weight = int(total[-1] - total[done])

    def _group(self, table: pa.Table, start: int, stop: int) -> None:
        if stop <= start:
            return
        if self._open is None:
            self._open = self._start()
        self._open.write(table.slice(start, stop - start))
        if len(self._open.groups) >= MAX_GROUPS or self._open.n_bytes >= MAX_BYTES:
            self._finish_file()

    def _start(self) -> "_File":
        number = len(self._files)
        suffix = f"-{number:03d}" if number else ""
        name = f"{self._name}{suffix}.parquet"
        return _File(storage.join(self._folder, name), self._schema, self._key)

    def _finish_file(self) -> None:
        if self._open is None:
            return
        file, self._open = self._open, None
        entry, listed = file.close()
        self._files.append(entry)
        self.listed[entry.name] = listed


def _weights(table: pa.Table) -> np.ndarray:
    """The weight of each row, int64 [n]: the number of elements of its longest list, at least 1."""
    weights = np.ones(len(table), dtype=np.int64)
    for column in table.columns:
        if pa.types.is_list(column.type):
            lengths = pc.fill_null(pc.list_value_length(column), 0)
            weights = np.maximum(weights, lengths.to_numpy())
    return weights


class _File:
    """One file that is being written."""

    def __init__(self, url: str, schema: pa.Schema, key: str):
        self._name, self._key = storage.name(url), key
        self._context = storage.open_write(url)
        self._sink = _Sink(self._context.__enter__())
        self._writer = pq.ParquetWriter(self._sink, schema, **_options(schema, key))
        self._sink.cut()
        self.groups: list[Group] = []

    @property
    def n_bytes(self) -> int:
        """Bytes so far."""
        return self._sink.checksums.n_bytes

    def write(self, table: pa.Table) -> None:
        """Write one row group."""
        keys = table[self._key].to_numpy()
        self._writer.write_table(table, row_group_size=max(1, len(table)))
        span = self._sink.cut()
        self.groups.append(Group(int(keys[0]), int(keys[-1]), len(table), *span))

    def close(self) -> tuple[FileEntry, storage.Listed]:
        """Write the footer and publish the file."""
        try:
            self._writer.close()
            footer = self._sink.cut()
            listed = storage.Listed.written(self._sink.checksums)
        except BaseException as err:
            self.abort(err)
            raise
        self._context.__exit__(None, None, None)
        return FileEntry(self._name, listed.n_bytes, footer, tuple(self.groups)), listed

    def abort(self, error: BaseException) -> None:
        """Close without publishing anything."""
        self._sink.drop()
        self._writer.close()
        self._context.__exit__(type(error), error, error.__traceback__)


class _Sink(io.RawIOBase):
    """Takes the bytes that pyarrow writes, and divides them into spans with checksums."""

    def __init__(self, handle: tp.BinaryIO):
        self._handle = handle
        self.checksums = storage.ChecksumWriter(handle)
        self._start, self._crc, self._dropped = 0, 0, False

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.checksums.n_bytes

    def write(self, data: tp.Any) -> int:
        view = memoryview(data).cast("B")
        if not self._dropped:
            self.checksums.write(view)
            self._crc = storage.crc32c(view, self._crc)
        return view.nbytes

    def drop(self) -> None:
        """Ignore all further bytes."""
        self._dropped = True

    def cut(self) -> Span:
        """The bytes since the last cut."""
        span = Span(self._start, self.checksums.n_bytes - self._start, self._crc)
        self._start, self._crc = self.checksums.n_bytes, 0
        return span


def _options(schema: pa.Schema, key: str) -> dict[str, tp.Any]:
    """Options of pyarrow. Integers are stored as packed differences, all other values plain."""
    encodings = {}
    for field in schema:
        is_list = pa.types.is_list(field.type)
        kind = field.type.value_type if is_list else field.type
        path = f"{field.name}.list.element" if is_list else field.name
        is_packed = pa.types.is_int32(kind) or pa.types.is_int64(kind)
        encodings[path] = "DELTA_BINARY_PACKED" if is_packed else "PLAIN"
    return {
        "compression": "zstd",
        "use_dictionary": False,
        "column_encoding": encodings,
        "write_statistics": [key],
    }
