"""Stored values of a range of latents, read from all pieces.

Ranges are chosen so that they hold a bounded number of entries. Values are by latent in each piece,
so that all ranges together read each piece once.
"""

import typing as tp
from collections.abc import Iterable, Iterator

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


def read_images(acts: StoredCodes, counts: np.ndarray, start: int, stop: int) -> Block:
    """Values on images of a range of latents.

    Args:
        acts: values on images.
        counts: images on which each latent fires, int64 [d_sae].
        start: the first latent.
        stop: the latent behind the last one.
    """

    def values(piece: Piece) -> Part:
        columns = piece.columns(start, stop)
        bounds = piece.array("indptr", start, stop + 1)[[0, -1]].tolist()
        examples = piece.array("example_idx")[columns.rows]
        return Part(columns.counts, (examples, columns.values, piece.array("means", *bounds)))

    mine = counts[start:stop]
    fields = _joined(mine, acts.map(values), (np.int64, np.float32, np.float32))
    return Block(start, stop, np.repeat(np.arange(stop - start), mine), *fields)


class Part(tp.NamedTuple):
    """Entries of a range of latents in one piece, by latent."""

    counts: np.ndarray
    """Entries of each latent, int64 [latents]."""
    fields: tuple[np.ndarray, ...]
    """What is known of each entry."""


def read_tokens(codes: StoredCodes, start: int, stop: int) -> Iterator[Part]:
    """For each piece example int32, patch int32 and value float32 of the entries of some latents,
    by latent, then by token."""

    def values(piece: Piece) -> Part:
        columns = piece.columns(start, stop)
        fields = (
            piece.array(name).astype(np.int32, copy=False)[columns.rows] if len(columns.rows)
            else columns.rows
            for name in ("example_idx", "token_idx")
        )  # fmt: skip
        return Part(columns.counts, (*fields, columns.values))

    return codes.map(values)


def join_tokens(
    codes: StoredCodes, counts: np.ndarray, start: int, stop: int
) -> tuple[np.ndarray, ...]:
    """The entries of all pieces; see :func:`read_tokens` and :func:`read_images`."""
    kinds = (np.int32, np.int32, np.float32)
    return _joined(counts[start:stop], read_tokens(codes, start, stop), kinds)


def _joined(
    counts: np.ndarray, parts: Iterable[Part], kinds: tp.Sequence[type]
) -> tuple[np.ndarray, ...]:
    """The entries of all parts by latent, those of one latent in the order of parts. Each is put
    into its place at once, so that no more than the result and a few parts are in memory."""
    ends = np.cumsum(counts)
    following = ends - counts
    found: tuple[np.ndarray, ...] = tuple(np.empty(int(ends[-1]), dtype=kind) for kind in kinds)
    for part in parts:
        before = np.cumsum(part.counts) - part.counts
        at = np.repeat(following - before, part.counts)
        at += np.arange(len(at))
        for target, field in zip(found, part.fields, strict=True):
            target[at] = field
        following += part.counts
    return found
