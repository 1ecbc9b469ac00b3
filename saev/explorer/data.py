"""What the explorer shows of the latents of an SAE, from the results of `saev inference`.

Everything that the explorer knows of results goes through this module.
"""

import dataclasses
import functools
import logging
import typing as tp

import numpy as np

from saev import storage
from saev.errors import SaevError
from saev.inference import decoder
from saev.inference.results import Results
from saev.nn.io.load import load_sae
from saev.shards import Shards

logger = logging.getLogger(__name__)

BINS = 24
"""Bins of the histogram of a latent's values, from 0 to its maximum."""
N_CLASSES = 5
"""Classes that are named per latent."""
N_NEIGHBOURS = 6
N_FOUND = 8
"""Latents that are named per class."""
NONE = -1
N_TOP, N_BAND = 8, 4
"""Images of a latent from the top, and from the middle and the low range of its values each."""
TOP, MIDDLE, LOW = 0, 1, 2

_MAX_CODES_BYTES = 512 << 20
_MAX_LABEL_BYTES = 256 << 20
_MAX_HITS = 1 << 26


class Example(tp.NamedTuple):
    """An image on which a latent fires."""

    kind: int
    """TOP, MIDDLE or LOW: the range of the latent's values that it is from."""
    example: int
    """Row of `Shards.examples()`."""
    value: float
    """Largest value over the image's tokens."""
    patches: np.ndarray
    """Content tokens on which the latent fires, int64 [n]."""
    values: np.ndarray
    """Values on them, float32 [n]."""


class Shares(tp.NamedTuple):
    """On how many images of each class a latent fires: the classes with the highest shares."""

    classes: np.ndarray
    """int64 [d_sae, N_CLASSES], NONE where there are fewer."""
    n_images: np.ndarray
    """Images of the class on which the latent fires, int64 [d_sae, N_CLASSES]."""


class Finding(tp.NamedTuple):
    """A latent that finds a class."""

    latent: int
    inside: float
    """Share of the class's images on which it fires."""
    outside: float
    """Share of all other images on which it fires."""


@dataclasses.dataclass(frozen=True)
class _Codes:
    """All values by latent, then by image."""

    starts: np.ndarray
    """First group of each latent, int64 [d_sae + 1]. A group is a latent on one image."""
    example: np.ndarray
    """Image of each group."""
    peak: np.ndarray
    """Largest value of each group."""
    entries: np.ndarray
    """First entry of each group, and the number of entries."""
    token: np.ndarray
    """Content token of each entry, -1 for the class token."""
    values: np.ndarray
    """Value of each entry."""


class Measured:
    """The latents of one SAE on one shards folder. Everything is computed when it is asked for.

    Args:
        results: what inference measured.
        shards: what it was measured on.
        run: URL of the SAE.
        names: names of the values of masks.
    """

    def __init__(self, results: Results, shards: Shards, run: str, names: tp.Mapping[int, str]):
        self.results, self.shards, self._run, self._names = results, shards, run, names
        table = shards.examples()
        self.files = [storage.name(url) for url in table["url"].to_pylist()]
        """File name of each image."""
        self._labels: list[str] = table["label"].to_pylist()

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.results.d_sae

    @property
    def n_tokens(self) -> int:
        """Tokens that were measured."""
        return int(self.results.metrics["n_tokens"])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's content tokens."""
        rows, columns = self.shards.metadata.grid_shape
        return rows, columns

    # --- Numbers of all latents ----------------------------------------------------------------

    @functools.cached_property
    def order(self) -> np.ndarray:
        """All latents, strong and rare ones first, int64 [d_sae].

        By mean value × log(1 / frequency); behind these come latents that fire on fewer images than
        are shown, and then those that never fire.
        """
        frequency, mean = self.results.frequency, self.results.mean_values
        n_images = np.array([len(examples) for examples in self._tops])
        with np.errstate(divide="ignore"):
            score = np.where(frequency > 0, mean * -np.log(np.maximum(frequency, 1e-300)), -np.inf)
        is_few = n_images < min(N_TOP, int(n_images.max(initial=0)))
        return np.lexsort((-score, is_few, frequency == 0))

    @property
    def n_images(self) -> np.ndarray | None:
        """Images on which each latent fires, int64 [d_sae]; None without codes."""
        return None if self._codes is None else np.diff(self._codes.starts)

    @functools.cached_property
    def histogram(self) -> np.ndarray:
        """Values of each latent in bins from 0 to its maximum, int64 [d_sae, BINS]: of all tokens,
        or of its strongest images if there are no codes."""
        counts = np.zeros((self.d_sae, BINS), dtype=np.int64)
        for latent in np.flatnonzero(self.results.counts > 0):
            values, high = self._values(int(latent)), float(self.results.max_values[latent])
            if high > 0:
                bins = np.clip((values * (BINS / high)).astype(np.int64), 0, BINS - 1)
                counts[latent] = np.bincount(bins, minlength=BINS)
        return counts

    @functools.cached_property
    def classes(self) -> list[str]:
        """Names of the classes of images and of patches, sorted."""
        names = {label for label in self._labels if label}
        if self._patch_labels is not None:
            names |= {self._patch_class(int(label)) for label in np.unique(self._patch_labels)}
        return sorted(names - {""})

    @functools.cached_property
    def usual(self) -> tuple[np.ndarray, np.ndarray]:
        """The most common class of each latent's strongest images: its number in :attr:`classes`,
        int64 [d_sae] (NONE: there is none), and its share of these images, float64 [d_sae]."""
        number = {name: i for i, name in enumerate(self.classes)}
        which, share = np.full(self.d_sae, NONE), np.zeros(self.d_sae)
        for latent in np.flatnonzero(self.results.counts > 0):
            found = [self.label(e) for e in self.top(int(latent))]
            names = sorted(name for name in found if name)
            if names:
                best = max(dict.fromkeys(names), key=names.count)
                which[latent], share[latent] = number[best], names.count(best) / len(found)
        return which, share

    @functools.cached_property
    def images_by_class(self) -> np.ndarray:
        """Measured images of each class, int64 [classes]; zeros for classes of patches alone."""
        return np.bincount(
            self._class_of_image[self._is_measured], minlength=len(self.classes) + 1
        )[: len(self.classes)]

    @functools.cached_property
    def shares(self) -> Shares | None:
        """Classes of the images on which latents fire; None without codes or classes of images."""
        hits = self._hits
        if hits is None:
            return None
        k = min(N_CLASSES, hits.shape[1])
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(hits > 0, hits / self.images_by_class, -1.0)
        best = np.lexsort((-hits, -rate), axis=1)[:, :k]
        n = np.take_along_axis(hits, best, axis=1)
        return Shares(np.where(n > 0, best, NONE), n)

    @functools.cached_property
    def found(self) -> dict[int, list[Finding]]:
        """The latents that find each class of images best: by the difference of the shares of
        images inside and outside of the class on which they fire. By number of the class."""
        hits, totals = self._hits, self.images_by_class
        found: dict[int, list[Finding]] = {}
        if hits is None:
            return found
        fires, n = hits.sum(axis=1), int(totals.sum())
        for one in np.flatnonzero((totals > 0) & (totals < n)).tolist():
            inside = hits[:, one] / totals[one]
            outside = (fires - hits[:, one]) / (n - totals[one])
            best = np.argsort(outside - inside, kind="stable")[:N_FOUND].tolist()
            found[one] = [
                Finding(i, float(inside[i]), float(outside[i])) for i in best if hits[i, one]
            ]
        return found

    @property
    def concepts(self) -> list[tuple[str, dict[str, tp.Any]]]:
        """The best latent of each class of patches: name and figures (see docs/metrics.md)."""
        return [(self._patch_class(row["label"]), row) for row in self.results.concepts]

    @functools.cached_property
    def neighbours(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The latents with the most similar decoder rows, int32 [d_sae, n], and their cosines,
        float32 [d_sae, n]; None if the SAE is gone."""
        try:
            return decoder.neighbours(load_sae(self._run), N_NEIGHBOURS)
        except SaevError as err:
            logger.warning("The page has no neighbours of latents: %s", err)
            return None

    # --- Images of one latent ------------------------------------------------------------------

    def top(self, latent: int) -> list[Example]:
        """The images on which a latent is strongest, best first."""
        return self._tops[latent]

    def bands(self, latent: int) -> list[Example]:
        """Further images from the middle and the low third of a latent's values, highest first;
        none without codes."""
        codes, high = self._codes, float(self.results.max_values[latent])
        if codes is None or high <= 0:
            return []
        groups = np.arange(*codes.starts[latent : latent + 2])
        shown = [e.example for e in self.top(latent)]
        groups = groups[~np.isin(codes.example[groups], shown)]
        groups = groups[np.argsort(-codes.peak[groups], kind="stable")]
        share = codes.peak[groups] / high
        examples = []
        for kind, mine in ((MIDDLE, (share > 1 / 3) & (share <= 2 / 3)), (LOW, share <= 1 / 3)):
            band = groups[mine]
            places = np.linspace(0, len(band) - 1, min(N_BAND, len(band))).round().astype(int)
            examples += [self._example(kind, int(group)) for group in band[places]]
        return examples

    def label(self, example: Example) -> str:
        """Class of what a latent fires on: the class of the strongest patch where classes of
        patches have names, else that of the image; "" if there is none."""
        labels = self._patch_labels
        whole = self._labels[example.example]
        if labels is None or not len(example.patches):
            return whole
        value = int(labels[example.example, example.patches[int(example.values.argmax())]])
        return self._names.get(value, whole or self._patch_class(value))

    def image_label(self, example: int) -> str:
        """Class of an image, "" if it has none."""
        return self._labels[example]

    # --- Details -------------------------------------------------------------------------------

    def _patch_class(self, label: int) -> str:
        return self._names.get(label, f"class {label}")

    @functools.cached_property
    def _tops(self) -> list[list[Example]]:
        return [self._top(latent) for latent in range(self.d_sae)]

    def _top(self, latent: int) -> list[Example]:
        found = self.results.top(latent)
        examples = []
        for example, value, acts in zip(*(part[:N_TOP] for part in found), strict=True):
            patches = np.flatnonzero(acts)
            examples.append(Example(TOP, int(example), float(value), patches, acts[patches]))
        return examples

    @functools.cached_property
    def _patch_labels(self) -> np.ndarray | None:
        n_bytes = self.shards.n_examples * self.shards.content_tokens
        if not self.shards.has_labels or n_bytes > _MAX_LABEL_BYTES:
            return None
        return self.shards.labels()

    @functools.cached_property
    def _class_of_image(self) -> np.ndarray:
        """Number of each image's class; one behind the last where it has none."""
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number.get(label, len(number)) for label in self._labels], dtype=np.int64)

    @functools.cached_property
    def _is_measured(self) -> np.ndarray:
        """Which images inference read, bool [n_examples]; all of them if there are no codes."""
        mask = np.ones(len(self._labels), dtype=bool)
        if self._codes is not None:
            mask[:] = False
            mask[np.unique(self.results.code_tokens()[0])] = True
        return mask

    @functools.cached_property
    def _hits(self) -> np.ndarray | None:
        """Images of each class on which each latent fires, int64 [d_sae, classes]."""
        codes, n = self._codes, len(self.classes) + 1
        if codes is None or not any(self._labels) or self.d_sae * n > _MAX_HITS:
            return None
        latent = np.repeat(np.arange(self.d_sae), np.diff(codes.starts))
        pairs = latent * n + self._class_of_image[codes.example]
        hits = np.bincount(pairs, minlength=self.d_sae * n).reshape(self.d_sae, n)
        return hits[:, :-1]

    def _values(self, latent: int) -> np.ndarray:
        codes = self._codes
        if codes is None:
            found = [example.values for example in self.top(latent)]
            return np.concatenate(found) if found else np.zeros(0, np.float32)
        first, last = codes.entries[codes.starts[latent : latent + 2]]
        return codes.values[first:last]

    def _example(self, kind: int, group: int) -> Example:
        codes = tp.cast(_Codes, self._codes)
        entries = slice(*codes.entries[group : group + 2])
        tokens, values = codes.token[entries], codes.values[entries]
        is_content = tokens >= 0
        return Example(
            kind, int(codes.example[group]), float(codes.peak[group]),
            tokens[is_content].astype(np.int64), values[is_content],
        )  # fmt: skip

    @functools.cached_property
    def _codes(self) -> _Codes | None:
        """The saved codes; None if there are none, or too many to hold them."""
        if not 0 < self.results.codes_bytes <= _MAX_CODES_BYTES:
            return None
        by_latent = self.results.codes().tocsc()
        example_idx, token_idx = self.results.code_tokens()
        by_latent.sort_indices()
        example = example_idx[by_latent.indices]
        latent = np.repeat(np.arange(self.d_sae), np.diff(by_latent.indptr))
        is_new = np.ones(len(example), dtype=bool)
        is_new[1:] = (example[1:] != example[:-1]) | (latent[1:] != latent[:-1])
        first = np.flatnonzero(is_new)
        peaks = np.maximum.reduceat(by_latent.data, first) if len(first) else by_latent.data
        counts = np.bincount(latent[first], minlength=self.d_sae)
        return _Codes(
            np.concatenate([[0], np.cumsum(counts)]), example[first], peaks,
            np.append(first, len(example)), token_idx[by_latent.indices], by_latent.data,
        )  # fmt: skip
