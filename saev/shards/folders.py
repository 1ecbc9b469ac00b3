"""Shards folders that stay open while several SAEs read them."""

import typing as tp

from saev import storage
from saev.shards.reader import Shards


class Folders:
    """Shards folders, each opened once. Closed by :meth:`close` or at the end of ``with``."""

    def __init__(self) -> None:
        self._shards: dict[str, Shards] = {}

    def __getitem__(self, url: str) -> Shards:
        """The folder at a URL.

        Raises:
            SaevError: as :meth:`Shards.open`.
        """
        url = storage.normalize(url)
        if url not in self._shards:
            self._shards[url] = Shards.open(url)
        return self._shards[url]

    def close(self) -> None:
        """Close all folders. The object may still be used; it opens folders again."""
        while self._shards:
            self._shards.popitem()[1].close()

    def __enter__(self) -> tp.Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
