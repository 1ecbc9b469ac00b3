"""Reads tables: whole ones, or the rows of one key with two small reads."""

import functools
import typing as tp

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saev import storage
from saev.errors import ConfigError, CorruptDataError
from saev.parquet.index import TABLES, FileEntry, Index, Span, TableEntry


class Tables:
    """The tables of a folder. They are read when they are asked for, and compared with checksums.

    Args:
        url: the folder.
        index: contents of `tables.json`.
        remedy: a sentence for errors about damage.
    """

    def __init__(self, url: str, index: Index, remedy: str = ""):
        self.url = url
        self.index = index
        self._remedy = remedy
        self._metadata = functools.lru_cache(maxsize=64)(self._read_metadata)

    @classmethod
    def open(cls, url: str, data: bytes, remedy: str = "") -> "Tables":
        """The tables that the bytes of a `tables.json` list.

        Raises:
            CorruptDataError: they are no list of tables.
        """
        place = storage.join(url, TABLES)
        raw = storage.parse_json(data, place)
        if not isinstance(raw, dict):
            raise CorruptDataError(f"{place} holds no list of tables. {remedy}")
        return cls(url, Index.from_dict(raw, place, remedy), remedy)

    @property
    def names(self) -> list[str]:
        """Names of the tables, sorted."""
        return sorted(self.index.tables)

    def table(self, name: str) -> TableEntry:
        """The entry of a table in the list.

        Raises:
            ConfigError: there is no such table.
        """
        if name not in self.index.tables:
            raise ConfigError(f"{self.url} has no table {name!r}; it has {', '.join(self.names)}.")
        return self.index.tables[name]

    def read(self, name: str, columns: tp.Sequence[str] | None = None) -> pa.Table:
        """A whole table, or some of its columns.

        Raises:
            ConfigError: there is no such table.
            CorruptDataError: it is damaged.
        """
        parts = [
            self.group(file, number, columns)
            for file in self.table(name).files
            for number in range(len(file.groups))
        ]
        return pa.concat_tables(parts) if parts else self._empty(name, columns)

    def rows(self, name: str, key: int, columns: tp.Sequence[str] | None = None) -> pa.Table:
        """The rows of one key, for example of one latent.

        The footer of a file is read once, then only the row groups that may hold the key.

        Raises:
            ConfigError: there is no such table.
            CorruptDataError: it is damaged.
        """
        table = self.table(name)
        wanted = columns if columns is None or table.key in columns else [*columns, table.key]
        parts = [self.group(*place, wanted) for place in table.holding(key)]
        if not parts:
            return self._empty(name, columns)
        found = pa.concat_tables(parts)
        mine = found.filter(pc.equal(found[table.key], key))
        return mine if columns is None else mine.select(list(columns))

    def schema(self, name: str) -> pa.Schema:
        """Columns of a table.

        Raises:
            ConfigError: there is no such table.
        """
        return self._metadata(self.table(name).files[0]).schema.to_arrow_schema()

    def _empty(self, name: str, columns: tp.Sequence[str] | None) -> pa.Table:
        found = self.schema(name).empty_table()
        return found if columns is None else found.select(list(columns))

    def group(
        self, file: FileEntry, number: int, columns: tp.Sequence[str] | None = None
    ) -> pa.Table:
        """One row group of a table, or some of its columns.

        Raises:
            CorruptDataError: it is damaged.
        """
        group, place = file.groups[number], storage.join(self.url, file.name)
        data = self._read(file, group.span)

        def read(start: int, n: int) -> bytes:
            first = start - group.start
            if first < 0 or first + n > len(data):
                raise ValueError(f"bytes {start} to {start + n} are not in the row group")
            return data[first : first + n]

        with storage.parsed(place, "a Parquet file", remedy=self._remedy):
            source = pa.PythonFile(storage.RangeFile(file.n_bytes, read), mode="r")
            opened = pq.ParquetFile(source, metadata=self._metadata(file), pre_buffer=False)
            return opened.read_row_group(
                number, columns=None if columns is None else list(columns), use_threads=False
            )

    def _read_metadata(self, file: FileEntry) -> pq.FileMetaData:
        footer = self._read(file, file.footer)
        place = storage.join(self.url, file.name)
        with storage.parsed(place, "a Parquet file", remedy=self._remedy):
            return pq.read_metadata(pa.BufferReader(footer))

    def _read(self, file: FileEntry, span: Span) -> bytes:
        """Read some bytes of a file and compare them with their checksum."""
        place = storage.join(self.url, storage.check_name(file.name, self.url))

        def wrong(data: memoryview) -> CorruptDataError | None:
            if storage.crc32c(data) == span.crc:
                return None
            return CorruptDataError(
                f"{place} is damaged: bytes {span.start} to {span.start + span.n_bytes} have "
                f"checksum {storage.format_checksum(storage.crc32c(data))}, expected "
                f"{storage.format_checksum(span.crc)}. {self._remedy}"
            )

        with storage.RangeReader(place, size=file.n_bytes) as reader:
            buffer = bytearray(span.n_bytes)

            def read(fresh: bool) -> memoryview:
                (reader.reread if fresh else reader.readinto)(span.start, buffer)
                return memoryview(buffer)

            return bytes(storage.confirmed(place, read, wrong))
