"""What the explorer shows of the latents of an SAE, from the tables of `saev inference`.

Everything that the explorer knows of results goes through this module.
"""

import functools
import typing as tp

import numpy as np
import pyarrow as pa

from saev import storage
from saev.explorer import columns
from saev.explorer.columns import HELD_OUT, Column
from saev.inference import shown
from saev.inference.results import Results
from saev.inference.shown import N_TOP
from saev.inference.sums import BINS_PER_OCTAVE
from saev.shards import Shards

BINS = 4
"""Bins of a histogram per octave."""
_MERGED = BINS_PER_OCTAVE // BINS
N_CLASSES = 5
"""Classes per latent, and latents per class, that the page has."""
N_FOUND = 8
N_NEIGHBOURS = 6
NONE = -1
MAX_RATES = 1 << 21
"""Most pairs of a class and a latent whose rates the page has, to compare classes."""
MAX_ACTS = 1 << 26
"""Most rows of `image_acts_by_latent.parquet` that are counted for it."""
N_SPREAD = 8
"""Images of a latent beside the strongest ones, from the middle and the low range of its values."""
TOP, SPREAD = 0, 1
Kind = tp.Literal["neighbour", "coactive"]
SIDES = ("unknown", "training", "held-out")


class Example(tp.NamedTuple):
    """An image on which a latent fires."""

    kind: int
    """TOP or SPREAD."""
    example: int
    """Row of `Shards.examples()`."""
    value: float
    """Largest value over the image's tokens."""
    quantile: float
    """Share of the images on which the latent fires whose value is at most this one."""
    side: int
    """Number in SIDES."""
    patches: np.ndarray
    """Content tokens on which the latent fires, int64 [n]."""
    values: np.ndarray
    """Values on them, float32 [n]."""


class ClassFacts(tp.NamedTuple):
    """A class on which some latent fires."""

    name: str
    kind: str
    """image or mask."""
    support: int
    """Images, or labelled tokens, of the class."""


class Findings(tp.NamedTuple):
    """Pairs of a latent and a class, by latent, in each from the highest AP down. Figures are of
    held-out images where there are some, and NaN where they are not defined."""

    latent: np.ndarray
    number: np.ndarray
    """Of the class, in :attr:`Measured.classes`."""
    ap: np.ndarray
    ap_all: np.ndarray
    """AP of all images."""
    inside: np.ndarray
    """Share of the images (tokens) of the class, and of all others, on which the latent fires."""
    outside: np.ndarray


class Histograms(tp.NamedTuple):
    """Tokens by value, without empty bins at both ends. There are BINS in an octave, as in
    docs/formats.md with half as many."""

    first: np.ndarray
    """First bin of each latent, int64 [d_sae]."""
    counts: list[np.ndarray]
    """int64 [bins] each; empty for a latent that never fires."""


class Measured:
    """The latents of one SAE on one shards folder. Everything is read when it is asked for.

    Args:
        results: what inference measured.
        shards: what it was measured on.
        names: names of the values of masks.

    Raises:
        StorageError: an earlier version of saev wrote the results, without tables.
    """

    def __init__(self, results: Results, shards: Shards, names: tp.Mapping[int, str]):
        self.results, self.shards, self._names = results, shards, names
        self._facts = results.tables.index.facts

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.results.d_sae

    @property
    def has_held_out(self) -> bool:
        """Whether there are images that are known to be held out."""
        return bool(self._facts["held_out"]["n_images"])

    def n_measured(self, what: tp.Literal["n_tokens", "n_images"]) -> int:
        """Tokens or images that were measured, of both sides."""
        return int(self._facts["all"][what])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's content tokens."""
        rows, columns = self.shards.metadata.grid_shape
        return rows, columns

    # --- Numbers of all latents ----------------------------------------------------------------

    @functools.cached_property
    def table(self) -> pa.Table:
        """`latents.parquet`."""
        return self.results.latents()

    def column(self, column: Column, *, held_out: bool) -> np.ndarray:
        """A figure of all latents, NaN where it is not defined, float64 [d_sae]."""
        if column.source == "purity":
            return self.purity
        return columns.read(self.table, column, self._facts["quantiles"], held_out=held_out)

    @functools.cached_property
    def n_tokens(self) -> np.ndarray:
        """Tokens on which each latent fires, int64 [d_sae]."""
        return self._floats("n_tokens").astype(np.int64)

    @functools.cached_property
    def peak(self) -> np.ndarray:
        """Largest value of each latent, 0 if it never fires, float64 [d_sae]."""
        return np.nan_to_num(self._floats("max"))

    @functools.cached_property
    def order(self) -> np.ndarray:
        """All latents, strong and rare ones first, int64 [d_sae]."""
        names = ("frequency", "mean", "n_images")
        return shown.strong_first(*(self._floats(name) for name in names))

    @property
    def layout(self) -> np.ndarray:
        """Place of each latent on the map of decoder directions, float64 [d_sae, 2]."""
        return np.stack([self._floats("x"), self._floats("y")], axis=1)

    def nearest(self, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
        """The latents with the most similar decoder rows, or that fire on the same tokens, best
        first: int64 [d_sae, n], NONE where there are fewer, and cosines, float64 [d_sae, n]."""
        which = "neighbours" if kind == "neighbour" else kind
        found = columns.lists(self.table[which], NONE)[:, :N_NEIGHBOURS]
        return found.astype(np.int64), columns.lists(self.table[f"{kind}_cosines"])[
            :, :N_NEIGHBOURS
        ]

    @functools.cached_property
    def histograms(self) -> Histograms:
        """Tokens of all images by value."""
        first = np.nan_to_num(self._floats("histogram_first")).astype(np.int64)
        counts = []
        for start, row in zip(first.tolist(), self.table["histogram"].to_pylist(), strict=True):
            before = start % _MERGED
            padded = np.zeros(-(-(before + len(row or ())) // _MERGED) * _MERGED, dtype=np.int64)
            padded[before : before + len(row or ())] = row or ()
            counts.append(padded.reshape(-1, _MERGED).sum(axis=1))
        return Histograms(first // _MERGED, counts)

    @property
    def names(self) -> list[str]:
        """Names of latents, "" where there is none."""
        return [name or "" for name in self.table["name"].to_pylist()]

    # --- Classes -------------------------------------------------------------------------------

    @functools.cached_property
    def classes(self) -> list[ClassFacts]:
        """Of images, then of patches, by their number in the table."""
        return [facts for _, facts in sorted(self._known.items())]

    def best(self, kind: tp.Literal["class", "mask"]) -> np.ndarray:
        """The best class of each latent: its number in :attr:`classes`, NONE if there is none,
        int64 [d_sae]."""
        found = self._floats(f"best_{kind}")
        return self._numbers(np.where(np.isnan(found), NONE, found).astype(np.int64))

    @functools.cached_property
    def findings(self) -> Findings:
        """The best N_CLASSES classes of each latent, and the best N_FOUND latents of each class."""
        table, ending = self._classes, HELD_OUT if self.has_held_out else ""
        latent, idx = (table[name].to_numpy() for name in ("latent", "class_idx"))
        score = np.nan_to_num(columns.floats(table["ap"]), nan=-1.0)
        keep = _ranks(latent, -score) < N_CLASSES
        keep |= _ranks(idx, -score) < N_FOUND
        order = np.lexsort((-score, latent))
        order = order[keep[order]]
        figures = [
            columns.floats(table[name])[order]
            for name in (f"ap{ending}", "ap", f"rate_inside{ending}", f"rate_outside{ending}")
        ]
        return Findings(latent[order], self._numbers(idx[order]), *figures)

    def rates(self) -> np.ndarray | None:
        """Share of the images of each class on which each latent fires with at least `image_floor`
        of its largest value, float64 [classes of images, d_sae]; None without such classes, or if
        there are too many to count them for a page."""
        n = sum(one.kind == "image" for one in self.classes)
        entry = self.results.tables.table("image_acts_by_latent")
        if not n or n * self.d_sae > MAX_RATES or entry.n_rows > MAX_ACTS:
            return None
        table = self.results.images(["example", "class_idx"])
        class_idx = columns.floats(table["class_idx"])
        known = np.where(np.isnan(class_idx), NONE, class_idx).astype(np.int64)
        example = table["example"].to_numpy()
        class_of = np.full(int(example.max(initial=-1)) + 1, NONE)
        class_of[example] = np.where(known < 0, NONE, self._numbers(known))
        acts = self.results.tables.read("image_acts_by_latent", ["latent", "example"])
        of_class = class_of[acts["example"].to_numpy()]
        cell = of_class * self.d_sae + acts["latent"].to_numpy()
        hits = np.bincount(cell[of_class >= 0], minlength=n * self.d_sae).reshape(n, self.d_sae)
        return hits / np.array([one.support for one in self.classes[:n]])[:, None]

    # --- Images --------------------------------------------------------------------------------

    def file(self, example: int) -> str:
        """File name of an image."""
        path = self._images[example][0]
        return storage.name(path) if path else f"image {example}"

    def label(self, example: int) -> str:
        """Class of an image, "" if it has none."""
        return self._images[example][1]

    def examples(self, latent: int) -> list[Example]:
        """The N_TOP images on which a latent is strongest, best first, then up to N_SPREAD others
        that are spread over its values, from the highest down."""
        first, last = np.searchsorted(self._examples["latent"], (latent, latent + 1))
        mine = np.arange(first, last)
        is_top = self._examples["kind"][mine] == TOP
        top = mine[is_top][:N_TOP]
        seen = set(self._examples["example"][top].tolist())
        rest = [i for i in mine[~is_top].tolist() if self._examples["example"][i] not in seen]
        if len(rest) > N_SPREAD:
            places = np.linspace(0, len(rest) - 1, N_SPREAD).round().astype(int)
            rest = [rest[i] for i in places]
        return [self._example(TOP, i) for i in top] + [self._example(SPREAD, i) for i in rest]

    @functools.cached_property
    def purity(self) -> np.ndarray:
        """Share of the most common class among each latent's N_TOP strongest images, float64
        [d_sae]; NaN if they have no classes."""
        found = self._examples
        top = (found["kind"] == TOP) & (found["rank"] < N_TOP)
        labels = np.array([self.label(example) for example in found["example"][top].tolist()])
        _, class_idx = np.unique(labels, return_inverse=True)
        class_idx = np.where(labels == "", NONE, class_idx)
        return shown.image_purity(found["latent"][top], class_idx, self.d_sae)

    # --- Details -------------------------------------------------------------------------------

    def _floats(self, name: str) -> np.ndarray:
        return columns.floats(self.table[name])

    @functools.cached_property
    def _classes(self) -> pa.Table:
        return self.results.classes()

    @functools.cached_property
    def _known(self) -> dict[int, ClassFacts]:
        """By number in the table."""
        names = ["class_idx", "kind", "value", "name", "support"]
        rows = self._classes.select(names).group_by(names).aggregate([])
        return {
            idx: ClassFacts(self._class_name(kind, value, name), kind, support)
            for idx, kind, value, name, support in zip(
                *(rows[column].to_pylist() for column in names), strict=True
            )
        }

    def _class_name(self, kind: str, value: int, name: str | None) -> str:
        if kind == "mask":
            return self._names.get(value, f"class {value}")
        return name or f"class {value}"

    def _numbers(self, idx: np.ndarray) -> np.ndarray:
        """Numbers in :attr:`classes` of numbers in the table."""
        known = np.array(sorted(self._known), dtype=np.int64)
        if not len(known):
            return np.full(len(idx), NONE)
        place = np.searchsorted(known, idx).clip(0, len(known) - 1)
        return np.where(known[place] == idx, place, NONE)

    @functools.cached_property
    def _images(self) -> dict[int, tuple[str | None, str]]:
        table = self.results.images(["example", "path", "label"])
        example, path, label = (table[name].to_pylist() for name in table.column_names)
        return {e: (p, one or "") for e, p, one in zip(example, path, label, strict=True)}

    @functools.cached_property
    def _examples(self) -> dict[str, np.ndarray]:
        """Columns of `examples.parquet`; lists as their values and where each one begins."""
        table = self.results.tables.read("examples").combine_chunks()
        found = {
            name: table[name].to_numpy() for name in ("latent", "example", "value", "quantile")
        }
        found["kind"] = np.where(table["kind"].to_numpy() == "top", TOP, SPREAD)
        number = {name: i for i, name in enumerate(SIDES)}
        found["side"] = np.array([number[name] for name in table["side"].to_pylist()], np.int64)
        found["rank"] = table["rank"].to_numpy()
        order = np.lexsort((found["rank"], found["kind"], found["latent"]))
        found["row"] = order  # of the lists, which stay as they are
        for name in ("latent", "example", "value", "quantile", "kind", "rank", "side"):
            found[name] = found[name][order]
        for name in ("patches", "patch_values"):
            array = table[name].combine_chunks()
            found[name] = array.values.to_numpy(zero_copy_only=False)
            found["starts"] = array.offsets.to_numpy()
        return found

    def _example(self, kind: int, at: int) -> Example:
        found = self._examples
        row = int(found["row"][at])
        span = slice(*found["starts"][row : row + 2])
        patches, values = found["patches"][span], found["patch_values"][span]
        is_content = patches >= 0  # -1 is the class token, which has no place in the image
        return Example(
            kind, int(found["example"][at]), float(found["value"][at]),
            float(found["quantile"][at]), int(found["side"][at]),
            patches[is_content].astype(np.int64), values[is_content].astype(np.float32),
        )  # fmt: skip


def _ranks(group: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Place of each entry in its group, from the lowest score up."""
    order = np.lexsort((score, group))
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    return ranks
