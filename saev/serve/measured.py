"""The tables of one SAE, read by row groups that are kept while there is room."""

import concurrent.futures
import dataclasses
import functools
import logging
import math
import typing as tp

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saev import storage
from saev.errors import SaevError, StorageError
from saev.inference.results import Results
from saev.inference.shown import N_TOP
from saev.parquet import TABLES, FileEntry
from saev.secrets import redact
from saev.serve.cache import ByteCache
from saev.serve.catalogue import Entry
from saev.serve.problems import Problem
from saev.shards.protocol import METADATA, Metadata

logger = logging.getLogger(__name__)

T = tp.TypeVar("T")

NONE = -1
N_BEST = 8
"""Latents that are named of each class."""
_CLASS = ("class_idx", "kind", "value", "name", "support")
_FINDING = ("latent", "ap", "ap_held_out", "rate_inside", "rate_inside_held_out", "rate_outside",
            "rate_outside_held_out")  # fmt: skip
_MAX_EXAMPLE = 1 << 48
_N_READERS = 8
"""Row groups of a whole table that are read at a time."""
_BYTES_PER_LISTED = 12
"""Memory of the list of row groups, per byte of its JSON."""


@dataclasses.dataclass(frozen=True)
class Names:
    """What is known of images without their latents, by row of `images.parquet`."""

    example: np.ndarray
    """Rows of the shards' examples.parquet, ascending, int64 [n]."""
    folder: str
    """Folder that all files are below, with a slash at its end; "" if there is none."""
    path: pa.ChunkedArray
    """File below that folder, or key."""
    label: pa.ChunkedArray
    """Class, as a dictionary."""
    class_idx: np.ndarray
    """int32 [n], NONE without classes."""
    side: pa.ChunkedArray
    """held-out, training or unknown, as a dictionary."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        arrays = (self.example, self.path, self.label, self.class_idx, self.side)
        return sum(int(array.nbytes) for array in arrays)

    def row(self, example: int) -> int:
        """Where an image is; NONE if it was not measured."""
        if not 0 <= example < _MAX_EXAMPLE:
            return NONE
        at = int(np.searchsorted(self.example, example))
        return at if at < len(self.example) and self.example[at] == example else NONE

    def of(self, example: int) -> dict[str, tp.Any]:
        """An image's names as JSON."""
        row = self.row(example)
        if row == NONE:
            return {"example": example, "path": None, "label": None, "class": None, "side": None}
        class_idx = int(self.class_idx[row])
        return {
            "example": example,
            "path": redact(self.path[row].as_py() or ""),
            "label": self.label[row].as_py(),
            "class": None if class_idx == NONE else class_idx,
            "side": self.side[row].as_py(),
        }


@dataclasses.dataclass(frozen=True)
class Shown:
    """Which images the tables show of each latent: pairs of a latent and an image."""

    latent: np.ndarray
    """int32 [n], ascending."""
    example: np.ndarray
    """int64 [n]."""
    top: np.ndarray
    """The strongest image of each latent, int64 [d_sae], NONE if it never fires."""
    is_strong: np.ndarray
    """Whether the image is one of the latent's N_TOP strongest ones, bool [n]."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(int(getattr(self, field.name).nbytes) for field in dataclasses.fields(self))


class Measured:
    """One SAE with the tables that inference wrote of it.

    Args:
        entry: from the catalogue.
        cache: where row groups are kept.

    Raises:
        Problem: it was not measured, or by a version that wrote no tables.
    """

    def __init__(self, entry: Entry, cache: ByteCache):
        if not entry.results:
            raise Problem(
                409, f"{entry.figures['name']} was not measured.",
                f"Run `saev inference --run {entry.figures['run']}`.",
            )  # fmt: skip
        self.entry, self._cache = entry, cache
        self.results = Results.open(entry.results)
        try:
            self.tables = self.results.tables
        except StorageError as err:
            if self.results.folder.has(TABLES):
                raise
            raise Problem(
                409, f"{entry.figures['name']} was measured by an earlier version, without tables.",
                f"Delete {self.results.url} and run the same `saev inference` command again.",
            ) from err  # fmt: skip
        listed = self.results.folder.listed(TABLES)
        self.nbytes = _BYTES_PER_LISTED * (listed.n_bytes if listed else 1 << 20)
        """Memory that it takes, without what the cache keeps."""

    @property
    def key(self) -> str:
        """In addresses."""
        return self.entry.key

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.results.d_sae

    @property
    def facts(self) -> dict[str, tp.Any]:
        """What `tables.json` says of all tables."""
        return self.tables.index.facts

    @property
    def has_codes(self) -> bool:
        """Whether values of single patches were saved of all images."""
        return "token_acts_by_image" in self.tables.index.tables

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's content tokens."""
        url = self.entry.figures["shards"]
        if storage.exists(storage.join(url, METADATA)):
            rows, columns = Metadata.read(url).grid_shape
            return rows, columns
        n = self.results.content_tokens
        side = math.isqrt(n)
        return (side, side) if side * side == n else (1, n)

    @functools.cached_property
    def version(self) -> str:
        """Changes if the tables do. For ETags."""
        listed = self.results.folder.listed(TABLES)
        return listed.checksum.rpartition(":")[2] if listed else self.key

    def check_latent(self, latent: int) -> int:
        """The latent.

        Raises:
            Problem: there is none.
        """
        if 0 <= latent < self.d_sae:
            return latent
        raise Problem(
            404, f"There is no latent {latent}: the SAE has {self.d_sae}.",
            f"Take a number from 0 to {self.d_sae - 1}.",
        )  # fmt: skip

    # --- Rows ----------------------------------------------------------------------------------

    def cached(self, what: str, make: tp.Callable[[], T]) -> T:
        """Something that is made of whole tables of this SAE."""
        return self._cache.get((self.key, what), make, dear=True)

    def rows(self, name: str, key: int, columns: tp.Sequence[str] | None = None) -> pa.Table:
        """The rows of one key of a table, or some of its columns.

        The row groups that hold them are kept while there is room.
        """
        table = self.tables.table(name)
        wanted = None if columns is None else [table.key, *columns]

        def group(file: FileEntry, number: int) -> pa.Table:
            place = (self.key, file.name, number, *(columns or ()))
            return self._cache.get(place, lambda: self.tables.group(file, number, wanted))

        found = [self._of_key(group(*place), table.key, key) for place in table.holding(key)]
        return pa.concat_tables(found) if found else self.tables.rows(name, key, wanted)

    @staticmethod
    def _of_key(group: pa.Table, column: str, key: int) -> pa.Table:
        keys = group[column].to_numpy()
        first, last = np.searchsorted(keys, [key, key + 1])
        return group.slice(int(first), int(last - first))

    def groups(self, name: str, columns: tp.Sequence[str]) -> tp.Iterator[pa.Table]:
        """All row groups of a table in order, some columns of each. They are not kept."""
        places = [
            (file, number)
            for file in self.tables.table(name).files
            for number in range(len(file.groups))
        ]

        def read(place: tuple[FileEntry, int]) -> pa.Table:
            return self.tables.group(*place, columns=columns)

        with concurrent.futures.ThreadPoolExecutor(_N_READERS) as pool:
            yield from pool.map(read, places)

    def whole(self, name: str, columns: tp.Sequence[str]) -> pa.Table:
        """Some columns of a whole table."""
        found = list(self.groups(name, columns))
        return pa.concat_tables(found) if found else self.tables.read(name, columns)

    # --- What is made of whole tables, in a moment or in seconds -------------------------------

    def names(self) -> Names:
        """Names of all images."""
        return self.cached("names", self._names)

    def _names(self) -> Names:
        columns = ["example", "path", "label", "class_idx", "side"]
        table = self.whole("images", columns)
        folder = _common_folder(table["path"])
        return Names(
            table["example"].to_numpy(),
            folder,
            pc.utf8_slice_codeunits(table["path"], len(folder)) if folder else table["path"],
            pc.dictionary_encode(table["label"]),
            pc.fill_null(table["class_idx"], NONE).to_numpy(),
            pc.dictionary_encode(table["side"]),
        )

    def shown(self) -> Shown:
        """The images of all latents in `examples.parquet`."""
        return self.cached("shown", self._shown)

    def _shown(self) -> Shown:
        latents, examples = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        strong = [np.zeros(0, bool)]
        top = np.full(self.d_sae, NONE, np.int64)
        for group in self.groups("examples", ["latent", "kind", "rank", "example"]):
            latent, example = group["latent"].to_numpy(), group["example"].to_numpy()
            is_top = pc.equal(group["kind"], "top").to_numpy()
            rank = group["rank"].to_numpy()
            first = is_top & (rank == 0)
            top[latent[first]] = example[first]
            latents.append(latent)
            examples.append(example)
            strong.append(is_top & (rank < N_TOP))
        is_strong = np.concatenate(strong)
        return Shown(np.concatenate(latents), np.concatenate(examples), top, is_strong)

    def pairs(self) -> pa.Table:
        """`classes.parquet`, by latent: the classes that a latent finds, best first."""
        return self.cached("pairs", self._pairs)

    def _pairs(self) -> pa.Table:
        left_out = ("name", "kind", "value")
        names = [name for name in self.tables.schema("classes").names if name not in left_out]
        table = self.whole("classes", names)
        keys = [("latent", "ascending"), ("ap", "descending"), ("class_idx", "ascending")]
        return table.take(pc.sort_indices(table, sort_keys=keys)).combine_chunks()

    def class_list(self) -> list[dict[str, tp.Any]]:
        """All classes of images and of masks, by number."""
        return self.cached("class list", self._class_list)

    def _class_list(self) -> list[dict[str, tp.Any]]:
        classes: dict[int, dict[str, tp.Any]] = {}
        table = self.whole("classes", [*_CLASS, *_FINDING])
        idx = table["class_idx"].to_numpy()  # ascending, and in each the best come first
        is_best = np.arange(len(idx)) - np.searchsorted(idx, idx) < N_BEST
        for row in table.filter(pa.array(is_best)).to_pylist():
            one = {"class": row["class_idx"], **{key: row[key] for key in _CLASS[1:]}, "best": []}
            best = classes.setdefault(row["class_idx"], one)["best"]
            best.append({key: row[key] for key in _FINDING})
        found = [classes[number] for number in sorted(classes)]
        if any(one["name"] is None for one in found):
            of_values = _mask_names(self.entry.figures["shards"])
            for one in found:
                named = of_values.get(one["value"]) if one["kind"] == "mask" else None
                one["name"] = redact(one["name"] or named or f"class {one['value']}")
        return found


def _mask_names(shards: str) -> tp.Mapping[int, str]:
    """Names of the values of masks, as the dataset has them; empty if it is gone."""
    from saev.shards import Shards  # this and the next need torch
    from saev.visuals import source

    try:
        return source.read_class_names(source.recorded_data(Shards.open(shards)))
    except SaevError as err:
        logger.warning("Classes of patches have no names: %s", err)
        return {}


def _common_folder(paths: pa.ChunkedArray) -> str:
    """The folder that all files are below: that of the first and the last one, sorted."""
    ends = pc.min_max(paths)
    first, last = ends["min"].as_py(), ends["max"].as_py()
    if first is None:
        return ""
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, n) + 1]
