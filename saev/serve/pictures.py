"""Small pictures of images: those that the report stored, or else made from the original images."""

import io
import logging
import threading
import time
import typing as tp

from PIL import Image

from saev import storage
from saev.errors import CorruptDataError, SaevError
from saev.serve.cache import ByteCache
from saev.serve.measured import NONE, Measured
from saev.serve.problems import Problem
from saev.visuals.stored import Pictures

if tp.TYPE_CHECKING:
    from saev.visuals.source import Source  # needs torch, and so is imported when it is needed

logger = logging.getLogger(__name__)

THUMB, PICTURE = 48, 224
SIZES = (THUMB, PICTURE)
"""Pixels of the longer side, of pictures that are made: for lists, and for the page of a latent.
Those that a report stored have the sizes that it chose for these."""
MEDIA_TYPE = "image/webp"
_QUALITY = 75
_AGAIN_SECONDS = 30.0
_BYTES_PER_NUMBER = 150


class Originals:
    """The original images of SAEs, opened when the first one is needed, once per shards folder."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: dict[str, Source | SaevError] = {}

    def view(self, measured: Measured, example: int) -> Image.Image:
        """The model's crop of an image.

        Raises:
            Problem: the original images cannot be opened, or not this one.
        """
        source = self._source(measured)
        try:
            return source.view(example).image
        except SaevError as err:
            raise _no_picture(err) from err

    def whole(self, measured: Measured, example: int) -> Image.Image:
        """An image as it is in the dataset.

        Raises:
            Problem: the original images cannot be opened, or not this one.
        """
        source = self._source(measured)
        try:
            return source.original(example)
        except SaevError as err:
            raise _no_picture(err) from err

    def _source(self, measured: Measured) -> "Source":
        url = measured.entry.figures["shards"]
        with self._lock:
            source = self._opened.get(url) or _open(url)
            if not getattr(source, "passing", False):
                self._opened[url] = source
        if isinstance(source, SaevError):
            raise _no_picture(source)
        return source


def _open(shards: str) -> "Source | SaevError":
    from saev.shards import Shards
    from saev.visuals.source import Source

    try:
        return Source(Shards.open(shards))
    except SaevError as err:
        logger.warning("There are no pictures: %s", err)
        return err


def _no_picture(error: SaevError) -> Problem:
    return Problem(
        404, f"There is no picture: {error}",
        "`saev visuals` stores pictures beside the results; it needs the original images once.",
    )  # fmt: skip


class _Report(tp.NamedTuple):
    """The pictures that `saev visuals` stored of an SAE; None if it has not done so."""

    pictures: Pictures | None

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers of images."""
        return 0 if self.pictures is None else _BYTES_PER_NUMBER * len(self.pictures.examples)

    @classmethod
    def of(cls, measured: Measured, cache: ByteCache) -> tp.Self:
        """Find them; if there are none, again after some time."""
        url = storage.join(measured.results.url, "report")
        turn = int(time.monotonic() / _AGAIN_SECONDS)
        for key in ((measured.key, "report"), (measured.key, "report", turn)):
            found: tp.Self = cache.get(key, lambda: cls._find(url))
            if found.pictures is not None:
                break
        return found

    @classmethod
    def _find(cls, url: str) -> tp.Self:
        try:
            return cls(Pictures.find(url))
        except CorruptDataError as err:
            logger.warning("%s", err)
            return cls(None)


def _stored(measured: Measured, example: int, size: int, cache: ByteCache) -> bytes | None:
    """A picture that a report stored; None if none did."""
    pictures = _Report.of(measured, cache).pictures
    if pictures is None:
        return None
    return pictures.thumb(example) if size == THUMB else pictures.get(example)


def picture(
    measured: Measured, example: int, size: int, cache: ByteCache, originals: Originals
) -> bytes:
    """A picture as WebP.

    Args:
        measured: the SAE.
        example: row of the shards' examples.parquet.
        size: of SIZES.
        cache: where pictures are kept.
        originals: where images are that no report stored.

    Raises:
        Problem: there is no such image or size, or the image is gone.
    """
    if size not in SIZES:
        raise Problem(404, f"There are no pictures of {size} pixels.", "Take 48 or 224.")
    if measured.names().row(example) == NONE:
        raise Problem(
            404, f"There is no image {example}, or it was not measured.",
            f"Take a number of api/runs/{measured.key}/images.",
        )  # fmt: skip
    key = (measured.key, example, size)

    def made() -> bytes:
        found = _stored(measured, example, size, cache)
        return found or _shrunk(originals.view(measured, example), size)

    return cache.get(key, made)


def _shrunk(image: Image.Image, size: int) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=_QUALITY)
    return buffer.getvalue()
