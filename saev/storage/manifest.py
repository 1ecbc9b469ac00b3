"""Manifests: the object that is published last in a folder lists all other objects.

That object is JSON with two additional keys:

    "files"     {name: {"n_bytes": …, "checksum": "crc32c:…", "blocks": "…"}}
    "checksum"  of the whole object's canonical JSON without this key

`blocks` holds the CRC-32C of each MiB, eight hex digits each. Only objects above one MiB have it. A
reader of a few bytes can check them without reading the whole object. The list depends on the
objects' bytes only. Objects of earlier versions have neither key and are read with one warning. An
object with only one of the two keys is damaged.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import typing as tp
from collections.abc import Iterator, Mapping

import numpy as np

from saev.errors import CorruptDataError, StorageError
from saev.once import say_once
from saev.storage.checksums import BLOCK, ChecksumWriter, crc32c, format_checksum, mismatch
from saev.storage.confirming import Bytes, confirmed
from saev.storage.hashes import canonical_json
from saev.storage.looking import exists
from saev.storage.parsing import parse_json
from saev.storage.ranges import RangeReader
from saev.storage.reading import read_bytes, read_json, read_parsed
from saev.storage.stored import is_file_name
from saev.storage.urls import join, normalize

logger = logging.getLogger(__name__)

FILES, CHECKSUM = "files", "checksum"
_SUM = re.compile(r"crc32c:[0-9a-f]{8}")
_HEX = re.compile(r"[0-9a-f]*")
_RUN = 16 << 20
"""Most bytes per read."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """Size and checksums of one object in a manifest."""

    n_bytes: int
    """Size in bytes."""
    checksum: str
    """CRC-32C of the whole object."""
    blocks: str = ""
    """CRC-32C of each MiB, eight hex digits each; empty if there is only one."""

    @classmethod
    def of(cls, data: Bytes) -> "Listed":
        """Compute from bytes."""
        writer = ChecksumWriter(tp.cast(tp.BinaryIO, _NullFile()))
        writer.write(data)
        return cls.written(writer)

    @classmethod
    def written(cls, writer: ChecksumWriter) -> "Listed":
        """Take from a writer that has written the object."""
        return cls(writer.n_bytes, writer.checksum, writer.blocks)

    @classmethod
    def whole(cls, n_bytes: tp.Any, checksum: tp.Any, source: str) -> "Listed":
        """From a stored size and checksum, without blocks. Raises CorruptDataError."""
        if isinstance(n_bytes, bool) or not isinstance(n_bytes, int) or n_bytes < 0:
            raise CorruptDataError(f"{source}: n_bytes is {n_bytes!r:.60}, expected a size.")
        if not isinstance(checksum, str) or not _SUM.fullmatch(checksum):
            raise CorruptDataError(f"{source}: checksum is {checksum!r:.60}, expected crc32c:….")
        return cls(n_bytes, checksum)

    def to_dict(self) -> dict[str, tp.Any]:
        """As plain JSON."""
        blocks = {"blocks": self.blocks} if self.blocks else {}
        return {"n_bytes": self.n_bytes, "checksum": self.checksum, **blocks}

    @classmethod
    def from_dict(cls, raw: tp.Any, source: str) -> "Listed":
        """Inverse of :meth:`to_dict`. Raises CorruptDataError."""
        if not isinstance(raw, dict) or raw.keys() - {"n_bytes", "checksum", "blocks"}:
            raise CorruptDataError(
                f"{source} is not an entry of a manifest, expected n_bytes, checksum and blocks."
            )
        found = cls.whole(raw.get("n_bytes"), raw.get("checksum"), source)
        blocks, n = raw.get("blocks", ""), found.n_bytes
        n_digits = 8 * -(-n // BLOCK) if n > BLOCK else 0
        if not isinstance(blocks, str) or len(blocks) != n_digits or not _HEX.fullmatch(blocks):
            raise CorruptDataError(f"{source}: blocks is not {n_digits} hex digits.")
        return dataclasses.replace(found, blocks=blocks)

    def error(self, url: str, data: Bytes, remedy: str) -> CorruptDataError | None:
        """The error if ``data`` is not this object; None if it is."""
        if len(data) != self.n_bytes:
            return CorruptDataError(
                f"{url} is damaged: it has {len(data)} bytes, expected {self.n_bytes}. {remedy}"
            )
        return mismatch(url, format_checksum(crc32c(data)), self.checksum, remedy)


class _NullFile(io.RawIOBase):
    def write(self, data: tp.Any) -> int:
        return len(data)


Files = Mapping[str, Listed]


# --- Sealed objects ------------------------------------------------------------------------


def seal(record: Mapping[str, tp.Any], files: Files | None = None) -> dict[str, tp.Any]:
    """``record`` with the list of its files and a checksum of both."""
    listed = {name: row.to_dict() for name, row in sorted((files or {}).items())}
    whole = {**record, FILES: listed}
    return {**whole, CHECKSUM: _content_checksum(json.loads(json.dumps(whole)))}


def unseal(raw: tp.Any, source: str, remedy: str = "") -> tuple[dict[str, tp.Any], Files | None]:
    """Inverse of :func:`seal`; the list is None if an earlier version wrote the object.

    Raises:
        CorruptDataError: it is not a JSON object, its checksum differs, or its list is invalid.
    """
    if not isinstance(raw, dict):
        raise CorruptDataError(
            f"{source} holds a {type(raw).__name__}, expected an object. {remedy}"
        )
    if FILES not in raw and CHECKSUM not in raw:
        return raw, None
    missing = [key for key in (FILES, CHECKSUM) if key not in raw]
    if missing:
        raise CorruptDataError(f"{source} is damaged: it has no {missing[0]!r}. {remedy}")
    record = {key: value for key, value in raw.items() if key != CHECKSUM}
    found = _content_checksum(record)
    if raw[CHECKSUM] != found:
        raise CorruptDataError(
            f"{source} is damaged: its content has checksum {found}, expected "
            f"{raw[CHECKSUM]!r:.60}. {remedy}"
        )
    rows = record.pop(FILES)
    if not isinstance(rows, dict):
        raise CorruptDataError(f"{source} is damaged: its list of files is invalid. {remedy}")
    files = {
        check_name(name, source): Listed.from_dict(row, f"{source}: {name:.80}")
        for name, row in rows.items()
    }
    return record, files


def _content_checksum(record: tp.Any) -> str:
    return format_checksum(crc32c(canonical_json(record).encode()))


def check_name(name: str, source: str) -> str:
    """``name``, if it names an object inside its folder. Raises CorruptDataError if not."""
    if not all(map(is_file_name, name.split("/"))) or "::" in name:
        raise CorruptDataError(f"{source} names {name!r:.80}, expected a name inside its folder.")
    return name


class Sealed(tp.NamedTuple):
    """A sealed object that was read."""

    record: dict[str, tp.Any]
    """The keys that were given to :func:`seal`."""
    files: Files | None
    """The list of files; None if an earlier version wrote the object."""
    listed: Listed
    """Size and checksum of the object itself, for the manifest of its folder."""


def read_sealed(url: str | os.PathLike, *, remedy: str = "") -> Sealed:
    """Read an object made by :func:`seal`, or by an earlier version that did not seal it.

    Raises:
        CorruptDataError: it is damaged.
        StorageError: it is missing or cannot be read.
    """
    place = normalize(url)

    def parse(data: bytes) -> Sealed:
        record, files = unseal(parse_json(data, place), place, remedy)
        return Sealed(record, files, Listed.of(data))

    return read_parsed(place, parse)


def find_sealed(url: str | os.PathLike, *, remedy: str = "") -> Sealed | None:
    """:func:`read_sealed`, but None if the object is missing. One request."""
    try:
        return read_sealed(url, remedy=remedy)
    except StorageError as err:
        if isinstance(err.__cause__, FileNotFoundError):
            return None
        raise


# --- Folders -------------------------------------------------------------------------------


class Folder:
    """A published folder. Objects are compared with the manifest when they are read.

    Args:
        url: the folder.
        closing: name of the object that was published last.
        sealed: its content.
        remedy: a sentence for errors about damage.
    """

    def __init__(self, url: str, closing: str, sealed: Sealed, remedy: str = ""):
        self.url = url
        self.closing = closing
        self.record = sealed.record
        """Keys of the closing object."""
        self.files = sealed.files
        """The manifest; None if an earlier version published the folder."""
        self.checksum = sealed.listed.checksum
        """Checksum of the closing object."""
        self._remedy = remedy

    def warn_if_unlisted(self) -> None:
        """Warn once per process that an earlier version published this folder."""
        if self.files is None:
            say_once(
                logger,
                f"{self.url} was published by an earlier version, whose {self.closing} does not "
                "list checksums of all files. Only the checksums that it recorded are checked. "
                "(This is said once; other folders may be like it.)",
                key=self.closing,
            )

    @classmethod
    def open(cls, url: str | os.PathLike, closing: str, remedy: str = "") -> "Folder":
        """Read the closing object. Warns once if an earlier version wrote it.

        Raises:
            CorruptDataError: it is damaged.
            StorageError: it is missing or cannot be read.
        """
        place = normalize(url)
        folder = cls(place, closing, read_sealed(join(place, closing), remedy=remedy), remedy)
        folder.warn_if_unlisted()
        return folder

    @classmethod
    def unlisted(cls, url: str | os.PathLike, closing: str, remedy: str = "") -> "Folder":
        """A folder without a manifest, whose objects are not checked."""
        return cls(normalize(url), closing, Sealed({}, None, Listed(0, "")), remedy)

    def has(self, name: str) -> bool:
        """Whether the folder has an object, by the manifest, or by storage if there is none."""
        if self.files is not None:
            return name in self.files
        return exists(join(self.url, name))

    def listed(self, name: str) -> Listed | None:
        """The manifest's entry of an object; None if there is no manifest.

        Raises:
            CorruptDataError: the manifest does not list the object.
        """
        if self.files is None:
            return None
        if name not in self.files:
            raise CorruptDataError(
                f"{join(self.url, name)} is not listed in {self.closing}, so it does not belong "
                f"to the folder. {self._remedy}"
            )
        return self.files[name]

    def read_bytes(self, name: str) -> bytes:
        """A whole object.

        Raises:
            CorruptDataError: it is missing or damaged.
        """
        place, listed = join(self.url, name), self.listed(name)
        if listed is None:
            return read_bytes(place)
        with self._missing_is_damage(place):
            return read_listed(place, listed, self._remedy)

    def read_json(self, name: str) -> tp.Any:
        """A whole object as JSON."""
        if self.files is None:
            return read_json(join(self.url, name))
        return parse_json(self.read_bytes(name), join(self.url, name))

    def reader(self, name: str) -> "RangeReader | CheckedReader":
        """A reader of ranges of an object, which checks every MiB."""
        place, listed = join(self.url, name), self.listed(name)
        if listed is None:
            return RangeReader(place)
        with self._missing_is_damage(place):
            return CheckedReader(place, listed, self._remedy)

    @contextlib.contextmanager
    def _missing_is_damage(self, place: str) -> Iterator[None]:
        """Turn the error for a missing object into CorruptDataError, because it is listed."""
        try:
            yield
        except StorageError as err:
            if exists(place):
                raise
            raise CorruptDataError(
                f"{place} is missing; {self.closing} lists it. {self._remedy}"
            ) from err


def read_listed(url: str | os.PathLike, listed: Listed, remedy: str = "") -> bytes:
    """Read a whole object that a manifest lists. Raises CorruptDataError if it differs."""
    place = normalize(url)
    return confirmed(
        place,
        lambda fresh: read_bytes(place, fresh=fresh),
        lambda data: listed.error(place, data, remedy),
    )


def read_verified(url: str | os.PathLike, checksum: str, remedy: str = "") -> bytes:
    """Read a whole object. Raises CorruptDataError if its checksum is not the given one."""
    place = normalize(url)
    return confirmed(
        place,
        lambda fresh: read_bytes(place, fresh=fresh),
        lambda data: mismatch(place, format_checksum(crc32c(data)), checksum, remedy),
    )


class CheckedReader:
    """:class:`RangeReader` of a listed object, which checks all bytes that it returns.

    Args:
        url: the object.
        listed: the manifest's entry.
        remedy: a sentence for errors about damage.

    Raises:
        CorruptDataError: the size differs.
    """

    def __init__(self, url: str, listed: Listed, remedy: str = ""):
        self.url = normalize(url)
        self._reader = RangeReader(self.url)
        self._remedy = remedy
        self.size = self._reader.size
        if self.size != listed.n_bytes:
            raise CorruptDataError(
                f"{self.url} is damaged: it has {self.size} bytes, expected {listed.n_bytes}. "
                f"{remedy}"
            )
        hexes = listed.blocks or (listed.checksum.removeprefix("crc32c:") if self.size else "")
        self._sums = np.frombuffer(bytes.fromhex(hexes), dtype=">u4").astype(np.uint32)
        self._last: tuple[int, bytes] = (-1, b"")

    def readinto(self, offset: int, buffer: tp.Any) -> None:
        """See :meth:`RangeReader.readinto`. Reads and checks whole blocks of 1 MiB."""
        view = memoryview(buffer).cast("B")
        self._check_inside(offset, view.nbytes)
        done = 0
        while done < view.nbytes:
            block, skip = divmod(offset + done, BLOCK)
            left = view.nbytes - done
            if skip == 0 and (left >= BLOCK or offset + view.nbytes == self.size):
                n = left if offset + view.nbytes == self.size else left // BLOCK * BLOCK
                n = min(n, _RUN)
                self._fill(block, view[done : done + n])
            else:
                data = self._block(block)
                n = min(left, len(data) - skip)
                view[done : done + n] = data[skip : skip + n]
            done += n

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""
        self._check_inside(offset, length)
        buffer = bytearray(length)
        self.readinto(offset, buffer)
        return bytes(buffer)

    def _check_inside(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise CorruptDataError(
                f"{self.url}: bytes {offset}-{offset + length} were asked for, it has "
                f"{self.size}. {self._remedy}"
            )

    def _block(self, number: int) -> bytes:
        last = self._last  # one tuple: threads must not see the number of another block
        if last[0] != number:
            buffer = bytearray(min(BLOCK, self.size - number * BLOCK))
            self._fill(number, memoryview(buffer))
            last = self._last = (number, bytes(buffer))
        return last[1]

    def _fill(self, first: int, view: memoryview) -> None:
        """Read whole blocks from number ``first`` on, and check them."""

        def read(fresh: bool) -> memoryview:
            (self._reader.reread if fresh else self._reader.readinto)(first * BLOCK, view)
            return view

        confirmed(self.url, read, lambda data: self._error(first, data))

    def _error(self, first: int, view: memoryview) -> CorruptDataError | None:
        for i in range(-(-view.nbytes // BLOCK)):
            found, want = crc32c(view[i * BLOCK : (i + 1) * BLOCK]), int(self._sums[first + i])
            if found != want:
                start = (first + i) * BLOCK
                return CorruptDataError(
                    f"{self.url} is damaged: bytes {start} to {min(start + BLOCK, self.size)} have "
                    f"checksum {format_checksum(found)}, expected {format_checksum(want)}. "
                    f"{self._remedy}"
                )
        return None

    def close(self) -> None:
        """Release the descriptor. May be called twice."""
        self._reader.close()

    def __enter__(self) -> "CheckedReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
