"""How things are put into groups. It must not import torch, because `saev size` uses it."""

import typing as tp
from collections.abc import Callable, Iterable

from saev import limits

_T = tp.TypeVar("_T")
_Key = tp.TypeVar("_Key")


def group_by(members: Iterable[_T], key: Callable[[_T], _Key]) -> dict[_Key, list[_T]]:
    """Members with equal keys together, in their order."""
    found: dict[_Key, list[_T]] = {}
    for one in members:
        found.setdefault(key(one), []).append(one)
    return found


def measured_together(
    saes: Iterable[_T], tokens: Callable[[_T], tp.Hashable], n_bytes: Callable[[_T], int]
) -> list[list[_T]]:
    """SAEs in groups, each of which reads its tokens once.

    Args:
        saes: the SAEs.
        tokens: returns what identifies the tokens that an SAE reads.
        n_bytes: returns the size of an SAE's weights. Those of a group have room in GROUP_BYTES.
            It is not called for an SAE that no other one shares its tokens with.
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
