"""What a weights file without a tag leaves open: the activation function, and the preprocessing.

Libraries of models tell these by the pretrained tag, not by the architecture or the file. The same
rules hold for every family: what the name says; what the file's own tensors show; what all
tags of the architecture agree on; else the library's default, with a warning that names the way.
"""

import logging
import typing as tp
from collections.abc import Collection, Mapping, Sequence

from saev.once import say_once

logger = logging.getLogger(__name__)

OPENAI = "openai"
"""Tag of OpenAI's own weights, in every library."""
ACTIVATION = "activation function"
_OPENAI_SCALARS = frozenset({"input_resolution", "context_length", "vocab_size"})
_SHOWN = 3


class Open(tp.NamedTuple):
    """Something on which the tags of an architecture disagree."""

    what: str
    """What it is called."""
    taken: str
    """The value that is taken."""
    values: dict[str, list[str]]
    """Values, each with the tags that have it."""


def is_openai(names: Collection[str]) -> bool:
    """Whether tensors of these names come from OpenAI's CLIP archives.

    Only those hold the sizes of the network as tensors beside the weights
    (https://github.com/openai/CLIP, clip/model.py, build_model).
    """
    return any(name.rpartition(".")[2] in _OPENAI_SCALARS for name in names)


def by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Tags by what they say. Takes the value of each tag."""
    found: dict[str, list[str]] = {}
    for tag, value in values.items():
        found.setdefault(value, []).append(tag)
    return found


def quick_gelu(tags: Mapping[str, bool], default: bool) -> tuple[bool, Open | None]:
    """Whether a network has QuickGELU, as far as the tags of its architecture tell.

    Args:
        tags: what each of them says.
        default: what the architecture has by itself.

    Returns:
        The answer, and what is open if the tags disagree.
    """
    if default or not tags:
        return default, None
    found = by_value({tag: "QuickGELU" if quick else "GELU" for tag, quick in tags.items()})
    if len(found) == 1:
        return next(iter(tags.values())), None
    return default, Open(ACTIVATION, "GELU", found)


def warn_unlike(named: str, url: str) -> None:
    """Say that a name asks for another activation function than the file shows."""
    say_once(
        logger,
        f"{url} holds weights of OpenAI's CLIP, which were trained with QuickGELU, as the tensors "
        f"in it show; {named} asks for GELU, which is taken. If that is wrong, name the tag: "
        f"ARCH/{OPENAI}@URL.",
    )


def warn(arch: str, url: str, way: str, found: Sequence[Open]) -> None:
    """Say what was taken where the tags disagree, and how to choose."""
    if found:
        parts = "; ".join(map(_describe, found))
        say_once(
            logger,
            f"{url} does not say which of the pretrained tags of {arch} it belongs to, and they "
            f"disagree: {parts}. If that is wrong, name the tag: {way}.",
        )


def _describe(item: Open) -> str:
    values = " or ".join(f"{value} ({_list(names)})" for value, names in item.values.items())
    return f"{item.what} is {values}, and {item.taken} is taken"


def _list(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
