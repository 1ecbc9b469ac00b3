"""Images that several SAEs show. Each is decoded once, and kept in memory while it is needed."""

import concurrent.futures
import threading
import typing as tp
from collections import Counter
from collections.abc import Callable, Iterable

from saev import storage
from saev.config.images import ImageData
from saev.config.visuals import VisualsConfig
from saev.shards import Shards
from saev.shards.folders import Folders
from saev.visuals import render
from saev.visuals.source import Source
from saev.visuals.stored import Stored

_KEPT_BYTES = 1 << 29
"""Most bytes of images that are kept for other SAEs. If an image does not fit, it is decoded again
later."""


class Views:
    """Loads each image once for all of its uses. Threads may share it.

    Args:
        load: loads an example.
    """

    def __init__(self, load: Callable[[int], Stored]):
        self._load = load
        self._left: Counter[int] = Counter()
        self._kept: dict[int, concurrent.futures.Future[Stored]] = {}
        self._sizes: dict[int, int] = {}
        self._lock = threading.Lock()

    def expect(self, examples: Iterable[int]) -> None:
        """Announce one further use of each of these examples."""
        self._left.update(examples)

    def get(self, example: int) -> Stored:
        """An example by its row in the shards.

        Raises:
            ImageError: the image cannot be decoded, or is another one than the recorded one.
            StorageError: the image is gone.
        """
        with self._lock:
            self._left[example] -= 1
            found = self._kept.get(example)
            if found is None:
                loading = self._kept[example] = concurrent.futures.Future()
            else:
                self._drop_if_used_up(example)
        if found is not None:
            return found.result()
        try:
            shown = self._load(example)
        except BaseException as err:
            with self._lock:
                del self._kept[example]
            loading.set_exception(err)
            raise
        with self._lock:
            self._sizes[example] = shown.n_bytes
            if sum(self._sizes.values()) > _KEPT_BYTES:
                self._left[example] = 0
            self._drop_if_used_up(example)
        loading.set_result(shown)
        return shown

    def _drop_if_used_up(self, example: int) -> None:
        if self._left[example] <= 0 and example in self._sizes:
            del self._kept[example], self._sizes[example]


class Images:
    """Shards folders and their images. Each is opened once, for all SAEs."""

    def __init__(self) -> None:
        self._folders = Folders()
        self._sources: dict[str, Source] = {}
        self._views: dict[str, Views] = {}

    def shards(self, url: str) -> Shards:
        """The folder at a URL."""
        return self._folders[url]

    def source(self, shards: Shards, data: ImageData | None) -> Source:
        """The images of a folder."""
        key = _key(shards, data)
        if key not in self._sources:
            self._sources[key] = Source(shards, data)
        return self._sources[key]

    def views(self, shards: Shards, cfg: VisualsConfig, examples: Iterable[int]) -> Views:
        """The images of a folder in the sizes of a config.

        Args:
            shards: the folder.
            cfg: says where its images are, and how large pictures are.
            examples: those that are going to be stored.
        """
        key = _key(shards, cfg.data, cfg.image_size)
        if key not in self._views:
            self._views[key] = Views(
                lambda example: _stored(self.source(shards, cfg.data), example, cfg.image_size)
            )
        self._views[key].expect(examples)
        return self._views[key]

    def close(self) -> None:
        """Close all folders, and forget all images."""
        self._folders.close()
        self._sources.clear()
        self._views.clear()


def _stored(source: Source, example: int, image_size: int) -> Stored:
    crop = source.view(example).image
    picture = render.picture(crop, image_size)
    thumb = render.encode(render.picture(picture, render.THUMB))
    return Stored(picture.width, picture.height, render.encode(picture), thumb)


def _key(shards: Shards, data: ImageData | None, *more: tp.Any) -> str:
    return storage.content_hash([shards.url, data and data.to_dict(), *more])
