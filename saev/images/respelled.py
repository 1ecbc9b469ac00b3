"""A view of a dataset with all names in one of Unicode's normal forms.

A copy from Linux to macOS, or back, may store an accented letter as two characters instead of one.
The names are equal (:func:`saev.images.datasets.one_name`), but their bytes differ. So the order
and the digest of the dataset differ, too.
"""

import typing as tp
import unicodedata
from collections.abc import Iterator

from PIL import Image

from saev.images.datasets import ExampleInfo, Form, ImageDataset, index_classes, spelled
from saev.images.listed import place_of


class Respelled(ImageDataset):
    """The examples of a dataset with the keys of a normal form, and in the order of these keys.

    Args:
        dataset: the dataset.
        form: Unicode's normal form.
    """

    def __init__(self, dataset: ImageDataset, form: Form):
        self._dataset, self._form = dataset, form
        self._keys = [spelled(dataset.key(i), form) for i in range(len(dataset))]
        self._order = sorted(range(len(dataset)), key=lambda i: place_of(self._keys[i]))
        self.has_masks, self.max_pixels = dataset.has_masks, dataset.max_pixels
        self.pixel_agg, self.bg_label = dataset.pixel_agg, dataset.bg_label
        self.header, self.has_class_folders = dataset.header, dataset.has_class_folders
        own = form if dataset.has_class_folders else None
        self._labels = [spelled(label, own) for label in dataset.classes]
        self.classes, self._targets = index_classes(self._labels)

    def __len__(self) -> int:
        return len(self._order)

    def key(self, index: int) -> str:
        """Name of an example in the normal form."""
        return self._keys[self._order[index]]

    def row(self, index: int, form: Form | None = None) -> tp.Any:
        """The part of an example that `digest` hashes."""
        return self._dataset.row(self._order[index], form or self._form)

    def example(self, index: int) -> ExampleInfo:
        """Present URL of an example, and its class."""
        url, _, target = self._dataset.example(self._order[index])
        label = self._labels[target] if target >= 0 else ""
        return ExampleInfo(url, label, self._targets[label])

    def load(self, index: int) -> Image.Image:
        """The image: upright, RGB."""
        return self._dataset.load(self._order[index])

    def load_mask(self, index: int) -> Image.Image | None:
        """The pixel labels."""
        return self._dataset.load_mask(self._order[index])

    def load_pair(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        """Image and mask, checked to be of one size."""
        return self._dataset.load_pair(self._order[index])

    def notes(self) -> list[str]:
        """Sentences about the examples that were loaded so far."""
        return self._dataset.notes()


def spellings(dataset: ImageDataset) -> Iterator[ImageDataset]:
    """The dataset itself, then a view for each normal form that changes one of its names."""
    yield dataset
    names = [key for i in range(len(dataset)) if not (key := dataset.key(i)).isascii()]
    for form in tp.get_args(Form):
        if any(not unicodedata.is_normalized(form, name) for name in names):
            yield Respelled(dataset, form)
