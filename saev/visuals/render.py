"""Images in the sizes in which reports store them. Nothing here is read or written."""

import io

from PIL import Image

THUMB = 48
"""Longer side of an image in a list, in pixels."""


def picture(crop: Image.Image, long_side: int) -> Image.Image:
    """The model's view, with its aspect ratio, made smaller if its longer side is longer."""
    scale = min(1.0, long_side / max(crop.size))
    size = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    return crop if size == crop.size else crop.resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image) -> bytes:
    """The bytes of a WebP file. Equal pictures give equal bytes."""
    buffer = io.BytesIO()
    quality = 80 if max(image.size) > THUMB else 70
    image.save(buffer, format="WEBP", quality=quality, method=4)
    return buffer.getvalue()
