"""A limit on the pixels that all decoding threads hold at the same time.

When a decoder knows the size of an image, it asks for memory before it decodes any pixel, and waits
until there is enough. So several large images in a row do not use too much memory.
"""

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator

PIXELS_PER_WORKER = 16 << 20
"""Pixels per thread on average. Photographs up to this size never wait."""

_ADMIT: contextvars.ContextVar[Callable[[int, int], None] | None] = contextvars.ContextVar(
    "saev_admit", default=None
)


Cost = Callable[[int, int], int]
"""Pixels that an example needs, by width and height of its image."""


def admit(width: int, height: int) -> None:
    """Wait until an image of this size may be decoded. Without a budget, return at once."""
    ask = _ADMIT.get()
    if ask is not None:
        ask(width, height)


class PixelBudget:
    """The pixels that threads may hold together. An image larger than the total is decoded alone.

    Args:
        total: number of pixels.
    """

    def __init__(self, total: int):
        self.total = total
        self._in_use = 0
        self._changed = threading.Condition()

    @classmethod
    def of_threads(cls, n: int, max_pixels: int) -> "PixelBudget":
        """The budget of ``n`` threads that decode images of at most ``max_pixels``."""
        return cls(max(max_pixels, PIXELS_PER_WORKER * n))

    @contextlib.contextmanager
    def example(self, cost: Cost) -> Iterator[None]:
        """Hold the pixels of one example until the end of the block.

        Only the first image in the block waits. Its mask has the same size and does not wait:
        otherwise two threads could wait for each other.

        Args:
            cost: pixels of the whole example.
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
