"""Which images fit into the file, in which size."""

import collections
import concurrent.futures
import dataclasses
import threading
import typing as tp
from collections.abc import Sequence

import numpy as np

from saev import cores
from saev.explorer.data import Example, Measured
from saev.images.decode import decode_image
from saev.progress import Progress
from saev.visuals import render
from saev.visuals.opening import Opened
from saev.visuals.render import THUMB
from saev.visuals.stored import Pictures

SIZES = (256, 192, 144, 112)
"""Longer side of images of latents' pages in pixels. The largest is taken with which the images of
all latents fit; with the smallest, those of as many latents as fit."""
THUMB_SHARE = 0.6
"""Most of the room for pictures that is kept for one small image of each latent, while there are
further images only of some."""
_EXAMPLE_BYTES = 20
"""Of one image of one latent, without its patches."""
_PATCH_BYTES = 4
_SAMPLE = 12
_STEP = 64
"""Latents that are taken together."""


def encoded(n_bytes: float) -> float:
    """Length of bytes as base64."""
    return n_bytes * 4 / 3


class Images(tp.Protocol):
    """Where images come from. Threads may share it."""

    def has(self, example: int) -> bool:
        """Whether there is a picture of an image."""

    def webp(self, example: int, size: int) -> bytes:
        """A WebP file of an image, its longer side at most ``size`` pixels."""


class Originals:
    """The original images, as the model saw them. They are opened when the first one is needed."""

    def __init__(self, opened: Opened):
        self._opened, self._lock = opened, threading.Lock()

    def has(self, example: int) -> bool:
        """All of them are there, or it is an error."""
        return True

    def webp(self, example: int, size: int) -> bytes:
        """A WebP file of an image.

        Raises:
            ImageError: it cannot be decoded or is not the recorded one.
            StorageError: it is gone.
        """
        with self._lock:
            source = self._opened.source
        return render.encode(render.picture(source.view(example).image, size))


class StoredImages:
    """The images that a report has stored.

    Args:
        stored: the images.
    """

    def __init__(self, stored: Pictures):
        self._stored = stored

    def has(self, example: int) -> bool:
        """Whether it is stored."""
        return example in self._stored

    def webp(self, example: int, size: int) -> bytes:
        """A WebP file of an image that is stored.

        Raises:
            CorruptDataError: the report is damaged.
            StorageError: it cannot be read.
        """
        data = self._stored.thumb(example) if size <= THUMB else self._stored.get(example)
        if data is None:
            raise ValueError(f"image {example} is not stored")
        if size in (THUMB, self._stored.image_size):
            return data
        image = decode_image(data, f"image {example} of a report")
        return data if max(image.size) <= size else render.encode(render.picture(image, size))


class StoredOrOriginal(StoredImages):
    """The images that a report has stored, and the original ones where it has not.

    Args:
        stored: the images.
        originals: the original images.
    """

    def __init__(self, stored: Pictures, originals: Originals):
        super().__init__(stored)
        self._originals = originals

    def has(self, example: int) -> bool:
        """All of them are there, or it is an error."""
        return True

    def webp(self, example: int, size: int) -> bytes:
        """See :meth:`StoredImages.webp` and :meth:`Originals.webp`."""
        is_stored = super().has(example)
        return super().webp(example, size) if is_stored else self._originals.webp(example, size)


@dataclasses.dataclass
class Album:
    """The pictures of one SAE's latents."""

    images: dict[int, bytes] = dataclasses.field(default_factory=dict)
    """WebP files by image, in the order of the file."""
    examples: dict[int, list[Example]] = dataclasses.field(default_factory=dict)
    """Images of each latent that has several in the file."""
    thumbs: dict[int, int] = dataclasses.field(default_factory=dict)
    """The strongest image of each latent that has a picture."""


class _Picker:
    """Fills an album until the room is used up."""

    def __init__(self, measured: Measured, source: Images, progress: Progress):
        self.album = Album()
        self.used = 0.0
        self._measured, self._source, self._progress = measured, source, progress

    def encode(self, images: Sequence[int], size: int) -> dict[int, bytes]:
        """WebP files of images, made in threads."""
        with concurrent.futures.ThreadPoolExecutor(cores.available(), "saev-pictures") as pool:
            made = pool.map(lambda image: self._source.webp(image, size), images)
            return dict(zip(images, made, strict=True))

    def bytes_each(self, images: Sequence[int], size: int) -> float:
        """Mean size of a file of some images, by a sample."""
        places = np.linspace(0, len(images) - 1, min(_SAMPLE, len(images))).round().astype(int)
        sample = self.encode([images[i] for i in places], size)
        return float(np.mean([encoded(len(data)) for data in sample.values()]))

    def text_bytes(self, image: int) -> int:
        """Of an image's name in the file."""
        return len(self._measured.file(image).encode()) + 16

    def take(
        self, wanted: tp.Mapping[int, Sequence[Example]], size: int, room: float, *, whole: bool
    ) -> None:
        """Take the images of latents in order, until one does not fit.

        Args:
            wanted: images of each latent.
            size: longer side in pixels.
            room: most bytes in all.
            whole: take the latents' examples too, not only the first image.
        """
        latents = list(wanted)
        with self._progress.task("reading images", total=len(latents), unit="latent") as task:
            for start in range(0, len(latents), _STEP):
                some = latents[start : start + _STEP]
                new = {e.example: None for latent in some for e in wanted[latent]}
                made = self.encode([i for i in new if i not in self.album.images], size)
                for latent in some:
                    if not self._take_one(latent, wanted[latent], made, room, whole=whole):
                        return
                    task.advance(1)

    def _take_one(
        self, latent: int, examples: Sequence[Example], made: dict[int, bytes], room: float, *,
        whole: bool,
    ) -> bool:  # fmt: skip
        have = self.album.images
        new = [i for i in dict.fromkeys(e.example for e in examples) if i not in have]
        cost = sum(encoded(len(made[i])) + self.text_bytes(i) for i in new)
        if whole:
            cost += sum(map(example_bytes, examples))
        if self.used + cost > room:
            return False
        self.used += cost
        have.update({i: made[i] for i in new})
        self.album.thumbs[latent] = examples[0].example
        if whole:
            self.album.examples[latent] = list(examples)
        return True


def example_bytes(example: Example) -> float:
    """Of an image of a latent, its file aside."""
    return encoded(_EXAMPLE_BYTES + _PATCH_BYTES * len(example.patches))


def collect(
    measured: Measured, source: Images, room: float, progress: Progress,
    chosen: Sequence[int] = (),
) -> Album:  # fmt: skip
    """Choose pictures: first those of chosen latents, then those of the latents that come first in
    `measured.order`.

    Args:
        measured: the SAE.
        source: gives its images.
        room: most bytes that they may take in the file.
        progress: where to tell how far it is.
        chosen: numbers of latents.

    Raises:
        ImageError: an image cannot be decoded or is not the recorded one.
        StorageError: one is gone.
    """
    picker = _Picker(measured, source, progress)
    found = {
        i: [e for e in measured.examples(i) if source.has(e.example)]
        for i in dict.fromkeys([*chosen, *measured.order.tolist()])
    }
    wanted = {i: examples for i, examples in found.items() if examples}
    if not wanted:
        return picker.album
    uses = collections.Counter(e.example for examples in wanted.values() for e in examples)
    images = list(uses)
    fixed = float(sum(map(picker.text_bytes, images)))
    fixed += sum(example_bytes(e) for examples in wanted.values() for e in examples)
    for size in SIZES:
        if fixed + len(images) * picker.bytes_each(images, size) <= 0.95 * room:
            picker.take(wanted, size, room, whole=True)
            return picker.album
    small = list(dict.fromkeys(examples[0].example for examples in wanted.values()))
    kept = len(small) * picker.bytes_each(small, THUMB) + sum(map(picker.text_bytes, small))
    picker.take(wanted, SIZES[-1], room - min(kept, THUMB_SHARE * room), whole=True)
    rest = {i: examples[:1] for i, examples in wanted.items() if i not in picker.album.thumbs}
    picker.take(rest, THUMB, room, whole=False)
    return picker.album
