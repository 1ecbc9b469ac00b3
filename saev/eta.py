"""Progress and remaining time, as text for the log of a pod."""

import contextlib
import os
import sys
import time
import typing as tp
from collections.abc import Callable, Iterator, Mapping

Clock = Callable[[], float]
"""Returns seconds since a fixed moment."""


def span(seconds: float) -> str:
    """A length of time, such as ``40 s``, ``4 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{max(0, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36 * 3600 else f"{seconds / 86400:.1f} d"


def percent(share: float) -> str:
    """A share, rounded down, so that only finished work is 100%."""
    return f"{int(100 * min(1.0, share) + 1e-9)}%"


def left(share: float, worked: float, elapsed: float) -> str:
    """``about 4 min left``; empty if there is no work yet to estimate from.

    Args:
        share: finished share of all work.
        worked: share of all work that was done in ``elapsed`` seconds.
        elapsed: seconds.
    """
    if worked <= 0 or share >= 1:
        return ""
    return f"about {span((1 - share) / worked * elapsed)} left"


class Slot:
    """Progress of the items of one pod, done one after the other. All items count equally.

    Args:
        n: number of items.
        clock: the clock.
    """

    def __init__(self, n: int, clock: Clock = time.monotonic):
        self._clock, self._started = clock, clock()
        self.n, self.number, self.name = n, 0, ""
        self._now = 0.0
        """Finished share of the current item."""
        self._found: float | None = None
        """Share of the current item that an earlier run had done; None if it is not known yet."""
        self._worked = 0.0
        """Items done by this process, including parts of items."""

    def start(self, name: str) -> None:
        """Go on to the next item. Previous items count as done, even if they failed."""
        self._worked += self._here(1.0)
        self.number, self.name, self._now, self._found = self.number + 1, name, 0.0, None

    def update(self, share: float) -> None:
        """Set the finished share of the current item. The first call sets the share that an earlier
        run had done."""
        if self._found is None:
            self._found = share
        self._now = max(self._now, share)

    def _here(self, now: float) -> float:
        """Share of the current item that was done by this process."""
        return 0.0 if self._found is None else max(0.0, now - self._found)

    @property
    def title(self) -> str:
        """Name of the current item, and its number if there are several."""
        return f"{self.name} ({self.number} of {self.n} here)" if self.n > 1 else self.name

    def said(self) -> str:
        """``slot 62%, about 4 min left``; empty if there is only one item."""
        if self.n < 2 or not self.number:
            return ""
        share = (self.number - 1 + self._now) / self.n
        worked = (self._worked + self._here(self._now)) / self.n
        words = ["slot " + percent(share), left(share, worked, self._clock() - self._started)]
        return ", ".join(filter(None, words))

    def to_dict(self) -> dict[str, tp.Any]:
        """State for another process, which continues to report progress."""
        return {
            "n": self.n, "number": self.number, "name": self.name, "now": self._now,
            "found": self._found, "worked": self._worked, "elapsed": self._clock() - self._started,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, raw: Mapping[str, tp.Any], clock: Clock = time.monotonic) -> tp.Self:
        """Inverse of :meth:`to_dict`."""
        slot = cls(int(raw["n"]), clock)
        slot.number, slot.name, slot._now = int(raw["number"]), str(raw["name"]), float(raw["now"])
        slot._found, slot._worked = raw["found"], float(raw["worked"])
        slot._started = clock() - float(raw["elapsed"])
        return slot


def silence_bars_of_libraries() -> None:
    """Keep tqdm from drawing bars of its own between ours: each of their updates would be a line.

    tqdm reads the variable when it is imported.
    """
    os.environ.setdefault("TQDM_DELAY", "1000000000")  # seconds until the first drawing


def bars_of_libraries() -> Iterator[str]:
    """Progress of tqdm's bars, such as those of downloads from a model hub, as lines of text."""
    tqdm = sys.modules.get("tqdm.std")
    for bar in list(getattr(getattr(tqdm, "tqdm", None), "_instances", ())):
        with contextlib.suppress(Exception):  # the bar may be closed by another thread
            found = bar.format_dict
            n, total, elapsed = float(found["n"]), found["total"], float(found["elapsed"])
            if not total or n >= total:
                continue
            scale = 1e6 if found["unit_scale"] else 1.0
            unit = f"M{found['unit']}" if found["unit_scale"] else found["unit"]
            words = [
                percent(n / total),
                f"{n / scale:,.0f}/{total / scale:,.0f} {unit}",
                left(n / total, (n - bar.initial) / total, elapsed),
            ]
            yield f"{found['prefix'] or 'download'}: {', '.join(filter(None, words))}"
