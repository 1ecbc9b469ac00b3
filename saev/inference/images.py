"""Values of latents on whole images: the largest and the mean value over an image's tokens.

There are about ten times fewer of them than values on tokens. Statistics of classes, and everything
else about whole images, are computed from them.
"""

import typing as tp

import numpy as np

from saev.inference.codes import Columns, TokenRows


class ImageActs(tp.NamedTuple):
    """Pairs of a latent and an image on which it fires, by latent, then by image."""

    columns: Columns
    """Largest values over the image's tokens, float32; rows are images."""
    means: np.ndarray
    """Mean over all selected tokens of the image, zeros included, float32 [n]."""
    example_idx: np.ndarray
    """The image that each row is, int64 [n_images], ascending."""
    n_tokens: np.ndarray
    """Selected tokens of each image, int64 [n_images]."""
    starts: np.ndarray
    """Where each pair's tokens begin among the entries of the codes, int64 [n]."""
    lengths: np.ndarray
    """Tokens of each pair on which the latent fires, int64 [n]."""

    @classmethod
    def of(cls, codes: Columns, tokens: TokenRows) -> "ImageActs":
        """Compute from the codes of whole examples."""
        is_first = np.diff(tokens.example_idx, prepend=-1) != 0
        row_of_token = np.cumsum(is_first, dtype=np.int32) - np.int32(1)
        example_idx = tokens.example_idx[is_first]
        n_tokens = np.bincount(row_of_token, minlength=len(example_idx))
        rows = row_of_token[codes.rows]
        is_new = np.ones(len(rows), dtype=bool)
        np.not_equal(rows[1:], rows[:-1], out=is_new[1:])
        is_new[codes.indptr[:-1][np.diff(codes.indptr) > 0]] = True  # each latent's first
        starts = np.flatnonzero(is_new)
        if not len(starts):
            peaks, sums = codes.values, np.zeros(0)
        else:
            peaks = np.maximum.reduceat(codes.values, starts)
            sums = np.add.reduceat(codes.values.astype(np.float64), starts)
        # Each latent that fires at all begins a pair.
        indptr = np.searchsorted(starts, codes.indptr).astype(np.int64, copy=False)
        columns = Columns(indptr, rows[starts], peaks)
        means = (sums / n_tokens[columns.rows]).astype(np.float32)
        lengths = np.diff(starts, append=len(rows))
        return cls(columns, means, example_idx, n_tokens, starts, lengths)
