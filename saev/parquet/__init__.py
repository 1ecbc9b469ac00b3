"""Parquet tables that are read by range, and the list of them.

A folder of tables has Parquet files and `tables.json`, which says for each row group which keys it
holds and where its bytes are. So one key of a table of any size is one list, which is kept, and two
small reads. Any Parquet reader opens the files, too. docs/formats.md describes them.
"""

from saev.parquet import schema
from saev.parquet.index import TABLES, FileEntry, Group, Index, TableEntry
from saev.parquet.reader import Tables
from saev.parquet.writer import TableWriter

__all__ = [
    "TABLES",
    "FileEntry",
    "Group",
    "Index",
    "TableEntry",
    "TableWriter",
    "Tables",
    "schema",
]
