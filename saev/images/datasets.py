"""The interface of every image dataset, and how examples and classes are named."""

import abc
import functools
import hashlib
import itertools
import typing as tp
import unicodedata
from collections.abc import Iterable

from PIL import Image

from saev import storage
from saev.config.images import MAX_PIXELS, PixelAgg
from saev.errors import ImageError

Form = tp.Literal["NFC", "NFD"]
"""Normal forms of Unicode: an accented letter is one character (NFC) or two (NFD)."""


class ExampleInfo(tp.NamedTuple):
    """Facts about an example that are known without decoding it."""

    url: str
    """URL of the image. For datasets that are not files: a name that identifies the example."""
    label: str
    """Name of its class; "" if it has none."""
    target: int
    """Index of its class in the dataset's sorted `classes`, -1 if it has none."""


class ImageDataset(abc.ABC):
    """Examples in a fixed order. Loading is thread-safe."""

    has_masks: bool = False
    """Whether examples come with pixel labels."""
    pixel_agg: PixelAgg = "majority"
    """How pixel labels become token labels; see `token_labels`."""
    bg_label: int = 0
    """The pixel label of background."""
    max_pixels: int = MAX_PIXELS
    """Most pixels of an image; larger ones are not decoded."""

    classes: tuple[str, ...] = ()
    """Class names; `ExampleInfo.target` is an index into them."""

    has_class_folders: bool = False
    """Whether class names are names of folders."""
    header: tp.Any = None
    """The part of the dataset that `digest` hashes before the examples."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over `header` and each `row`, in order: the identity of the data."""
        return digest_of(self.header, map(self.row, range(len(self))))

    @abc.abstractmethod
    def example(self, index: int) -> ExampleInfo:
        """Name and class of an example."""

    def key(self, index: int) -> str:
        """Name of an example, which does not depend on the dataset's location. The example's URL
        ends in it."""
        return self.example(index).url

    def row(self, index: int, form: Form | None = None) -> tp.Any:
        """The part of an example that `digest` hashes, as plain JSON types.

        Args:
            index: of the example.
            form: normal form of file names; None keeps their spelling.
        """
        del form  # these are not names of files
        return [self.key(index), self.example(index).label]

    def row_digest(self, index: int) -> int:
        """CRC-32C of :meth:`row`. If `digest` differs, it shows which example has changed."""
        return storage.crc32c(storage.canonical_json(self.row(index)).encode())

    @abc.abstractmethod
    def load(self, index: int) -> Image.Image:
        """The image: upright, mode RGB.

        Raises:
            ImageError: it cannot be decoded.
            StorageError: it cannot be read.
        """

    def load_mask(self, index: int) -> Image.Image | None:
        """The pixel labels: mode L, None if the dataset has no masks.

        Raises:
            ImageError: it cannot be decoded, or is not a mask.
            ConfigError: its values need a map of labels.
            StorageError: it cannot be read.
        """
        del index
        return None

    def load_pair(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        """Image and mask, checked to be of one size.

        Raises:
            ImageError: one of them cannot be decoded, or their sizes differ.
            StorageError: one of them cannot be read.
        """
        image, mask = self.load(index), self.load_mask(index)
        if mask is not None and mask.size != image.size:
            raise ImageError(
                f"The mask of {self.example(index).url} has {mask.width} x {mask.height} pixels, "
                f"its image (upright) {image.width} x {image.height}; they must agree."
            )
        return image, mask

    def notes(self) -> list[str]:
        """Sentences about the examples that were loaded so far, to be logged at the end."""
        return []


def one_name(text: str) -> str:
    """A name in Unicode's NFC, so that names can be compared.

    File systems of macOS store an accented letter as two characters, most others as one.
    """
    return unicodedata.normalize("NFC", text)


def spelled(name: str, form: Form | None) -> str:
    """A name in a normal form; unchanged if ``form`` is None."""
    return name if form is None else unicodedata.normalize(form, name)


def index_classes(labels: Iterable[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Sorted class names, and the target of each label. The label "" has the target -1.

    Labels that differ only in spelling (:func:`one_name`) are one class. Its name is in NFC if one
    of the labels is, or else the first label in sorted order.
    """
    spellings: dict[str, list[str]] = {}
    for label in sorted(set(labels) - {""}):
        spellings.setdefault(one_name(label), []).append(label)
    named = {name if name in found else found[0]: found for name, found in spellings.items()}
    classes = tuple(sorted(named))
    targets = {label: i for i, name in enumerate(classes) for label in named[name]}
    return classes, targets | {"": -1}


def digest_of(header: tp.Any, rows: Iterable[tp.Any]) -> str:
    """SHA-256 (hex) over the canonical JSON of a header and of rows, one per line."""
    sha = hashlib.sha256()
    for item in itertools.chain([header], rows):
        sha.update(storage.canonical_json(item).encode())
        sha.update(b"\n")
    return sha.hexdigest()
