"""Image classification datasets through Hugging Face `datasets` (the extra ``hf``).

The library finds the rows. saev decodes the images itself, so that orientation, palettes and damage
are handled as for files.
"""

import functools
import itertools
import posixpath
import typing as tp

from PIL import Image

from saev import distributions, hub, storage
from saev.config.images import Cifar10, Imagenet
from saev.errors import ConfigError, ImageError, StorageError
from saev.images.datasets import ExampleInfo, Form, ImageDataset, digest_of, index_classes
from saev.images.decode import Limits, decode_image

_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
_DIGEST_ROWS = 65_536  # read at once


class HubDataset(ImageDataset):
    """One split of a dataset. The dataset is on the hub, a local folder that ``load_dataset``
    opens, or a folder (also on remote storage) that ``Dataset.save_to_disk`` wrote."""

    header = "hf"

    def __init__(self, cfg: Imagenet | Cifar10):
        self._cfg = cfg
        self._limits, self.max_pixels = Limits(cfg.max_pixels, cfg.heic), cfg.max_pixels
        rows = _load(cfg)
        image_column = _image_column(rows, cfg)
        label_column = _label_column(rows)
        import datasets

        rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self._images = rows.select_columns([image_column])
        self._image_column = image_column
        self._labels, self.classes, self._target_of = _read_labels(rows, label_column)

    def __len__(self) -> int:
        return len(self._images)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over file name, size and label of every row, in order.

        The library's own fingerprint is not used, because it includes the dates of local files. Two
        pods with copies of the same data would have different fingerprints.
        """
        parts = range(0, len(self), _DIGEST_ROWS)
        rows = (self._rows(start, min(start + _DIGEST_ROWS, len(self))) for start in parts)
        return digest_of(self.header, itertools.chain.from_iterable(rows))

    def key(self, index: int) -> str:
        """Split and row number."""
        return f"{self._cfg.split}/{index}"

    def row(self, index: int, form: Form | None = None) -> list[tp.Any]:
        """File name, size and label."""
        del form  # the names are in tables, so no file system changes their spelling
        return next(self._rows(index, index + 1))

    def example(self, index: int) -> ExampleInfo:
        """Dataset, split and row number; class."""
        label = self._labels[index] if self._labels else ""
        name = f"{self._cfg.name}#{self.key(index)}"
        return ExampleInfo(name, label, self._target_of[label])

    def load(self, index: int) -> Image.Image:
        """The image: upright, RGB."""
        cell = self._images[index][self._image_column]
        name = self.example(index).url
        if cell is None:
            raise ImageError(f"{name} has no image (the cell is null).")
        data = cell["bytes"]
        if data is None:
            name = cell["path"]
            data = storage.read_bytes(self._place(name))
        return decode_image(data, name, self._limits)

    def _rows(self, start: int, stop: int) -> tp.Iterator[list[tp.Any]]:
        import pyarrow.compute as pc

        column = self._images.with_format("arrow")[start:stop][self._image_column]
        # The length of a binary is the difference of two offsets, so the images are not read.
        sizes = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
        paths = pc.struct_field(column, "path").to_pylist()
        for row, (size, path) in enumerate(zip(sizes, paths, strict=True), start):
            if size is None and path is not None:
                size = storage.size(self._place(path))
            yield [posixpath.basename(path or ""), size, self.example(row).label]

    def _place(self, path: str) -> str:
        """Check that the file of a row is in the dataset's folder or in the library's cache.

        Raises:
            ImageError: the row names another location.
        """
        from datasets import config
        from huggingface_hub import constants

        caches = (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
        folders = [self._cfg.name, *map(str, caches)]
        if not any(storage.is_below(path, folder) for folder in folders):
            raise ImageError(
                f"A row of {self._cfg.name} names the image {path}, which is neither in the "
                "dataset's folder nor in the cache of Hugging Face datasets. A dataset may come "
                "from elsewhere, so no other place is read. Put the images into the dataset."
            )
        return path


def _load(cfg: Imagenet | Cifar10) -> tp.Any:
    if storage.local_path(cfg.name) is None or not storage.exists(cfg.name):
        hub.problem()  # before the import: the library reads its offline mode when imported
    try:
        import datasets
    except ImportError as err:
        raise ConfigError(
            f"data:{cfg.kind} needs Hugging Face datasets, which is not installed. "
            f"Install it: {distributions.install('hf')}."
        ) from err
    where = f"dataset {cfg.name}, split '{cfg.split}'"
    if "::" in cfg.name and storage.local_path(cfg.name) is not None:
        raise ConfigError(
            f"Cannot load {where}: the package datasets treats :: in a path as a chain of URLs. "
            "Rename the folder, or link to it under another name."
        )
    try:
        if _was_saved_to_disk(cfg.name):
            found = datasets.load_from_disk(cfg.name)
            if isinstance(found, datasets.DatasetDict):
                if cfg.split not in found:
                    raise ConfigError(
                        f"There is no split '{cfg.split}' in {cfg.name}; it has "
                        f"{', '.join(found)}. Set data.split."
                    )
                found = found[cfg.split]
        else:
            found = datasets.load_dataset(cfg.name, split=cfg.split)
    except ConfigError:
        raise
    except (OSError, ConnectionError) as err:
        raise StorageError(
            f"Cannot load {where}: {_first_line(err)} Check its name, the network, and whether "
            "you must log in to the hub and accept its terms."
        ) from err
    except Exception as err:  # the library raises errors of its own and of its parsers
        raise ConfigError(f"Cannot load {where}: {_first_line(err)}") from err
    return found


def _was_saved_to_disk(name: str) -> bool:
    if storage.local_path(name) is not None and not storage.is_dir(name):
        return False
    markers = ("state.json", "dataset_dict.json")
    return any(storage.exists(storage.join(name, marker)) for marker in markers)


def _first_line(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    text = lines[0].strip() if lines else type(err).__name__
    return text if text.endswith((".", "!", "?")) else text + "."


def _image_column(rows: tp.Any, cfg: Imagenet | Cifar10) -> str:
    import datasets

    columns = [n for n, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    for preferred in ("image", "img"):
        if preferred in columns:
            return preferred
    if len(columns) == 1:
        return columns[0]
    raise ConfigError(
        f"Dataset {cfg.name} needs one column of images (or one called 'image'); it has "
        f"{', '.join(columns) or 'none'} among {', '.join(rows.column_names)}."
    )


def _label_column(rows: tp.Any) -> str | None:
    import datasets

    for preferred in _LABEL_COLUMNS:
        if preferred in rows.column_names:
            return preferred
    classes = [n for n, feat in rows.features.items() if isinstance(feat, datasets.ClassLabel)]
    return classes[0] if len(classes) == 1 else None


def _read_labels(
    rows: tp.Any, column: str | None
) -> tuple[list[str], tuple[str, ...], dict[str, int]]:
    """Label of each row, class names, and the target of each label."""
    import datasets

    if column is None:
        return [], (), {"": -1}
    values = rows.with_format("arrow")[:][column].to_pylist()
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        labels = ["" if v is None or v < 0 else names[v] for v in values]
        return labels, names, {name: i for i, name in enumerate(names)} | {"": -1}
    labels = ["" if v is None else str(v) for v in values]
    if all(isinstance(v, int) for v in values if v is not None):  # in the order of the numbers
        names = tuple(str(v) for v in sorted({v for v in values if v is not None}))
        return labels, names, {name: i for i, name in enumerate(names)} | {"": -1}
    classes, targets = index_classes(labels)
    return [classes[targets[label]] if label else "" for label in labels], classes, targets
