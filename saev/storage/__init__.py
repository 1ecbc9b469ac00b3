"""The only package that opens files: URLs, ranged reads, atomic publishing, checksums, retries.

Every location is a URL. A bare path means ``file://``. No function assumes that the storage has
rename, append, mmap or locks. An object appears whole, under its final name, when its writer
succeeds, or not at all.

Local files use POSIX calls (``preadv``, write to a temporary file + fsync + rename) behind the same
functions. Other schemes use fsspec, except for ranges of S3 objects (:mod:`saev.storage.s3`).
"""

from saev.errors import CorruptDataError, StorageError
from saev.storage.cache import NodeCache
from saev.storage.cache import from_environment as node_cache
from saev.storage.checksums import BLOCK, ChecksumWriter, checksum, crc32c, format_checksum, verify
from saev.storage.combining import concatenate
from saev.storage.confirming import confirmed
from saev.storage.creating import create
from saev.storage.deleting import (
    check_writable,
    clean_temporary,
    clean_up,
    delete,
    remove_empty,
    remove_temporary,
)
from saev.storage.faults import is_passing
from saev.storage.hashes import canonical_json, content_hash
from saev.storage.looking import (
    Entry,
    Object,
    exists,
    glob,
    is_dir,
    list_dir,
    size,
    told_of_files,
    walk,
)
from saev.storage.manifest import (
    CheckedReader,
    Folder,
    Listed,
    Sealed,
    check_name,
    find_sealed,
    read_listed,
    read_sealed,
    read_verified,
    seal,
)
from saev.storage.parsing import fits, npy_header, parse_json, parse_tensors, parse_toml, parsed
from saev.storage.ranges import RangeFile, RangeReader
from saev.storage.reading import open_read, read_bytes, read_json, read_parsed, read_text
from saev.storage.stored import check_closed, inside, is_below, is_file_name, recorded_folder
from saev.storage.urls import TMP_PREFIX, is_url, join, local_path, name, normalize, parent
from saev.storage.writing import (
    PositionalWriter,
    json_bytes,
    open_write,
    open_write_at,
    write_bytes,
    write_json,
    write_text,
)

__all__ = [
    "BLOCK",
    "TMP_PREFIX",
    "CheckedReader",
    "ChecksumWriter",
    "CorruptDataError",
    "Entry",
    "Folder",
    "Listed",
    "NodeCache",
    "Object",
    "PositionalWriter",
    "RangeFile",
    "RangeReader",
    "Sealed",
    "StorageError",
    "canonical_json",
    "check_closed",
    "check_name",
    "check_writable",
    "checksum",
    "clean_temporary",
    "clean_up",
    "concatenate",
    "confirmed",
    "content_hash",
    "crc32c",
    "create",
    "delete",
    "exists",
    "find_sealed",
    "fits",
    "format_checksum",
    "glob",
    "inside",
    "is_below",
    "is_dir",
    "is_file_name",
    "is_passing",
    "is_url",
    "join",
    "json_bytes",
    "list_dir",
    "local_path",
    "name",
    "node_cache",
    "normalize",
    "npy_header",
    "open_read",
    "open_write",
    "open_write_at",
    "parent",
    "parse_json",
    "parse_tensors",
    "parse_toml",
    "parsed",
    "read_bytes",
    "read_json",
    "read_listed",
    "read_parsed",
    "read_sealed",
    "read_text",
    "read_verified",
    "recorded_folder",
    "remove_empty",
    "remove_temporary",
    "seal",
    "size",
    "told_of_files",
    "verify",
    "walk",
    "write_bytes",
    "write_json",
    "write_text",
]
