"""One log line with the number and kinds of files that are left out of a dataset."""

import collections
import logging
import typing as tp
from collections.abc import Iterable

from saev import storage
from saev.images.decode import HEIC_SUFFIXES
from saev.once import say_once

logger = logging.getLogger(__name__)

_N_SUFFIXES = 4
"""Most suffixes of other files that are named."""


class LeftOut(tp.NamedTuple):
    """Numbers of files below a folder that are not examples, and of empty images."""

    heic: int = 0
    """HEIC files, if they are not read."""
    no_suffix: int = 0
    """Files without a suffix."""
    hidden: int = 0
    """Files whose path has a component that starts with a dot."""
    others: tuple[tuple[str, int], ...] = ()
    """Suffixes and their numbers, the most frequent first."""
    empty: int = 0
    """Images of zero bytes. They count as examples that cannot be decoded."""

    @property
    def may_be_images(self) -> bool:
        """Whether some of these files are probably images."""
        return bool(self.heic or self.no_suffix or self.empty)

    def __str__(self) -> str:
        n_others = sum(n for _, n in self.others)
        kinds = ", ".join(suffix for suffix, _ in self.others[:_N_SUFFIXES])
        more = ", …" if len(self.others) > _N_SUFFIXES else ""
        parts = [
            f"{self.heic} HEIC (--data.heic reads them)" if self.heic else "",
            f"{self.no_suffix} without a suffix" if self.no_suffix else "",
            f"{self.hidden} hidden" if self.hidden else "",
            f"{n_others} other files ({kinds}{more})" if n_others else "",
        ]
        return ", ".join(part for part in parts if part)


def count(left: Iterable[tuple[str, str]], n_empty: int) -> LeftOut:
    """Count files by kind.

    Args:
        left: key and name of each file that is not an example.
        n_empty: number of examples of zero bytes.
    """
    kinds: collections.Counter[str] = collections.Counter()
    for key, name in left:
        suffix = "." + name.rpartition(".")[2].lower() if "." in name else ""
        if any(component.startswith(".") for component in key.split("/")):
            kinds["hidden"] += 1
        else:
            kinds[suffix] += 1
    n_heic = sum(kinds.pop(suffix, 0) for suffix in HEIC_SUFFIXES)
    hidden, no_suffix = kinds.pop("hidden", 0), kinds.pop("", 0)
    others = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return LeftOut(n_heic, no_suffix, hidden, tuple(others), n_empty)


def say(url: str, n_images: int, what: str, left: LeftOut) -> None:
    """Log one line about a folder if files in it are left out or empty.

    Args:
        url: the folder.
        n_images: number of examples.
        what: name of the examples, in the plural.
        left: the files that are left out.
    """
    parts = [f"{n_images} {what}"]
    if str(left):
        parts.append(f"left out: {left}")
    if left.empty:
        parts.append(f"{left.empty} of the {what} are empty files (0 bytes)")
    if len(parts) > 1:
        level = logging.WARNING if left.may_be_images else logging.INFO
        say_once(logger, f"{storage.normalize(url)}: {'; '.join(parts)}.", level=level)
