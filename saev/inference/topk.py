"""The examples on which each latent is strongest, with the values of their tokens.

An example's score is the largest value of the latent over its tokens. Entries are ordered by score,
equal scores by example index, so the best k of a union are the best k of the parts' best k: merging
is exact, associative, and needs no more memory than the result.
"""

import typing as tp
from collections.abc import Callable

import numpy as np

from saev.inference.codes import Columns, TokenRows
from saev.inference.images import ImageActs

_COMPACT_AT = 1 << 20
"""Pending entries that are worth a compaction."""


class Entries(tp.NamedTuple):
    """(latent, example) pairs, and for each the tokens on which the latent fires."""

    latent: np.ndarray
    """int64 [n]."""
    example_idx: np.ndarray
    """int64 [n]."""
    value: np.ndarray
    """Score, float32 [n]."""
    length: np.ndarray
    """Firing tokens of each pair, int64 [n]."""
    token_idx: np.ndarray
    """Firing tokens, pair after pair, int32 [sum(length)]; -1 is the class token."""
    token_value: np.ndarray
    """Their values, float32 [sum(length)]."""

    @classmethod
    def empty(cls) -> "Entries":
        """No entries."""
        dtypes = (np.int64, np.int64, np.float32, np.int64, np.int32, np.float32)
        return cls(*(np.empty(0, dtype=dtype) for dtype in dtypes))

    def take(self, index: np.ndarray) -> "Entries":
        """The pairs at ``index``, in that order."""
        tokens = ragged_index(np.cumsum(self.length) - self.length, self.length, index)
        return Entries(
            self.latent[index], self.example_idx[index], self.value[index], self.length[index],
            self.token_idx[tokens], self.token_value[tokens],
        )  # fmt: skip


def ragged_index(starts: np.ndarray, lengths: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Positions of the elements of the chosen ranges, range after range.

    Args:
        starts: first position of each range, int64 [n].
        lengths: length of each range, int64 [n].
        index: which ranges, int64 [m].

    Returns:
        int64 [sum(lengths[index])].
    """
    chosen = lengths[index]
    before = np.cumsum(chosen) - chosen
    return np.repeat(starts[index] - before, chosen) + np.arange(int(chosen.sum()))


Priority = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Of pairs, from their latents, examples and scores: uint32 [n]. Those above 0 may be kept."""


def by_value(latent: np.ndarray, example_idx: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The strongest first. Bits of positive float32 numbers are in the order of the numbers."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    return np.where(value > 0, bits, np.uint32(0))


def by_chance(latent: np.ndarray, example_idx: np.ndarray, value: np.ndarray) -> np.ndarray:
    """A fixed order that has nothing to do with values, so that the first k examples are a random
    sample of those on which a latent is positive. The mixing function is that of SplitMix64 (public
    domain), of which the upper half is used."""
    x = latent.astype(np.uint64)
    x <<= np.uint64(40)
    x ^= example_idx.astype(np.uint64)
    x += np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    x >>= np.uint64(32)
    chance = np.maximum(x.astype(np.uint32), np.uint32(1))
    return np.where(value > 0, chance, np.uint32(0))


def _keys(latent: np.ndarray, priority: np.ndarray) -> np.ndarray:
    """Numbers in the order of latents, and within each from the highest priority down, uint64."""
    keys = latent.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= ~priority
    return keys


def _kth(keys: np.ndarray, latent: np.ndarray, n_latents: int, k: int) -> np.ndarray:
    """The k-th of each latent's keys, or the last one if it has fewer, uint64 [n_latents]; 0 for a
    latent without keys."""
    counts = np.bincount(latent, minlength=n_latents)
    ends = np.cumsum(counts)
    found = np.zeros(n_latents, dtype=np.uint64)
    at = np.minimum(ends - counts + k, ends)[counts > 0] - 1
    found[counts > 0] = np.sort(keys)[at]
    return found


class TopExamples:
    """Keeps the ``k`` best examples of every latent.

    Args:
        n_latents: number of latents.
        k: examples to keep per latent.
        priority: which are best.
    """

    def __init__(self, n_latents: int, k: int, priority: Priority = by_value):
        self._n_latents, self._k, self._priority = n_latents, k, priority
        self._kept = Entries.empty()
        self._pending: list[Entries] = []
        self._n_pending = 0
        # What a priority must exceed: the k-th best so far. Zero also keeps out examples on which a
        # latent is never positive.
        self._bar = np.zeros(n_latents, dtype=np.uint32)

    def add(self, columns: Columns, tokens: TokenRows, images: ImageActs | None = None) -> None:
        """Offer the tokens of some whole examples, later ones than all that were added before.

        Args:
            columns: codes.
            tokens: which tokens the rows are.
            images: the same codes by image, if they were gathered already.
        """
        if not len(columns.values):
            return
        images = images or ImageActs.of(columns, tokens)
        latents, scores = images.columns.latents, images.columns.values
        examples = images.example_idx[images.columns.rows]
        starts, lengths = images.starts, images.lengths
        # An equal score of a later example loses, so `>` drops nothing that would be kept.
        priority = self._priority(latents, examples, scores)
        index = np.flatnonzero(priority > self._bar[latents])
        index = index[self._among_best(latents[index], priority[index])]
        entries = ragged_index(starts, lengths, index)
        self._push(
            Entries(
                latents[index],
                examples[index],
                scores[index],
                lengths[index],
                tokens.token_idx[columns.rows[entries]],
                columns.values[entries],
            )
        )

    def merge(self, entries: Entries) -> None:
        """Offer the result of another accumulator, of any other examples."""
        self._push(entries)

    def result(self) -> Entries:
        """The best examples, by latent, then from the best down."""
        self._compact()
        return self._kept

    def _among_best(self, latent: np.ndarray, priority: np.ndarray) -> np.ndarray:
        """Which pairs are among the k best of each latent; equal ones all are. Raises the bar."""
        keys = _keys(latent, priority)
        kth = _kth(keys, latent, self._n_latents, self._k)
        full = np.bincount(latent, minlength=self._n_latents) >= self._k
        self._bar[full] = ~(kth[full].astype(np.uint32))
        return np.flatnonzero(keys <= kth[latent])

    def _push(self, entries: Entries) -> None:
        self._pending.append(entries)
        self._n_pending += len(entries.token_idx) + len(entries.latent)
        if self._n_pending > max(_COMPACT_AT, len(self._kept.token_idx)):
            self._compact()

    def _compact(self) -> None:
        if not self._pending:
            return
        every = Entries(*(np.concatenate(f) for f in zip(self._kept, *self._pending, strict=True)))
        priority = self._priority(every.latent, every.example_idx, every.value)
        few = self._among_best(every.latent, priority)
        order = few[np.lexsort((every.example_idx[few], ~priority[few], every.latent[few]))]
        latent = every.latent[order]
        first = np.searchsorted(latent, np.arange(self._n_latents))
        rank = np.arange(len(latent)) - first[latent]
        self._kept = every.take(order[rank < self._k])
        self._pending, self._n_pending = [], 0
