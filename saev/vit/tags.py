"""Activation function and preprocessing of a weights file that is given without a tag.

Libraries of models store these with the pretrained tag, not with the architecture or the file. The
rules are the same for every family. The first that applies decides:

1. the name of the checkpoint;
2. the tensors of the file;
3. the value that all tags of the architecture have in common;
4. the default of the library, with a warning that says how to name the tag.
"""

import logging
import typing as tp
from collections.abc import Collection, Mapping, Sequence

from saev.once import say_once

logger = logging.getLogger(__name__)

OPENAI = "openai"
"""Tag of OpenAI's weights in all libraries."""
ACTIVATION = "activation function"
_OPENAI_SCALARS = frozenset({"input_resolution", "context_length", "vocab_size"})
_SHOWN = 3


class Disagreement(tp.NamedTuple):
    """A property in which the tags of an architecture differ."""

    what: str
    """Name of the property."""
    taken: str
    """The value that is used."""
    values: dict[str, list[str]]
    """Values, each with the tags that have it."""


def is_openai(names: Collection[str]) -> bool:
    """Whether tensors with these names come from OpenAI's CLIP archives.

    Only these archives hold the sizes of the network as tensors
    (https://github.com/openai/CLIP, clip/model.py, build_model).
    """
    return any(name.rpartition(".")[2] in _OPENAI_SCALARS for name in names)


def by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Invert a mapping from tag to value: all tags of each value."""
    found: dict[str, list[str]] = {}
    for tag, value in values.items():
        found.setdefault(value, []).append(tag)
    return found


def quick_gelu(tags: Mapping[str, bool], default: bool) -> tuple[bool, Disagreement | None]:
    """Whether a network has QuickGELU, judged by the tags of its architecture.

    Args:
        tags: whether each tag has QuickGELU.
        default: whether the architecture has QuickGELU without a tag.

    Returns:
        Whether it has QuickGELU, and the disagreement of the tags, if there is one.
    """
    if default or not tags:
        return default, None
    found = by_value({tag: "QuickGELU" if quick else "GELU" for tag, quick in tags.items()})
    if len(found) == 1:
        return next(iter(tags.values())), None
    return default, Disagreement(ACTIVATION, "GELU", found)


def warn_of_gelu(named: str, url: str) -> None:
    """Warn that a name asks for GELU, although the file's weights were trained with QuickGELU."""
    say_once(
        logger,
        f"{url} holds weights of OpenAI's CLIP, which were trained with QuickGELU, as the tensors "
        f"in it show; {named} asks for GELU, which is taken. If that is wrong, name the tag: "
        f"ARCH/{OPENAI}@URL.",
    )


def warn_of(found: Sequence[Disagreement], arch: str, url: str, way: str) -> None:
    """Warn of disagreements between tags: which values were used, and how to choose others."""
    if found:
        parts = "; ".join(map(_describe, found))
        say_once(
            logger,
            f"{url} does not say which of the pretrained tags of {arch} it belongs to, and they "
            f"disagree: {parts}. If that is wrong, name the tag: {way}.",
        )


def _describe(item: Disagreement) -> str:
    values = " or ".join(f"{value} ({_list(names)})" for value, names in item.values.items())
    return f"{item.what} is {values}, and {item.taken} is taken"


def _list(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
