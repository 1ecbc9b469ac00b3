"""Generated images, the same on every machine, without files and network. For tests and dry runs.

Each image has a gradient, grain, and a few discs and boxes. The top shape has the colour of the
image's class, so that SAEs can find features. Masks hold the shapes.
"""

import colorsys
import functools

import numpy as np
from PIL import Image

from saev.config.images import FakeImg, FakeImgSeg
from saev.errors import ConfigError
from saev.images.datasets import ExampleInfo, Form, ImageDataset, digest_of


class Fake(ImageDataset):
    """Images of shapes. Example i has class i modulo the number of classes."""

    def __init__(self, cfg: FakeImg):
        self._cfg = cfg
        digits = len(str(cfg.n_classes - 1))
        self.classes = tuple(f"class{c:0{digits}d}" for c in range(cfg.n_classes))

    def __len__(self) -> int:
        return self._cfg.n_examples

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the config, which determines every pixel."""
        return digest_of(self._cfg.identity(), [])

    def key(self, index: int) -> str:
        """Kind and number."""
        return f"{self._cfg.kind}/{index}"

    def row(self, index: int, form: Form | None = None) -> list[int]:
        """The number of the example. All else is determined by the config."""
        del form
        return [index]

    def example(self, index: int) -> ExampleInfo:
        """Name and class of an example."""
        target = index % self._cfg.n_classes
        return ExampleInfo(self.key(index), self.classes[target], target)

    def load(self, index: int) -> Image.Image:
        """The image, RGB."""
        return Image.fromarray(self._draw(index)[0])

    def _draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [size, size, 3] and shapes [size, size]: class + 1 inside, 0 outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        size, n_classes = self._cfg.image_size, self._cfg.n_classes
        rng = np.random.default_rng([self._cfg.seed, index])
        y, x = np.mgrid[:size, :size]
        tint, slope = rng.integers(40, 120, 3), rng.integers(-60, 61, (2, 3))
        pixels = tint + (y[..., None] * slope[0] + x[..., None] * slope[1]) // size
        shapes = np.zeros((size, size), np.int64)
        for number in range(3):  # the class's own shape comes last, on top of two others
            own = index % n_classes
            shape_class = own if number == 2 else int(rng.integers(n_classes))
            top, left = rng.integers(0, max(1, size * 3 // 4), 2)
            side = int(rng.integers(size // 6, size // 2 + 1)) + 1
            inside = (abs(y - top) < side) & (abs(x - left) < side)
            if rng.integers(2):
                inside &= (y - top) ** 2 + (x - left) ** 2 < side**2
            shapes[inside] = shape_class + 1
            hue = colorsys.hsv_to_rgb(shape_class / n_classes, 0.8, 0.9)
            pixels[inside] = np.array([round(255 * v) for v in hue])
        pixels = pixels + rng.integers(-12, 13, (size, size, 1))
        return np.clip(pixels, 0, 255).astype(np.uint8), shapes


class FakeSegmentation(Fake):
    """The same images with masks: background is `bg_label`, shapes take the other values in
    order of their class."""

    has_masks = True

    def __init__(self, cfg: FakeImgSeg):
        super().__init__(cfg)
        if cfg.n_classes > 255:
            raise ConfigError(
                f"data.n_classes is {cfg.n_classes}, but masks hold at most 255 classes beside "
                "the background."
            )
        self.pixel_agg, self.bg_label = cfg.pixel_agg, cfg.bg_label

    def load_mask(self, index: int) -> Image.Image:
        """The shapes, mode L."""
        others = [value for value in range(256) if value != self.bg_label]
        values = np.array([self.bg_label, *others], np.uint8)
        return Image.fromarray(values[self._draw(index)[1]])
