"""The original images behind recorded activations, cropped as the model saw them."""

import contextlib
import csv
import dataclasses
import io
import json
import logging
import typing as tp
from collections.abc import Iterator

import pydantic
from PIL import Image

from saev import cores, storage
from saev.config import Cifar10, ImageData, Imagenet, ImgFolder, ImgSegFolder
from saev.errors import ConfigError, CorruptDataError, SaevError
from saev.images.budget import PixelBudget
from saev.images.datasets import ImageDataset
from saev.images.opening import open_dataset
from saev.images.stream import cost_of
from saev.images.transforms import ImageSpec
from saev.once import say_once
from saev.shards import Shards, protocol
from saev.visuals import same_images

logger = logging.getLogger(__name__)

REMEDY = (
    "Pictures are made from the original images: put them back, or say where they are now "
    "(for example data:img-folder --data.root URL)."
)

CLASSES_CSV = "classes.csv"
"""A file beside `labels.csv` with the names of the values of masks; columns: label,name."""
OBJECT_INFO = "objectInfo150.txt"
"""The same in the form of ADE20K's scene parsing benchmark: the first and the last column of a
tab-separated file."""

_SIDE_UNKNOWN = 224


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


class Source:
    """Reloads examples of a shards folder from the dataset that they were recorded from.

    Args:
        shards: the activations.
        data: where the images are now; None takes the place that the shards' metadata names.

    Raises:
        ConfigError: the metadata names a place that only the user may name (see
            :mod:`saev.storage.stored`), or another kind or number of images is there.
        ImageError: other images are there; the first is named.
        StorageError: the images are gone.
    """

    def __init__(self, shards: Shards, data: ImageData | None = None):
        self._shards = shards
        self._config = data if data is not None else recorded_data(shards)
        with _remedied():
            found = open_dataset(self._config)
            self._dataset = same_images.check(shards, self._config, found)
        self._table = shards.examples()
        self._spec = image_spec(shards)
        self._pixels = PixelBudget.of_threads(cores.available(), self._dataset.max_pixels)
        self._cost = cost_of(self._spec, has_mask=False)
        self.class_names = read_class_names(self._config)

    @property
    def dataset(self) -> ImageDataset:
        """The images."""
        return self._dataset

    def view(self, example: int) -> View:
        """An example by its row in the shards.

        Raises:
            ImageError: the image cannot be decoded, or is another one than the recorded one.
            StorageError: the image is gone.
        """
        row = {name: self._table[name][example].as_py() for name in self._table.column_names}
        index = int(row["index"])
        info = self._dataset.example(index)
        with _remedied(), self._pixels.example(self._cost):
            image = self._dataset.load(index)
            if "height" in row:  # equal names and sizes in bytes do not prove equal images
                same_images.check_pixels(image, row["height"], row["width"], info.url)
            crop = self._spec.crop(image)
            del image  # before others get their room
        return View(index, storage.name(info.url), info.label, crop)

    def original(self, example: int) -> Image.Image:
        """The whole image of an example, upright, mode RGB.

        Raises:
            ImageError: it cannot be decoded, or is another one than the recorded one.
            StorageError: it is gone.
        """
        index = self._table["index"][example].as_py()
        with _remedied(), self._pixels.example(self._cost):
            image = self._dataset.load(index)
            if "height" in self._table.column_names:
                height, width = (self._table[k][example].as_py() for k in ("height", "width"))
                same_images.check_pixels(image, height, width, self._dataset.example(index).url)
            return image


@contextlib.contextmanager
def _remedied() -> Iterator[None]:
    """Add the remedy to errors about missing or damaged images."""
    try:
        yield
    except SaevError as err:
        raise type(err)(f"{err} {REMEDY}") from err


def recorded_data(shards: Shards) -> ImageData:
    """The dataset's config that the shards' metadata record.

    Raises:
        ConfigError: the config cannot be read, as in protocol 2.1, where it is a pickle; or it
            names a place that only the user may name.
    """
    place = storage.join(shards.url, protocol.METADATA)
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
    return _trusted(config, place)


def _trusted(config: ImageData, place: str) -> ImageData:
    """A dataset's config from a stored file, after a check that all of its places may be opened."""
    if isinstance(config, ImgFolder | ImgSegFolder):
        remedy = f"If it is yours: data:{config.kind} --data.root {config.root}"
        root = storage.recorded_folder(config.root, place, remedy)
        storage.check_closed(root, place, remedy)
        if isinstance(config, ImgSegFolder):
            _check_parts(config, place, remedy)
        return config.model_copy(update={"root": root})
    if not isinstance(config, Imagenet | Cifar10):
        return config
    remedy = f"If it is yours: data:{config.kind} --data.name {config.name}"
    if protocol.is_place(config.name) or storage.is_dir(config.name):
        name = storage.recorded_folder(config.name, place, remedy)
        storage.check_closed(name, place, remedy)
        return config.model_copy(update={"name": name})
    if config.name != type(config).model_fields["name"].default:
        raise ConfigError(
            f"{place} names the dataset {config.name} on the Hugging Face hub, which is downloaded "
            f"only if you name it yourself. {remedy}"
        )
    return config


def _check_parts(config: ImgSegFolder, place: str, remedy: str) -> None:
    """Check the split and the map of labels that a segmentation dataset's config names."""
    for what, path in (("split", config.split), ("mask_map", config.mask_map)):
        if what == "mask_map" and (storage.is_url(path) or path.startswith(("/", "~"))):
            folder = storage.recorded_folder(storage.parent(path), place, remedy)
            storage.inside(folder, storage.name(path))
        elif path and not all(map(storage.is_file_name, path.split("/"))):
            raise ConfigError(f"{place} names the {what} {path!r}, expected a path below the root.")


def image_spec(shards: Shards) -> ImageSpec:
    """The preprocessing of the recorded images.

    If it was not recorded (protocol 2.1), a square centre crop is assumed, with a warning.
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
    say_once(
        logger,
        f"{shards.url} does not say how its images were cropped; pictures show the centre square, "
        "and highlights may be a little off.",
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
