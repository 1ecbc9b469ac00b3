"""Small pictures of images: those that the report stored, or else made from the original images."""

import io
import logging
import threading
import typing as tp

from PIL import Image

from saev.errors import SaevError
from saev.serve.cache import ByteCache
from saev.serve.measured import NONE, Measured
from saev.serve.problems import Problem

if tp.TYPE_CHECKING:
    from saev.visuals.source import Source  # needs torch, and so is imported when it is needed

logger = logging.getLogger(__name__)

SIZES = (48, 224)
"""Pixels of the longer side."""
MEDIA_TYPE = "image/webp"
_QUALITY = 75


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
            if url not in self._opened:
                self._opened[url] = _open(url)
            source = self._opened[url]
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
    key = (measured.entry.figures["shards"], example, size)
    return cache.get(key, lambda: _made(originals.view(measured, example), size))


def _made(image: Image.Image, size: int) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=_QUALITY)
    return buffer.getvalue()
