"""Concept alignment: per class, the latent that alone finds the class's tokens best.

Latents are visited in blocks that hold a bounded number of entries; the pieces of stored codes are
by latent, so all blocks together read them once. A single latent that fires more often than the
bound is visited in bands of falling values, with the counts of the bands above carried along.
"""

import typing as tp
from collections.abc import Iterable, Iterator

import numpy as np

from saev.config.base import Config
from saev.inference.alignment import (
    N_CLASSES,
    Carry,
    average_precision,
    descending_key,
    precision_sums,
    probe_r,
    purity,
    zero_group,
)
from saev.inference.codes import Piece, StoredCodes

MAX_ENTRIES = 1 << 21
"""Entries held at a time: about 300 MB with what sorting them takes."""

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
    """Of the latent's values as a ranking of all labelled tokens."""
    purity_at_16: float
    """Share of the class among the 16 tokens with the highest values."""
    probe_r: float
    """McFadden's pseudo-R² of a logistic probe on the latent."""


def align(
    codes: StoredCodes, counts: np.ndarray, max_entries: int = MAX_ENTRIES
) -> list[ClassAlignment]:
    """Find the best latent of every class that occurs.

    Tokens without a label (the class token) do not take part.

    Args:
        codes: with labels.
        counts: entries per latent over all of `codes`, int64 [d_sae].
        max_entries: most entries to hold at a time.

    Returns:
        One row per class, by label.
    """
    n_by_class = np.zeros(N_CLASSES, dtype=np.int64)
    for piece in codes:
        labels = piece.array("label")
        n_by_class += np.bincount(labels[labels >= 0], minlength=N_CLASSES)
    best_ap = np.full(N_CLASSES, -1.0)
    best: dict[int, ClassAlignment] = {}
    for start, stop in _blocks(counts, max_entries):
        is_long = int(counts[start:stop].sum()) > max_entries
        block = (_LongColumn if is_long else _Block)(codes, start, stop, max_entries)
        ap = block.average_precision(n_by_class)
        for label in np.flatnonzero((n_by_class > 0) & (ap.max(axis=0) > best_ap)).tolist():
            column = int(ap[:, label].argmax())
            best_ap[label] = ap[column, label]
            best[label] = _describe(block, column, start, label, ap, n_by_class)
    return [best[label] for label in sorted(best)]


def summarize(classes: tp.Sequence[ClassAlignment]) -> dict[str, float | int]:
    """Means over classes, under the names that metrics.json has."""
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
    """Entries that decide `purity`: the strongest and those tied with the last of them.

    The rest may be counted as silent without changing it, as long as there are enough that are
    positive; if not, all entries are kept.
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


def _blocks(counts: np.ndarray, max_entries: int) -> Iterator[tuple[int, int]]:
    """Ranges of latents with at most so many entries; a longer latent is alone."""
    start, held = 0, 0
    for latent, count in enumerate(counts.tolist()):
        if latent > start and held + count > max_entries:
            yield start, latent
            start, held = latent, 0
        held += count
    if start < len(counts):
        yield start, len(counts)


def _labelled(
    codes: StoredCodes, start: int, stop: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per piece: column (from 0), value and label of the entries of latents start:stop."""

    def read(piece: Piece) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        columns = piece.columns(start, stop)
        if not len(columns.values):
            return columns.latents, columns.values, columns.latents
        labels = piece.array("label")[columns.rows].astype(np.int64)
        keep = labels >= 0
        return columns.latents[keep], columns.values[keep], labels[keep]

    return codes.map(read)


class _Block:
    """Some latents, all of whose entries are in memory."""

    def __init__(self, codes: StoredCodes, start: int, stop: int, max_entries: int):
        self._n_latents = stop - start
        parts = list(_labelled(codes, start, stop))
        empty = (np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64))
        fields = zip(empty, *parts, strict=True)
        self._latents, self._values, self._labels = (np.concatenate(field) for field in fields)

    def average_precision(self, n_by_class: np.ndarray) -> np.ndarray:
        """float64 [latents, N_CLASSES]."""
        return average_precision(
            self._latents, self._values, self._labels, self._n_latents, n_by_class
        )

    def column(self, column: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Values and labels of one latent."""
        mine = self._latents == column
        yield self._values[mine], self._labels[mine]


class _LongColumn:
    """One latent that has too many entries to hold: every question is a pass over them."""

    def __init__(self, codes: StoredCodes, start: int, stop: int, max_entries: int):
        self._codes, self._latent, self._max_entries = codes, start, max_entries
        self._bins = np.zeros(1 << _BIN_BITS, dtype=np.int64)
        self._by_class = np.zeros(N_CLASSES, dtype=np.int64)
        for values, labels in self.column(0):
            self._bins += np.bincount(_bin(values), minlength=len(self._bins))
            self._by_class += np.bincount(labels, minlength=N_CLASSES)

    def average_precision(self, n_by_class: np.ndarray) -> np.ndarray:
        """float64 [1, N_CLASSES]."""
        carry = Carry.zeros(1)
        sums = np.zeros((1, N_CLASSES))
        for first, last in self._bands(0, _FIRST_NEGATIVE_BIN):
            sums += self._band(first, last, carry)
        active = np.array([self._by_class.sum()])
        sums += zero_group(carry, active, self._by_class[None], n_by_class)
        for first, last in self._bands(_FIRST_NEGATIVE_BIN, len(self._bins)):
            sums += self._band(first, last, carry)
        return sums / np.maximum(n_by_class, 1)

    def column(self, column: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Values and labels, piece by piece."""
        for _, values, labels in _labelled(self._codes, self._latent, self._latent + 1):
            yield values, labels

    def _bands(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        for start, stop in _blocks(self._bins[first:last], self._max_entries):
            yield first + start, first + stop

    def _band(self, first: int, last: int, carry: Carry) -> np.ndarray:
        kept_values, kept_labels = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
        for values, labels in self.column(0):
            bins = _bin(values)
            inside = (bins >= first) & (bins < last)
            kept_values.append(values[inside])
            kept_labels.append(labels[inside])
        values, labels = np.concatenate(kept_values), np.concatenate(kept_labels)
        return precision_sums(np.zeros(len(values), np.int64), values, labels, carry)


def _bin(values: np.ndarray) -> np.ndarray:
    """Bands are cut along these: the leading bits of the descending key, int64 [n]."""
    return (descending_key(values) >> np.uint32(32 - _BIN_BITS)).astype(np.int64)
