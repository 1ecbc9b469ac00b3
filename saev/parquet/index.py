"""`tables.json`: which files make up a table, and where each row group's bytes are."""

import typing as tp

import numpy as np

from saev import storage
from saev.errors import CorruptDataError

TABLES = "tables.json"
VERSION = 1


class Span(tp.NamedTuple):
    """Some bytes of a file."""

    start: int
    """First byte."""
    n_bytes: int
    """Number of bytes."""
    crc: int
    """CRC-32C of these bytes."""


class Group(tp.NamedTuple):
    """One row group."""

    first: int
    """Lowest key in it."""
    last: int
    """Highest key in it."""
    n_rows: int
    """Number of rows."""
    start: int
    """First byte of its pages."""
    n_bytes: int
    """Bytes of its pages."""
    crc: int
    """CRC-32C of these bytes."""

    @property
    def span(self) -> Span:
        """The bytes of its pages."""
        return Span(self.start, self.n_bytes, self.crc)


class FileEntry(tp.NamedTuple):
    """One Parquet file of a table."""

    name: str
    """Object name."""
    n_bytes: int
    """Size of the file."""
    footer: Span
    """The bytes from the end of the last page to the end of the file."""
    groups: tuple[Group, ...]
    """The row groups in the order of the file, which is the order of the keys."""


class TableEntry(tp.NamedTuple):
    """One table."""

    key: str
    """The column by which the rows are sorted."""
    files: tuple[FileEntry, ...]
    """The files in the order of the keys."""

    @property
    def n_rows(self) -> int:
        """Rows of all files."""
        return sum(group.n_rows for file in self.files for group in file.groups)

    def holding(self, key: int) -> list[tuple[FileEntry, int]]:
        """The row groups that may hold a key: the file and the number of the group in it."""
        return [
            (file, number)
            for file in self.files
            for number, group in enumerate(file.groups)
            if group.first <= key <= group.last
        ]


class Index(tp.NamedTuple):
    """Content of `tables.json`."""

    tables: dict[str, TableEntry]
    """The tables by name."""
    facts: dict[str, tp.Any]
    """Facts about all tables, for example the bins of histograms."""

    def to_dict(self) -> dict[str, tp.Any]:
        """As plain JSON."""
        tables = {
            name: {
                "key": table.key,
                "n_rows": table.n_rows,
                "files": [
                    {"name": f.name, "n_bytes": f.n_bytes, "footer": list(f.footer),
                     "groups": [list(group) for group in f.groups]}
                    for f in table.files
                ],
            }
            for name, table in sorted(self.tables.items())
        }  # fmt: skip
        return {"version": VERSION, "tables": tables, "facts": self.facts}

    @classmethod
    def from_dict(cls, raw: tp.Mapping[str, tp.Any], source: str, remedy: str) -> "Index":
        """Inverse of :meth:`to_dict`. Raises CorruptDataError."""
        if raw.get("version") != VERSION:
            raise CorruptDataError(
                f"{source} has version {raw.get('version')!r:.20}, expected {VERSION}: another "
                f"version of saev wrote it. {remedy}"
            )
        with storage.parsed(source, "a list of tables", remedy=remedy):
            tables = {str(name): _table(entry, source) for name, entry in raw["tables"].items()}
            return cls(tables, dict(raw["facts"]))


def _table(raw: tp.Any, source: str) -> TableEntry:
    files = []
    for row in raw["files"]:
        groups = tuple(Group(*_numbers(group, 6)) for group in row["groups"])
        (n_bytes,) = _numbers([row["n_bytes"]], 1)
        footer = Span(*_numbers(row["footer"], 3))
        for start, length in [footer[:2], *((g.start, g.n_bytes) for g in groups)]:
            if start + length > n_bytes:
                raise ValueError(f"bytes {start} to {start + length} of {n_bytes}")
        files.append(FileEntry(storage.check_name(row["name"], source), n_bytes, footer, groups))
    return TableEntry(str(raw["key"]), tuple(files))


def _numbers(raw: tp.Any, n: int) -> list[int]:
    if not isinstance(raw, list) or len(raw) != n or not all(type(x) is int for x in raw):
        raise ValueError(f"{raw!r:.60} is not {n} integers")
    if min(raw) < 0 or max(raw) > np.iinfo(np.int64).max:
        raise ValueError(f"{raw!r:.60} has a number out of range")
    return raw
