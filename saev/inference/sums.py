"""Sums and histograms of each latent's values, over tokens.

Histograms are counts in bins that are the same for all latents, so they are exact, and parts merge
in any order. A bin is an eighth of an octave, taken from the leading bits of the float32 number:
within each octave 2^e to 2^(e+1) there are eight bins of equal width.
"""

import typing as tp

import numpy as np

from saev.inference.codes import Columns
from saev.limits import HISTOGRAM_BINS

BINS_PER_OCTAVE = 8
LOW_EXPONENT = -12
N_BINS = HISTOGRAM_BINS
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

_SHIFT = 20
"""Bits of a float32's mantissa that do not count."""
_FIRST = (LOW_EXPONENT + 127) * BINS_PER_OCTAVE
_BLOCK_LATENTS = 1 << 13


def bin_edges() -> np.ndarray:
    """Edges of the bins, float64 [N_BINS + 1]. Smaller values (negative ones, too) are in the first
    bin, larger ones in the last."""
    index = np.arange(N_BINS + 1)
    octave, step = np.divmod(index, BINS_PER_OCTAVE)
    return 2.0 ** (octave + LOW_EXPONENT) * (1 + step / BINS_PER_OCTAVE)


def bins_of(values: np.ndarray) -> np.ndarray:
    """The bin of each float32 value, int32 [n]."""
    bins = np.ascontiguousarray(values, dtype=np.float32).view(np.int32) >> np.int32(_SHIFT)
    bins -= np.int32(_FIRST)
    return np.clip(bins, 0, N_BINS - 1, out=bins)


class LatentSums:
    """What is known of each latent from its values alone.

    Args:
        d_sae: number of latents.
    """

    def __init__(self, d_sae: int):
        self.n_tokens = 0
        """Tokens, with those on which no latent fires."""
        self.n_images = 0
        """Examples."""
        self.counts = np.zeros(d_sae, dtype=np.int64)
        """Tokens on which each latent fires."""
        self.image_counts = np.zeros(d_sae, dtype=np.int64)
        """Examples on which each latent fires."""
        self.value_sums = np.zeros(d_sae)
        """Σ f per latent, float64."""
        self.max_values = np.full(d_sae, -np.inf, dtype=np.float32)
        """Largest value per latent; -inf if it never fires."""
        self.histogram = np.zeros((d_sae, N_BINS), dtype=np.int64)
        """Tokens by value."""

    def add(self, columns: Columns, image_counts: np.ndarray, n_tokens: int, n_images: int) -> None:
        """Add the codes of some whole examples."""
        self.n_tokens += n_tokens
        self.n_images += n_images
        counts = columns.counts
        self.counts += counts
        self.image_counts += image_counts
        firing = np.flatnonzero(counts)
        if not len(firing):
            return
        starts = columns.indptr[firing]
        self.value_sums[firing] += np.add.reduceat(columns.values.astype(np.float64), starts)
        peaks = np.maximum.reduceat(columns.values, starts)
        self.max_values[firing] = np.maximum(self.max_values[firing], peaks)
        for start in range(0, len(counts), _BLOCK_LATENTS):
            stop = min(start + _BLOCK_LATENTS, len(counts))
            first, last = columns.indptr[start], columns.indptr[stop]
            cell = bins_of(columns.values[first:last])
            firsts = np.arange(stop - start, dtype=np.int32) * np.int32(N_BINS)
            cell += np.repeat(firsts, counts[start:stop])
            found = np.bincount(cell, minlength=(stop - start) * N_BINS)
            self.histogram[start:stop] += found.reshape(-1, N_BINS)

    def merge(self, other: "LatentSums") -> None:
        """Add a later part."""
        self.n_tokens += other.n_tokens
        self.n_images += other.n_images
        for name in ("counts", "image_counts", "value_sums", "histogram"):
            mine = getattr(self, name)
            mine += getattr(other, name)
        np.maximum(self.max_values, other.max_values, out=self.max_values)

    def tensors(self) -> dict[str, np.ndarray]:
        """For storage; :meth:`from_tensors` is the inverse. Of the histogram the cells that are not
        empty."""
        cells = np.flatnonzero(self.histogram)
        return {
            "n": np.array([self.n_tokens, self.n_images], dtype=np.int64),
            "counts": self.counts,
            "image_counts": self.image_counts,
            "value_sums": self.value_sums,
            "max_values": self.max_values,
            "cells": cells.astype(np.int64),
            "cell_counts": self.histogram.reshape(-1)[cells],
        }

    @classmethod
    def from_tensors(cls, tensors: tp.Mapping[str, np.ndarray]) -> "LatentSums":
        """Inverse of :meth:`tensors`."""
        self = cls(len(tensors["counts"]))
        self.n_tokens, self.n_images = (int(n) for n in tensors["n"])
        for name in ("counts", "image_counts", "value_sums", "max_values"):
            setattr(self, name, tensors[name])
        self.histogram.reshape(-1)[tensors["cells"]] = tensors["cell_counts"]
        return self

    def means(self) -> np.ndarray:
        """Mean value over the tokens on which each latent fires, float64; 0 if there are none."""
        return self.value_sums / np.maximum(self.counts, 1)

    def peaks(self) -> np.ndarray:
        """Largest value of each latent, float32; 0 if it never fires."""
        return np.where(self.counts > 0, self.max_values, np.float32(0))

    def quantiles(self) -> np.ndarray:
        """QUANTILES of each latent's values where it fires, float32 [d_sae, n]; NaN if it never
        fires. Values are taken to be spread evenly within a bin, so that the error is at most the
        bin's width, an eighth of the value; none is above the largest value."""
        edges = bin_edges()
        below = np.cumsum(self.histogram, axis=1)
        found = np.full((len(self.counts), len(QUANTILES)), np.nan, dtype=np.float32)
        firing = np.flatnonzero(self.counts)
        for column, q in enumerate(QUANTILES):
            rank = q * self.counts[firing]
            at = (below[firing] < rank[:, None]).sum(axis=1).clip(0, N_BINS - 1)
            inside = self.histogram[firing, at]
            share = (rank - (below[firing, at] - inside)) / np.maximum(inside, 1)
            value = edges[at] + share * (edges[at + 1] - edges[at])
            found[firing, column] = np.minimum(value, self.max_values[firing])
        return found
