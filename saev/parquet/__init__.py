"""Parquet tables whose rows of one key are found with two small reads.

A folder of tables has Parquet files and `tables.json`. This list says which keys each row group
holds and where its bytes are. It is read once. Then the rows of one key need two reads, in a table
of any size: the file's footer and the row group. Other Parquet readers open the files, too.
docs/formats.md describes the tables.
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
