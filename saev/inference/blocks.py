"""Stored values of a range of latents, read from all pieces.

Ranges are chosen so that they hold a bounded number of entries. Values are by latent in each piece,
so that all ranges together read each piece once.
"""

import typing as tp
from collections.abc import Iterator

import numpy as np

from saev.inference.codes import Piece, StoredCodes


class Block(tp.NamedTuple):
    """Values of some latents on images, by latent, then by image."""

    start: int
    stop: int
    latents: np.ndarray
    """From 0, int64 [nnz]."""
    examples: np.ndarray
    """int64 [nnz]."""
    values: np.ndarray
    """Largest, float32 [nnz]."""
    means: np.ndarray
    """float32 [nnz]."""


def ranges(
    counts: np.ndarray, most: int, most_latents: int | None = None
) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of latents with a bounded number of entries.

    Args:
        counts: entries of each latent, int64 [d_sae].
        most: most entries of a range. A latent with more entries is a range of its own.
        most_latents: most latents of a range; None for no limit.
    """
    most_latents = most_latents or len(counts)
    start, held = 0, 0
    for latent, count in enumerate(counts.tolist()):
        if latent > start and (held + count > most or latent - start >= most_latents):
            yield start, latent
            start, held = latent, 0
        held += count
    if start < len(counts):
        yield start, len(counts)


def read_images(acts: StoredCodes, start: int, stop: int) -> Block:
    """Values on images of a range of latents."""

    def values(piece: Piece) -> tuple[np.ndarray, ...]:
        columns = piece.columns(start, stop)
        bounds = piece.array("indptr", start, stop + 1)[[0, -1]].tolist()
        examples = piece.array("example_idx")[columns.rows]
        return columns.latents, examples, columns.values, piece.array("means", *bounds)

    kinds = (np.int64, np.int64, np.float32, np.float32)
    empty = tuple(np.empty(0, dtype=kind) for kind in kinds)
    fields = [np.concatenate(field) for field in zip(empty, *acts.map(values), strict=True)]
    order = np.argsort(fields[0], kind="stable")  # pieces come in the order of images
    return Block(start, stop, *(field[order] for field in fields))


def read_tokens(piece: Piece, start: int, stop: int) -> tuple[np.ndarray, ...]:
    """Latent (from 0), example, patch and value of the entries of some latents."""
    columns = piece.columns(start, stop)
    if not len(columns.rows):
        nothing = columns.rows
        return columns.latents, nothing, nothing, columns.values
    example, patch = piece.array("example_idx"), piece.array("token_idx")
    return columns.latents, example[columns.rows], patch[columns.rows], columns.values
