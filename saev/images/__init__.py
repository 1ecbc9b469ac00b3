"""Image datasets: which images there are, how they are decoded, and what a model sees of them."""

from saev.images.datasets import ExampleInfo, ImageDataset, open_dataset
from saev.images.stream import Decoded, Unreadable, iter_examples
from saev.images.transforms import ImageSpec, token_labels

__all__ = [
    "Decoded",
    "ExampleInfo",
    "ImageDataset",
    "ImageSpec",
    "Unreadable",
    "iter_examples",
    "open_dataset",
    "token_labels",
]
