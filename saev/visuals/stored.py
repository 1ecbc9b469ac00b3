"""The images of a report: stored once, in two sizes, without marks, and read by range.

`pictures.parquet` has images in the size of a latent's page, and `thumbs.parquet` the same images
in the size of a list. Images of strong and rare latents come first. So the first rows of a list,
and the images of one latent, are mostly in one row group.
"""

import functools
import typing as tp

import numpy as np

from saev import storage
from saev.errors import CorruptDataError, IncompleteError
from saev.parquet import TABLES, FileEntry, Tables, schema
from saev.visuals.files import DONE

REMEDY = "Delete the folder and run the same `saev visuals` command again."
GROUP_ROWS = {schema.PICTURES: 8, schema.THUMBS: 64}
"""Images of a row group, which is what a reader reads at a time: about 64 KB."""
EXAMPLES, N_NAMED, IMAGE_SIZE = "examples", "n_named", "image_size"
"""Facts in `tables.json`: the stored images in their order, how many the results name, and the
longest side that a picture may have."""

_KEPT_GROUPS = 64
_COLUMNS = {schema.PICTURES: "picture", schema.THUMBS: "thumb"}


class Pictures:
    """The stored images of a report. Threads may share it.

    Args:
        tables: of the report's folder.
    """

    def __init__(self, tables: Tables):
        place = storage.join(tables.url, TABLES)
        with storage.parsed(place, "a list of pictures", remedy=REMEDY):
            facts = tables.index.facts
            self.examples = np.array(facts[EXAMPLES], dtype=np.int64)
            """Rows of `Shards.examples()`, int64 [n], in the order in which they are stored."""
            self.image_size = int(facts[IMAGE_SIZE])
            """The longest side that a picture may have, in pixels."""
            self.n_named = int(facts[N_NAMED])
            """Images that the results name; more than are stored if there was a limit."""
            if self.examples.ndim != 1 or any(
                tables.table(name).n_rows != len(self.examples) for name in GROUP_ROWS
            ):
                raise ValueError(f"{len(self.examples)} examples are not the rows of the tables")
        self._number = {example: i for i, example in enumerate(self.examples.tolist())}
        self._tables = tables
        self._group = functools.lru_cache(maxsize=_KEPT_GROUPS)(self._read_group)

    @classmethod
    def open(cls, report: str) -> "Pictures":
        """Open the images of a report.

        Args:
            report: URL of its folder.

        Raises:
            IncompleteError: there is no complete report, or an earlier version of saev made it.
            CorruptDataError: it is damaged.
        """
        found = cls.find(report)
        if found is None:
            raise IncompleteError(
                f"{report} has no stored pictures, because there is no complete report, or because "
                "an earlier version of saev made it. Run `saev visuals`."
            )
        return found

    @classmethod
    def find(cls, report: str) -> "Pictures | None":
        """:meth:`open`, but None if there are no stored images."""
        place = storage.normalize(report)
        sealed = storage.find_sealed(storage.join(place, DONE), remedy=REMEDY)
        if sealed is None or TABLES not in (sealed.files or {}):
            return None
        data = storage.Folder(place, DONE, sealed, REMEDY).read_bytes(TABLES)
        return cls(Tables.open(place, data, REMEDY))

    def __contains__(self, example: int) -> bool:
        return int(example) in self._number

    def get(self, example: int) -> bytes | None:
        """The picture of an image for the page of a latent, as a WebP file; None if it is not
        stored.

        Raises:
            CorruptDataError: the report is damaged.
            StorageError: it cannot be read.
        """
        return self._find(schema.PICTURES, example)

    def thumb(self, example: int) -> bytes | None:
        """The picture of an image for lists, as a WebP file; None if it is not stored."""
        return self._find(schema.THUMBS, example)

    def _find(self, name: str, example: int) -> bytes | None:
        number = self._number.get(int(example))
        if number is None:
            return None
        for group in self._tables.table(name).holding(number):
            found = self._group(name, *group)
            if number in found:
                return found[number]
        place = storage.join(self._tables.url, TABLES)
        raise CorruptDataError(f"{place} lists no row group with image {number}. {REMEDY}")

    def _read_group(self, name: str, file: FileEntry, number: int) -> dict[int, bytes]:
        """The pictures of a row group, by the number of the image."""
        rows = self._tables.group(file, number, ["number", _COLUMNS[name]])
        return dict(zip(*(column.to_pylist() for column in rows.columns), strict=True))


class Stored(tp.NamedTuple):
    """The two pictures of an image that are stored."""

    width: int
    """Of the picture, in pixels."""
    height: int
    """Of the picture, in pixels."""
    picture: bytes
    """The picture for the page of a latent, a WebP file."""
    thumb: bytes
    """The picture for lists, a WebP file."""

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that the pictures take."""
        return len(self.picture) + len(self.thumb)
