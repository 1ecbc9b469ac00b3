"""Whole objects and streams."""

import contextlib
import json
import os
import typing as tp
from collections.abc import Iterator

from saev.errors import CorruptDataError
from saev.storage.faults import explained, retry_reads
from saev.storage.urls import filesystem, local_path, normalize


def read_bytes(url: str | os.PathLike) -> bytes:
    """A whole object."""
    text = normalize(url)
    path = local_path(text)
    with explained(text, "read"):
        if path is not None:
            return path.read_bytes()
        fs, key = filesystem(text)
        return retry_reads(fs.cat_file)(key)


def read_text(url: str | os.PathLike) -> str:
    """A whole object as UTF-8. Raises CorruptDataError if it is not text."""
    try:
        return read_bytes(url).decode("utf-8")
    except UnicodeDecodeError as err:
        raise CorruptDataError(f"{normalize(url)} is not UTF-8 text ({err}).") from err


def read_json(url: str | os.PathLike) -> tp.Any:
    """A whole object as JSON. Raises CorruptDataError if it does not parse."""
    try:
        return json.loads(read_text(url))
    except json.JSONDecodeError as err:
        raise CorruptDataError(
            f"{normalize(url)} is not valid JSON ({err}); it may be truncated."
        ) from err


@contextlib.contextmanager
def open_read(url: str | os.PathLike) -> Iterator[tp.BinaryIO]:
    """A seekable binary file, for libraries that want one."""
    text = normalize(url)
    with explained(text, "read"):
        path = local_path(text)
        if path is not None:
            handle: tp.BinaryIO = path.open("rb")
        else:
            fs, key = filesystem(text)
            handle = tp.cast(tp.BinaryIO, fs.open(key, "rb"))
    with handle:
        yield handle
