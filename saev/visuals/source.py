"""The original images behind recorded activations, cropped as the model saw them."""

import contextlib
import csv
import dataclasses
import functools
import io
import json
import logging
import typing as tp
from collections.abc import Iterator

import numpy as np
import pydantic
from PIL import Image

from saev import storage
from saev.config import ImageData, ImgSegFolder
from saev.errors import ConfigError, CorruptDataError, ImageError, SaevError
from saev.images.datasets import ImageDataset, open_dataset
from saev.images.transforms import ImageSpec
from saev.shards import Shards, protocol

logger = logging.getLogger(__name__)

REMEDY = (
    "Pictures are made from the original images: put them back, or say where they are now "
    "(for example data:img-folder --data.root URL)."
)

CLASSES_CSV = "classes.csv"
"""Beside `labels.csv`: what the values of masks mean, with the columns label,name."""
OBJECT_INFO = "objectInfo150.txt"
"""The same as ADE20K's scene parsing benchmark has it: tab-separated, first and last column."""

_SIDE_UNKNOWN = 224
_CACHED_VIEWS = 96


@dataclasses.dataclass(frozen=True)
class View:
    """One example as the model saw it."""

    index: int
    """Index in the dataset."""
    name: str
    """File name or key."""
    label: str
    """Class of the image, "" if it has none."""
    image: Image.Image
    """The model's crop."""
    mask: np.ndarray | None
    """Class of every pixel, or of every patch, uint8 [rows, cols]; None without labels."""
    token_labels: np.ndarray | None
    """Class of every patch, uint8 [rows, cols]; None without labels."""


class Source:
    """Reloads examples of a shards folder from the dataset that they were recorded from.

    Args:
        shards: the activations.
        data: where the images are now; None believes the shards' metadata.

    Raises:
        ConfigError: the metadata does not say where the images are, or other images are there.
        StorageError: the images are gone.
    """

    def __init__(self, shards: Shards, data: ImageData | None = None):
        self._shards = shards
        self._config = data if data is not None else recorded_data(shards)
        with _remedied():
            self._dataset = open_dataset(self._config)
        self._table = shards.examples()
        self._spec = image_spec(shards)
        self._check_same_dataset()
        self.class_names = read_class_names(self._config)
        self.view = functools.lru_cache(maxsize=_CACHED_VIEWS)(self._view)

    @property
    def dataset(self) -> ImageDataset:
        """The images."""
        return self._dataset

    def class_name(self, label: int) -> str:
        """Name of a mask's value; its number where the dataset names none."""
        return self.class_names.get(label, f"class {label}")

    def _view(self, example: int) -> View:
        """An example by its row in the shards.

        Raises:
            ImageError: the image cannot be decoded, or is another one than the recorded one.
            StorageError: the image is gone.
        """
        recorded = {name: self._table[name][example].as_py() for name in self._table.column_names}
        index = int(recorded["index"])
        info = self._dataset.example(index)
        with _remedied():
            self._check_same_name(example, recorded.get("url"), info.url)
            image = self._dataset.load(index)
            self._check_same_size(recorded, image, info.url)
            mask = self._dataset.load_mask(index)
        labels = self._token_labels(example)
        pixels = labels
        if mask is not None and mask.size == image.size:
            pixels = self._spec.crop_mask(mask, fill=self._dataset.bg_label)
        return View(
            index, storage.name(info.url), info.label, self._spec.crop(image), pixels, labels
        )

    def _token_labels(self, example: int) -> np.ndarray | None:
        labels = self._shards.example_labels(example)
        return None if labels is None else labels.reshape(self._shards.metadata.grid_shape)

    # --- Are these the images that were recorded? --------------------------------------------

    def _check_same_dataset(self) -> None:
        expected, found = self._shards.metadata.n_examples, len(self._dataset)
        if found == expected:
            return
        missing = self._first_missing()
        named = f" The first that is missing is {missing}." if missing else ""
        raise ConfigError(
            f"The dataset now has {found} images, {expected} were recorded in "
            f"{self._shards.url}.{named} {REMEDY}"
        )

    def _first_missing(self) -> str | None:
        if "url" not in self._table.column_names:
            return None
        present = {storage.name(self._dataset.example(i).url) for i in range(len(self._dataset))}
        urls = self._table["url"].to_pylist()
        return next((url for url in urls if url and storage.name(url) not in present), None)

    def _check_same_name(self, example: int, recorded: str | None, found: str) -> None:
        if recorded and storage.name(recorded) != storage.name(found):
            raise ImageError(
                f"Example {example} was recorded from {recorded}; in its place the dataset now has "
                f"{found}."
            )

    def _check_same_size(self, recorded: dict[str, tp.Any], image: Image.Image, url: str) -> None:
        height, width = recorded.get("height"), recorded.get("width")
        if height and width and (width, height) != image.size:
            raise ImageError(
                f"{url} has {image.width} x {image.height} pixels, it had {width} x {height} when "
                "it was recorded: it is another image now."
            )


@contextlib.contextmanager
def _remedied() -> Iterator[None]:
    """Add what to do to errors about missing or damaged images."""
    try:
        yield
    except SaevError as err:
        raise type(err)(f"{err} {REMEDY}") from err


def recorded_data(shards: Shards) -> ImageData:
    """The dataset's config as the shards' metadata has it.

    Raises:
        ConfigError: it has none that can be read, as in protocol 2.1, where it is a pickle.
    """
    raw = shards.metadata.data
    if isinstance(raw, str):
        with contextlib.suppress(json.JSONDecodeError):
            raw = json.loads(raw)
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{shards.url} does not say where its images are: its metadata (protocol "
            f"{shards.metadata.protocol}) describes them by a pickle, which is never opened. Say "
            "where they are, for example data:img-folder --data.root URL."
        )
    try:
        config: ImageData = pydantic.TypeAdapter(ImageData).validate_python(
            raw, context={"stored": True}
        )
    except pydantic.ValidationError as err:
        raise ConfigError(
            f"{shards.url} describes its images in a way that this version does not know "
            f"({err.errors()[0]['msg']}). Say where they are, for example data:img-folder "
            "--data.root URL."
        ) from err
    return config


def image_spec(shards: Shards) -> ImageSpec:
    """How the recorded images were cropped.

    Where that was not recorded (protocol 2.1) a square centre crop is assumed, with a warning.
    """
    metadata = shards.metadata
    if metadata.image_spec is not None:
        raw: dict[str, tp.Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in metadata.image_spec.items()
        }
        try:
            return ImageSpec(**raw)
        except TypeError as err:
            raise CorruptDataError(
                f"{storage.join(shards.url, protocol.METADATA)}: image_spec is not one ({err})."
            ) from err
    size = metadata.image_size or (_SIDE_UNKNOWN, _SIDE_UNKNOWN)
    logger.warning(
        "%s does not say how its images were cropped; pictures show the centre square, and "
        "highlights may be a little off.",
        shards.url,
    )
    return ImageSpec(image_size=size, resize=min(size) if size[0] == size[1] else size)


def read_class_names(data: ImageData) -> dict[int, str]:
    """Names of the values of masks, from the files that a segmentation dataset may have.

    Raises:
        ConfigError: such a file is there but is not what it should be.
    """
    if not isinstance(data, ImgSegFolder):
        return {}
    url = storage.join(data.root, CLASSES_CSV)
    if storage.exists(url):
        table = csv.DictReader(io.StringIO(storage.read_text(url)))
        return _named(url, [(row.get("label"), row.get("name")) for row in table])
    url = storage.join(data.root, OBJECT_INFO)
    if storage.exists(url):
        lines = [line.split("\t") for line in storage.read_text(url).splitlines()[1:] if line]
        # "door, double door": the first synonym is enough under a picture.
        return _named(url, [(fields[0], fields[-1].split(",")[0]) for fields in lines])
    return {}


def _named(url: str, rows: list[tuple[str | None, str | None]]) -> dict[int, str]:
    names = {}
    for number, (label, name) in enumerate(rows, start=2):
        if label is None or name is None or not label.strip().isdigit():
            raise ConfigError(
                f"{url}, line {number}: expected the number of a label and its name (columns "
                f"label,name), found {label!r} and {name!r}."
            )
        names[int(label)] = name.strip()
    return names
