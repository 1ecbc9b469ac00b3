"""What the answers of one server share: the SAEs, memory, threads, pictures, notes."""

import asyncio
import typing as tp

from saev.serve import pictures, searching
from saev.serve.cache import ByteCache
from saev.serve.catalogue import Catalogue
from saev.serve.measured import Measured
from saev.serve.notes import Notes
from saev.serve.work import Pool

_OWN_MB = 400
"""Memory of the process itself: Python, its packages, and the answers that are being made."""
_KEPT_SHARE = 0.4
"""Of the rest, what is kept. Tables take more while they are read."""


class Explorer:
    """One server's state.

    Args:
        catalogue: the SAEs.
        memory_mb: most megabytes that the process may take.
        notes: where notes are; None leaves them to the browsers.
        ckpt: where the weights of the model are now, if they have moved.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        memory_mb: float,
        notes: Notes | None = None,
        ckpt: str = "",
    ):
        self.catalogue, self.notes, self.ckpt = catalogue, notes, ckpt
        self.cache = ByteCache(int(_KEPT_SHARE * (memory_mb - _OWN_MB) * 1e6))
        self.originals = pictures.Originals()
        self.pool = Pool()
        self._tasks: set[asyncio.Task[tp.Any]] = set()

    async def measured(self, key: str) -> Measured:
        """The tables of an SAE.

        Raises:
            Problem: there is none, or it has no tables.
        """
        return await self.pool.read(lambda: self._measured(key))

    def _measured(self, key: str) -> Measured:
        entry = self.catalogue.find(key)
        return self.cache.get((key, "measured"), lambda: Measured(entry, self.cache))

    async def with_names(self, key: str) -> Measured:
        """The tables of an SAE, with the names of its images at hand."""
        measured = await self.measured(key)
        if self.cache.peek((key, "names")) is None:
            await self.pool.once((key, "names"), measured.names)
        return measured

    async def searcher(self, key: str) -> searching.Searcher:
        """What finds things of an SAE."""
        measured = await self.measured(key)
        found = self.cache.peek((key, "searcher"))
        if found is not None:
            return tp.cast(searching.Searcher, found)
        return await self.pool.once(
            (key, "searcher"), lambda: searching.prepare(measured, self.cache)
        )

    def soon(self, key: str) -> None:
        """Prepare the search of an SAE in the background."""
        task = asyncio.create_task(self.searcher(key))
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: "asyncio.Task[tp.Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever searches gets it
