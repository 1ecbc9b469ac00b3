"""Concept alignment: for each class, the single latent that finds the class's tokens best.

Latents are read in blocks with a bounded number of entries. Pieces of stored codes are sorted by
latent, so all blocks together read each piece once. A latent with more entries than the bound is
read in bands of falling values; the counts of earlier bands are carried along.
"""

import typing as tp
from collections.abc import Iterable, Iterator

import numpy as np

from saev.config.base import Config
from saev.inference.alignment import (
    N_CLASSES,
    Carry,
    average_precision,
    count_by_class,
    descending_key,
    precision_sums,
    probe_r,
    purity,
    zero_group,
)
from saev.inference.blocks import ranges
from saev.inference.codes import Piece, StoredCodes
from saev.inference.scores import ALL, SIDES, Classes, Found, Scores

MAX_ENTRIES = 1 << 21
"""Entries that are held at a time. With what sorting needs, they take about 300 MB."""

PURITY_TOKENS = 16
COVERAGE_AP = 0.3

_BIN_BITS = 16
_FIRST_NEGATIVE_BIN = 1 << 15


class ClassAlignment(Config):
    """One class and its best latent."""

    label: int
    """The class."""
    n_tokens: int
    """Its tokens."""
    latent: int
    """The latent with the highest average precision; of equal ones the first."""
    average_precision: float
    """Average precision of the latent's values, as a ranking of all labelled tokens."""
    purity_at_16: float
    """Share of the class among the 16 tokens with the highest values."""
    probe_r: float
    """McFadden's pseudo-R² of a logistic probe on the latent."""


class Alignment(tp.NamedTuple):
    """What was computed from the labels of patches."""

    classes: list[ClassAlignment]
    """One row per class, by label."""
    scores: Scores
    """Scores of all latents and classes, for `classes.parquet`."""


def align(
    codes: StoredCodes,
    counts: np.ndarray,
    side: np.ndarray,
    first: int = 0,
    max_entries: int = MAX_ENTRIES,
) -> Alignment:
    """Find the best latent of every class that occurs.

    Tokens without a label (the class token) do not take part.

    Args:
        codes: with labels.
        counts: entries per latent over all of `codes`, int64 [d_sae].
        side: of each example of the shards, see :mod:`saev.inference.sides`.
        first: number of the first class in `classes.parquet`.
        max_entries: most entries to hold at a time.
    """
    by_side = {one: np.zeros(N_CLASSES, dtype=np.int64) for one in SIDES}
    for piece in codes:
        labels, sides = piece.array("label"), side[piece.array("example_idx")]
        for one, n_by_class in by_side.items():
            mine = (labels >= 0) & ((sides == one) | (one == ALL))
            n_by_class += np.bincount(labels[mine], minlength=N_CLASSES)
    n_by_class = by_side[ALL]
    classes = Classes("mask", np.arange(N_CLASSES), [None] * N_CLASSES, by_side)
    scores = Scores(classes, first, len(counts))
    best_ap = np.full(N_CLASSES, -1.0)
    best: dict[int, ClassAlignment] = {}
    for start, stop in ranges(counts, max_entries):
        is_long = int(counts[start:stop].sum()) > max_entries
        block = (_LongColumn if is_long else _Block)(codes, side, start, stop, max_entries)
        found = classes.measured(block.measure)
        if not found:
            break  # because no token has a label
        scores.add(start, found)
        ap = found[ALL].ap
        for label in np.flatnonzero((n_by_class > 0) & (ap.max(axis=0) > best_ap)).tolist():
            column = int(ap[:, label].argmax())
            best_ap[label] = ap[column, label]
            best[label] = _describe(block, column, start, label, ap, n_by_class)
    return Alignment([best[label] for label in sorted(best)], scores)


def summarize(classes: tp.Sequence[ClassAlignment]) -> dict[str, float | int]:
    """Means over the classes, by their keys in metrics.json."""
    ap = np.array([c.average_precision for c in classes])
    return {
        "n_classes": len(classes),
        "mean_average_precision": float(ap.mean()),
        "purity_at_16": float(np.mean([c.purity_at_16 for c in classes])),
        "coverage_at_0.3": float((ap >= COVERAGE_AP).mean()),
        "probe_r": float(np.mean([c.probe_r for c in classes])),
    }


def _describe(
    block: "_Block | _LongColumn", column: int, start: int, label: int, ap: np.ndarray,
    n_by_class: np.ndarray,
) -> ClassAlignment:  # fmt: skip
    n_tokens, n_class = int(n_by_class.sum()), int(n_by_class[label])

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for values, labels in block.column(column):
            yield values, labels == label

    values, is_class = _strongest(chunks())
    return ClassAlignment(
        label=label,
        n_tokens=n_class,
        latent=start + column,
        average_precision=float(ap[column, label]),
        purity_at_16=purity(values, is_class, n_tokens, n_class, PURITY_TOKENS),
        probe_r=probe_r(chunks, n_tokens, n_class),
    )


def _strongest(
    chunks: Iterable[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """The entries on which `purity` depends: the strongest, and all with the value of the last one.

    If so many entries are positive, all others may count as 0 without changing the purity.
    Otherwise all entries are kept.
    """
    values, is_class = np.empty(0, dtype=np.float32), np.empty(0, dtype=bool)
    for more_values, more_class in chunks:
        values = np.concatenate([values, more_values])
        is_class = np.concatenate([is_class, more_class])
        if len(values) > PURITY_TOKENS:
            bar = np.partition(values, len(values) - PURITY_TOKENS)[len(values) - PURITY_TOKENS]
            if bar > 0:
                values, is_class = values[values >= bar], is_class[values >= bar]
    return values, is_class


class _Entries(tp.NamedTuple):
    """Entries of some latents on labelled tokens."""

    latents: np.ndarray
    """Numbers of the latents, counted from the first of them, int64 [nnz]."""
    values: np.ndarray
    """float32 [nnz]."""
    labels: np.ndarray
    """int64 [nnz]."""
    sides: np.ndarray
    """int8 [nnz]."""

    def on(self, side: int) -> "_Entries":
        """The entries of one side."""
        return self if side == ALL else _Entries(*(field[self.sides == side] for field in self))


def _labelled(codes: StoredCodes, side: np.ndarray, start: int, stop: int) -> Iterator[_Entries]:
    """The entries of latents start:stop, piece by piece."""

    def read(piece: Piece) -> _Entries:
        columns = piece.columns(start, stop)
        if not len(columns.values):
            return _Entries(columns.latents, columns.values, columns.latents, side[:0])
        labels = piece.array("label")[columns.rows].astype(np.int64)
        keep = labels >= 0
        example_idx = piece.array("example_idx")[columns.rows[keep]]
        return _Entries(
            columns.latents[keep], columns.values[keep], labels[keep], side[example_idx]
        )

    return codes.map(read)


class _Block:
    """Some latents whose entries are all in memory."""

    def __init__(
        self, codes: StoredCodes, side: np.ndarray, start: int, stop: int, max_entries: int
    ):
        self._n_latents = stop - start
        parts = list(_labelled(codes, side, start, stop))
        empty = (np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64), side[:0])
        self._entries = _Entries(*map(np.concatenate, zip(empty, *parts, strict=True)))
        self._column = -1, self._entries

    def measure(self, side: int, n_by_class: np.ndarray) -> Found:
        """Scores of all latents and classes on one side."""
        found = self._entries.on(side)
        active = count_by_class(found.latents, found.labels, self._n_latents, N_CLASSES)
        return Found(average_precision(*found[:3], self._n_latents, n_by_class), active)

    def column(self, column: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Values and labels of one latent."""
        if self._column[0] != column:  # else it was asked for before
            mine = self._entries.latents == column
            self._column = column, _Entries(*(field[mine] for field in self._entries))
        yield self._column[1].values, self._column[1].labels


class _LongColumn:
    """One latent with too many entries for the memory. Each computation reads them all again."""

    def __init__(
        self, codes: StoredCodes, side: np.ndarray, start: int, stop: int, max_entries: int
    ):
        self._codes, self._side, self._latent = codes, side, start
        self._max_entries = max_entries
        self._bins = np.zeros(1 << _BIN_BITS, dtype=np.int64)
        for values, _ in self.column(0):
            self._bins += np.bincount(_bin(values), minlength=len(self._bins))

    def measure(self, side: int, n_by_class: np.ndarray) -> Found:
        """Scores of the latent for all classes on one side."""
        by_class = np.zeros((1, N_CLASSES), dtype=np.int64)
        for _, labels in self.column(0, side):
            by_class[0] += np.bincount(labels, minlength=N_CLASSES)
        carry = Carry.zeros(1)
        sums = np.zeros((1, N_CLASSES))
        for first, last in self._bands(0, _FIRST_NEGATIVE_BIN):
            sums += self._band(first, last, side, carry)
        sums += zero_group(carry, by_class.sum(axis=1), by_class, n_by_class)
        for first, last in self._bands(_FIRST_NEGATIVE_BIN, len(self._bins)):
            sums += self._band(first, last, side, carry)
        return Found(sums / np.maximum(n_by_class, 1), by_class)

    def column(self, column: int, side: int = ALL) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Values and labels, piece by piece."""
        for entries in _labelled(self._codes, self._side, self._latent, self._latent + 1):
            yield entries.on(side).values, entries.on(side).labels

    def _bands(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        for start, stop in ranges(self._bins[first:last], self._max_entries):
            yield first + start, first + stop

    def _band(self, first: int, last: int, side: int, carry: Carry) -> np.ndarray:
        kept_values, kept_labels = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
        for values, labels in self.column(0, side):
            bins = _bin(values)
            inside = (bins >= first) & (bins < last)
            kept_values.append(values[inside])
            kept_labels.append(labels[inside])
        values, labels = np.concatenate(kept_values), np.concatenate(kept_labels)
        return precision_sums(np.zeros(len(values), np.int64), values, labels, carry)


def _bin(values: np.ndarray) -> np.ndarray:
    """The leading bits of the descending key, at which bands may be cut, int64 [n]."""
    return (descending_key(values) >> np.uint32(32 - _BIN_BITS)).astype(np.int64)
