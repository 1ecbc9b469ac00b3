"""Putting things into groups. This module must not import torch, because `saev size` uses it."""

import typing as tp
from collections.abc import Callable, Iterable

from saev import limits

_SUMS_BYTES = 2 * (64 + 8 * limits.HISTOGRAM_BINS)
"""Bytes of a latent's counts, sums, largest value and histogram, of all and of held-out images."""
_EXAMPLE_BYTES = 28
"""Bytes of one example of a latent, without the values of its tokens, which take 8 bytes each."""

_T = tp.TypeVar("_T")
_Key = tp.TypeVar("_Key")


def group_by(members: Iterable[_T], key: Callable[[_T], _Key]) -> dict[_Key, list[_T]]:
    """The members by key, in their order."""
    found: dict[_Key, list[_T]] = {}
    for one in members:
        found.setdefault(key(one), []).append(one)
    return found


def measuring_bytes(d_model: int, d_sae: int, tokens: int, n_top: int) -> int:
    """Most bytes of memory that an SAE takes while it is measured.

    These are its weights, and for each latent its sums and its examples (if it fires on all of
    their tokens), and two pieces of codes.

    Args:
        d_model: width of the activations.
        d_sae: number of latents.
        tokens: tokens of an example that are read.
        n_top: examples kept per latent.
    """
    n_examples = n_top + limits.SPREAD_EXAMPLES
    latent = 8 * d_model + _SUMS_BYTES + n_examples * (_EXAMPLE_BYTES + 8 * tokens)
    return d_sae * latent + 2 * 8 * limits.PIECE_ENTRIES


def measured_together(
    saes: Iterable[_T], tokens: Callable[[_T], tp.Hashable], n_bytes: Callable[[_T], int]
) -> list[list[_T]]:
    """Put SAEs into groups. The SAEs of a group read their tokens once, together.

    Args:
        saes: the SAEs.
        tokens: returns what identifies the tokens that an SAE reads.
        n_bytes: returns the memory that an SAE takes, see :func:`measuring_bytes`. The SAEs of a
            group take GROUP_BYTES at most. It is not called for an SAE that shares its tokens with
            no other SAE.
    """
    groups: list[list[_T]] = []
    for members in group_by(saes, tokens).values():
        held = 0
        for number, one in enumerate(members):
            more = n_bytes(one) if len(members) > 1 else 0
            if number == 0 or held + more > limits.GROUP_BYTES:
                groups.append([])
                held = 0
            groups[-1].append(one)
            held += more
    return groups
