"""The demo's images: labelled crops of the sample photographs that scikit-image ships."""

import importlib.util
import io
import logging
import typing as tp
from pathlib import Path

import numpy as np
from PIL import Image

from saev import distributions, storage
from saev.errors import ConfigError
from saev.images.decode import decode_image

logger = logging.getLogger(__name__)

PHOTOS: tp.Final = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
"""One class per photograph. Sources and licences: scikit-image's data/README.txt."""

UNSEEN: tp.Final = PHOTOS[3::4]
"""Photographs that are not used for training: every fourth by name, so that the choice is fair."""

N_CLASSES = len(PHOTOS)
CROP = 224
_SMALLEST = 0.35
"""Side of the smallest crop, as a share of the photograph's shorter side."""


def write_crops(root: str, n_examples: int, seed: int = 0) -> str:
    """Make a segmentation dataset of square crops. The label of a pixel is its photograph.

    Labels start at 1, because 0 means background, as in ADE20K. All photographs have about equally
    many crops. Crops have random positions and sizes, and are resized to 224 × 224. The split
    "validation" has only crops of :data:`UNSEEN`, the split "training" has all others.

    Args:
        root: URL of the folder.
        n_examples: number of crops in both splits.
        seed: seed of positions and sizes.

    Returns:
        ``root``, for `data:img-seg-folder --data.root`. A complete folder is not written again.

    Raises:
        ConfigError: scikit-image is not installed.
    """
    done = storage.join(root, "labels.csv")
    if storage.exists(done):
        return root
    rng = np.random.default_rng(seed)
    rows = ["stem,label"]
    for label, file in enumerate(PHOTOS, start=1):
        photo = _open(file)
        name = Path(file).stem
        mask = _png(Image.new("L", (CROP, CROP), label))
        for i in range(n_examples * label // len(PHOTOS) - n_examples * (label - 1) // len(PHOTOS)):
            stem = f"{name}_{i:03d}"
            crop = _random_crop(photo, rng)
            split = "validation" if file in UNSEEN else "training"
            storage.write_bytes(storage.join(root, "images", split, f"{stem}.jpg"), _jpeg(crop))
            storage.write_bytes(storage.join(root, "annotations", split, f"{stem}.png"), mask)
            rows.append(f"{stem},{name}")
    names = [f"{label},{Path(file).stem}" for label, file in enumerate(PHOTOS, start=1)]
    storage.write_text(storage.join(root, "classes.csv"), "\n".join(["label,name", *names]) + "\n")
    storage.write_text(done, "\n".join(rows) + "\n")
    logger.info("Wrote %d crops of %d photographs to %s.", n_examples, len(PHOTOS), root)
    return root


def _open(file: str) -> Image.Image:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        remedy = distributions.install("demo")
        raise ConfigError(f"The demo needs scikit-image's photographs: {remedy}.")
    data = storage.read_bytes(Path(spec.origin).parent / "data" / file)
    return decode_image(data, file)


def _random_crop(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    shorter = min(photo.size)
    side = int(rng.uniform(_SMALLEST, 1.0) * shorter)
    x = int(rng.integers(0, photo.width - side + 1))
    y = int(rng.integers(0, photo.height - side + 1))
    box = (x, y, x + side, y + side)
    return photo.resize((CROP, CROP), Image.Resampling.BICUBIC, box=box)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
