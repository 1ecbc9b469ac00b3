"""The examples on which each latent is strongest, with the values of their tokens.

An example's score is the largest value of the latent over its tokens. Entries are ordered by score,
equal scores by example index, so the best k of a union are the best k of the parts' best k: merging
is exact, associative, and needs no more memory than the result.
"""

import typing as tp

import numpy as np

from saev.inference.codes import Columns, TokenRows

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


class TopExamples:
    """Keeps the ``k`` best examples of every latent.

    Args:
        n_latents: number of latents.
        k: examples to keep per latent.
    """

    def __init__(self, n_latents: int, k: int):
        self._n_latents, self._k = n_latents, k
        self._kept = Entries.empty()
        self._pending: list[Entries] = []
        self._n_pending = 0
        # What a score must exceed: the k-th best so far. Zero also keeps out examples on which a
        # latent is never positive.
        self._bar = np.zeros(n_latents, dtype=np.float32)

    def add(self, columns: Columns, tokens: TokenRows) -> None:
        """Offer the tokens of some whole examples, later ones than all that were added before."""
        if not len(columns.values):
            return
        latents, examples = columns.latents, tokens.example_idx[columns.rows]
        is_new = np.ones(len(latents), dtype=bool)
        is_new[1:] = (latents[1:] != latents[:-1]) | (examples[1:] != examples[:-1])
        starts = np.flatnonzero(is_new)
        lengths = np.diff(starts, append=len(latents))
        scores = np.maximum.reduceat(columns.values, starts)
        # An equal score of a later example loses, so `>` drops nothing that would be kept.
        index = np.flatnonzero(scores > self._bar[latents[starts]])
        entries = ragged_index(starts, lengths, index)
        self._push(
            Entries(
                latents[starts[index]],
                examples[starts[index]],
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
        order = np.lexsort((every.example_idx, -every.value, every.latent))
        latent = every.latent[order]
        first = np.searchsorted(latent, np.arange(self._n_latents))
        rank = np.arange(len(latent)) - first[latent]
        self._kept = every.take(order[rank < self._k])
        self._pending, self._n_pending = [], 0
        last = order[rank == self._k - 1]
        self._bar[every.latent[last]] = every.value[last]
