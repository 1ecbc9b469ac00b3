"""Writes the images of a report, in parts that any worker can write.

A part is a file of pictures, a file of thumbs, and a record. The record is written last, and says
where the row groups of both files are. `tables.json` joins the records of all parts.
"""

import typing as tp
from collections.abc import Callable, Iterable, Sequence

from saev import storage
from saev.errors import CorruptDataError
from saev.parquet import TABLES, Index, TableEntry, TableWriter, schema
from saev.visuals.stored import EXAMPLES, GROUP_ROWS, IMAGE_SIZE, N_NAMED, Stored

FORMAT = 1
"""Raised when pictures change, so that earlier ones are drawn again."""

_REMEDY = "Delete it and run the same command again."
_PART_IMAGES = 1024
_PART_PIXELS = 1 << 26
"""Most pixels of a part's pictures, so that its file stays below 128 MB."""


class Sheet:
    """The images of one report.

    Args:
        folder: URL of the report.
        examples: rows of `Shards.examples()`, in the order in which they are stored.
        image_size: the longest side that a picture may have, in pixels.
        key: hash of all that pictures depend on, which images they show apart.
    """

    def __init__(self, folder: str, examples: Sequence[int], image_size: int, key: str):
        self._folder, self._examples, self._image_size = folder, examples, image_size
        self._size = min(_PART_IMAGES, max(1, _PART_PIXELS // image_size**2))
        self._key = key

    @property
    def n_parts(self) -> int:
        """Number of parts."""
        return -(-len(self._examples) // self._size)

    def examples(self, part: int) -> Sequence[int]:
        """The images of a part."""
        return self._examples[part * self._size : (part + 1) * self._size]

    def find(self, part: int) -> storage.Sealed | None:
        """The record of a part; None if it is not written, or its pictures would differ now.

        Raises:
            CorruptDataError: it is damaged.
        """
        found = storage.find_sealed(self._place(part), remedy=_REMEDY)
        is_mine = found is not None and found.record.get("key") == self._part_key(part)
        return found if is_mine else None

    def write(self, part: int, images: Iterable[Stored]) -> None:
        """Write a part, its record last.

        Args:
            part: its number.
            images: as :meth:`examples` lists them.
        """
        storage.clean_temporary(self._folder)  # of a process that was killed
        with self._open(schema.PICTURES, part) as pictures, self._open(schema.THUMBS, part) as few:
            start = part * self._size
            for number, (example, image) in enumerate(
                zip(self.examples(part), images, strict=True), start
            ):
                row = {"number": [number], "example": [example]}
                sizes = {"width": [image.width], "height": [image.height]}
                pictures.write({**row, **sizes, "picture": [image.picture]})
                few.write({**row, "thumb": [image.thumb]})
            tables = {schema.PICTURES: pictures.close(), schema.THUMBS: few.close()}
        record = {"key": self._part_key(part), "index": Index(tables, {}).to_dict()}
        listed = {**pictures.listed, **few.listed}
        storage.write_json(self._place(part), storage.seal(record, listed))

    def join(
        self, n_named: int, missing: Callable[[int], Exception]
    ) -> tuple[bytes, dict[str, storage.Listed]]:
        """The text of `tables.json`, and the manifest's entries of all parts.

        Args:
            n_named: images that the results name.
            missing: the error for a part that is not written.
        """
        files: dict[str, list[tp.Any]] = {name: [] for name in GROUP_ROWS}
        listed: dict[str, storage.Listed] = {}
        for part in range(self.n_parts):
            found = self.find(part)
            if found is None:
                raise missing(part)
            place = self._place(part)
            index = Index.from_dict(found.record.get("index", {}), place, _REMEDY)
            if index.tables.keys() != files.keys():
                raise CorruptDataError(f"{place} is not of a part with pictures. {_REMEDY}")
            for name, table in index.tables.items():
                files[name] += table.files
            listed |= {storage.name(place): found.listed, **(found.files or {})}
        tables = {name: TableEntry("number", tuple(rows)) for name, rows in files.items()}
        facts = {
            EXAMPLES: [int(e) for e in self._examples],
            N_NAMED: n_named,
            IMAGE_SIZE: self._image_size,
        }
        text = storage.canonical_json(Index(tables, facts).to_dict()).encode()
        return text, {**listed, TABLES: storage.Listed.of(text)}

    def _part_key(self, part: int) -> str:
        return storage.content_hash([FORMAT, self._key, list(map(int, self.examples(part)))], 16)

    def _place(self, part: int) -> str:
        return storage.join(self._folder, _name(schema.PICTURES, part) + ".json")

    def _open(self, table: str, part: int) -> TableWriter:
        columns = {schema.PICTURES: schema.pictures, schema.THUMBS: schema.thumbs}[table]()
        return TableWriter(self._folder, _name(table, part), columns, "number", GROUP_ROWS[table])


def _name(table: str, part: int) -> str:
    return f"{table}-{part:03d}" if part else table
