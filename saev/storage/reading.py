"""Reading whole objects and streams."""

import contextlib
import os
import typing as tp
from collections.abc import Callable, Iterator

from saev.errors import SaevError
from saev.storage.confirming import confirmed
from saev.storage.faults import explained, retry
from saev.storage.parsing import parse_json, parse_text
from saev.storage.ranges import RangeReader
from saev.storage.sources import cat_file
from saev.storage.urls import filesystem, local_path, normalize

T = tp.TypeVar("T")


def read_bytes(url: str | os.PathLike, *, fresh: bool = False) -> bytes:
    """A whole object.

    Args:
        url: the object.
        fresh: bypass all caches.
    """
    text = normalize(url)
    if fresh:
        with RangeReader(text) as reader:
            buffer = bytearray(reader.size)
            reader.reread(0, buffer)
            return bytes(buffer)
    path = local_path(text)
    with explained(text, "read"):
        if path is not None:
            return path.read_bytes()
        fs, key = filesystem(text)
        return retry(cat_file)(fs, key)


def read_parsed(url: str | os.PathLike, parse: Callable[[bytes], T]) -> T:
    """Read and parse a whole object. If it does not parse, it is read again, past all caches.

    Args:
        url: the object.
        parse: parses the bytes; raises a SaevError if it cannot.
    """
    text = normalize(url)
    found: list[T] = []

    def wrong(data: bytes) -> SaevError | None:
        try:
            found.append(parse(data))
        except SaevError as err:
            return err
        return None

    confirmed(text, lambda fresh: read_bytes(text, fresh=fresh), wrong)
    return found[-1]


def read_text(url: str | os.PathLike) -> str:
    """A whole object as UTF-8. Raises CorruptDataError if it is not text."""
    return read_parsed(url, lambda data: parse_text(data, url))


def read_json(url: str | os.PathLike) -> tp.Any:
    """A whole object as JSON (:func:`saev.storage.parse_json`). Raises CorruptDataError."""
    return read_parsed(url, lambda data: parse_json(data, url))


@contextlib.contextmanager
def open_read(url: str | os.PathLike) -> Iterator[tp.BinaryIO]:
    """Open a seekable binary file, for libraries that need one."""
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
