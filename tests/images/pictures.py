"""Encoded pictures for tests, written by PIL."""

import io
import typing as tp
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

from saev import storage

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")


def photograph(name: str = "chelsea.png") -> Image.Image:
    """A sample photograph that scikit-image ships."""
    with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
        return image.convert("RGB")


def encode(image: Image.Image, format: str = "PNG", **options: tp.Any) -> bytes:
    """The file that PIL writes."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height: int = 8, width: int = 12, seed: int = 0) -> Image.Image:
    """Random colours: every pixel tells where it came from."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def grey(values: tp.Any, dtype: type = np.uint8) -> Image.Image:
    """An image of one channel from nested lists."""
    return Image.fromarray(np.asarray(values, dtype))


def write(url: str, image: Image.Image | bytes) -> str:
    """Store an image under a name whose suffix is its format."""
    if isinstance(image, Image.Image):
        Image.init()
        image = encode(image, Image.registered_extensions()["." + url.rpartition(".")[2].lower()])
    storage.write_bytes(url, image)
    return url
