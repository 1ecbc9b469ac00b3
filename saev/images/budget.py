"""How many pixels are held at once, by all threads that decode.

A decoder asks once it knows an image's size and before it unpacks a pixel; the answer comes when
there is room. So memory does not grow with the number of large images that happen to be neighbours.
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


def admit(width: int, height: int) -> None:
    """Wait until an image of so many pixels may be unpacked. Where there is no budget, go on."""
    ask = _ADMIT.get()
    if ask is not None:
        ask(width, height)


class PixelBudget:
    """Pixels that threads may hold together. An image larger than all of it goes alone.

    Args:
        total: number of pixels.
    """

    def __init__(self, total: int):
        self.total = total
        self._in_use = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def example(self, cost: Callable[[int, int], int]) -> Iterator[None]:
        """One example, whose pixels are given back at the end of the block.

        Only the first image in the block has to ask: its mask is of the same size, and must not
        wait for others that wait for it.

        Args:
            cost: pixels that an example needs, by width and height of its image.
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
