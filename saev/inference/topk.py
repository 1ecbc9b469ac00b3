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
"""Of pairs, from their latents, examples and scores: float64 [n]. Those above 0 may be kept."""


def by_value(latent: np.ndarray, example_idx: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The strongest first."""
    return value.astype(np.float64)


def by_chance(latent: np.ndarray, example_idx: np.ndarray, value: np.ndarray) -> np.ndarray:
    """A fixed order that has nothing to do with values, so that the first k examples are a random
    sample of those on which a latent is positive. The mixing function is that of SplitMix64 (public
    domain)."""
    x = (latent.astype(np.uint64) << np.uint64(40)) ^ example_idx.astype(np.uint64)
    x += np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    chance = ((x >> np.uint64(11)).astype(np.float64) + 1) / 2.0**53
    return np.where(value > 0, chance, 0.0)


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
        self._bar = np.zeros(n_latents)

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
        index = np.flatnonzero(self._priority(latents, examples, scores) > self._bar[latents])
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
        order = np.lexsort((every.example_idx, -priority, every.latent))
        latent = every.latent[order]
        first = np.searchsorted(latent, np.arange(self._n_latents))
        rank = np.arange(len(latent)) - first[latent]
        self._kept = every.take(order[rank < self._k])
        self._pending, self._n_pending = [], 0
        last = order[rank == self._k - 1]
        self._bar[every.latent[last]] = priority[last]
