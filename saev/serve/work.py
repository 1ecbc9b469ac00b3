"""Threads for what blocks: a few for reading, one or two for what computes long."""

import asyncio
import typing as tp

import anyio
import anyio.to_thread

from saev.serve.problems import Problem

READERS, COMPUTERS, PREPARERS = 8, 2, 2
MAX_WAITING = 8
"""Requests that wait until another one has computed; one more is refused."""

T = tp.TypeVar("T")


class Pool:
    """Runs functions in threads, so many at a time. Made in the event loop that uses it."""

    def __init__(self) -> None:
        self._reading = anyio.CapacityLimiter(READERS)
        self._computing = anyio.CapacityLimiter(COMPUTERS)
        self._preparing = anyio.CapacityLimiter(PREPARERS)
        self._once: dict[tp.Hashable, asyncio.Task[tp.Any]] = {}

    async def read(self, work: tp.Callable[[], T]) -> T:
        """Run what reads tables or files, which takes a moment."""
        return await anyio.to_thread.run_sync(work, limiter=self._reading)

    async def compute(self, work: tp.Callable[[], T]) -> T:
        """Run what takes long.

        Raises:
            Problem: too many others wait already.
        """
        if self._computing.statistics().tasks_waiting >= MAX_WAITING:
            raise Problem(
                429, "The server computes for others already, and more wait.",
                "Ask again in a moment.", wait=5,
            )  # fmt: skip
        return await anyio.to_thread.run_sync(work, limiter=self._computing)

    async def once(self, key: tp.Hashable, work: tp.Callable[[], T]) -> T:
        """Run what takes seconds and is kept. All who ask for the same key meanwhile wait for one
        result, and no thread waits with them. It goes on if they leave."""
        task = self._once.get(key)
        if task is None:
            task = asyncio.create_task(anyio.to_thread.run_sync(work, limiter=self._preparing))
            self._once[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        return tp.cast(T, await asyncio.shield(task))

    def _forget(self, key: tp.Hashable, task: "asyncio.Task[tp.Any]") -> None:
        del self._once[key]
        if not task.cancelled():
            task.exception()  # else asyncio warns where nobody waits any more
