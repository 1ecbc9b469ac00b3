"""Image datasets: listing, decoding, and preprocessing for a model."""

import typing as tp

from saev.images.datasets import ExampleInfo, ImageDataset
from saev.images.opening import open_dataset

if tp.TYPE_CHECKING:
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


def __getattr__(name: str) -> tp.Any:
    # Imported on first use, so that listing a dataset does not import torch.
    if name in ("ImageSpec", "token_labels"):
        from saev.images import transforms

        return getattr(transforms, name)
    if name in ("Decoded", "Unreadable", "iter_examples"):
        from saev.images import stream

        return getattr(stream, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
