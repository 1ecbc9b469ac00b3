"""A limit on the pixels that all threads that decode hold at once.

A decoder asks for room when it knows an image's size, before it unpacks a pixel. It waits until
there is room. So memory does not grow with the number of large images that follow each other.
"""

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator

PIXELS_PER_WORKER = 16 << 20
"""What each thread may hold on average; photographs of this size never wait."""

_ADMIT: contextvars.ContextVar[Callable[[int, int], None] | None] = contextvars.ContextVar(
    "saev_admit", default=None
)


Cost = Callable[[int, int], int]
"""Pixels that an example needs, by width and height of its image."""


def admit(width: int, height: int) -> None:
    """Wait until an image of so many pixels may be unpacked. Without a budget, return at once."""
    ask = _ADMIT.get()
    if ask is not None:
        ask(width, height)


class PixelBudget:
    """Pixels that threads may hold together. An image larger than the total is decoded alone.

    Args:
        total: number of pixels.
    """

    def __init__(self, total: int):
        self.total = total
        self._in_use = 0
        self._changed = threading.Condition()

    @classmethod
    def of_threads(cls, n: int, max_pixels: int) -> "PixelBudget":
        """What ``n`` threads may hold that decode images of at most ``max_pixels``."""
        return cls(max(max_pixels, PIXELS_PER_WORKER * n))

    @contextlib.contextmanager
    def example(self, cost: Cost) -> Iterator[None]:
        """Hold the pixels of one example until the end of the block.

        Only the first image in the block waits for room. Its mask has the same size and does not
        wait, because two threads could otherwise wait for each other.

        Args:
            cost: pixels that the example needs.
        """
        held = 0

        def ask(width: int, height: int) -> None:
            nonlocal held
            if not held:
                held = self._take(cost(width, height))

        token = _ADMIT.set(ask)
        try:
            yield
        finally:
            _ADMIT.reset(token)
            self._give(held)

    def _take(self, n: int) -> int:
        n = max(1, min(n, self.total))
        with self._changed:
            self._changed.wait_for(lambda: self._in_use + n <= self.total)
            self._in_use += n
        return n

    def _give(self, n: int) -> None:
        with self._changed:
            self._in_use -= n
            self._changed.notify_all()
