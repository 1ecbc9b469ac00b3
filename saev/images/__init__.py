"""Image datasets: which images there are, how they are decoded, and what a model sees of them."""

from saev.images.transforms import ImageSpec

__all__ = ["ImageSpec"]
