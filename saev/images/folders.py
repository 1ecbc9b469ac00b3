"""Datasets that are folders of image files, with or without masks, on any storage."""

import csv
import functools
import io
import logging
import re
import typing as tp
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from saev import storage
from saev.config.images import ImgFolder, ImgSegFolder
from saev.errors import ConfigError, StorageError
from saev.images.datasets import ExampleInfo, ImageDataset, digest_of, index_classes
from saev.images.decode import IMAGE_SUFFIXES, MASK_SUFFIXES, decode_image, decode_mask

logger = logging.getLogger(__name__)

LABELS_CSV = "labels.csv"
SCENE_CATEGORIES = "sceneCategories.txt"


class File(tp.NamedTuple):
    """An image file that was listed."""

    url: str
    key: str
    """Path below the root: what it is called wherever the dataset lies."""
    label: str
    """Path of its folder below the root, "" directly under it."""
    size: int
    """Bytes."""

    @property
    def stem(self) -> str:
        """The key without its suffix."""
        return self.key.rpartition(".")[0]


class Folder(ImageDataset):
    """Images below a folder or a glob pattern; the sub-folders are the classes."""

    def __init__(self, cfg: ImgFolder):
        if _is_pattern(cfg.root):
            self._files = _list_pattern(cfg.root)
        else:
            self._files = list_files(cfg.root, IMAGE_SUFFIXES, what="data.root")
        self.classes, self._targets = index_classes(file.label for file in self._files)

    def __len__(self) -> int:
        return len(self._files)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over path below the root, label and size of every image, in order."""
        rows = ([file.key, file.label, file.size] for file in self._files)
        return digest_of("img-folder", rows)

    def example(self, index: int) -> ExampleInfo:
        """URL and class of an example."""
        file = self._files[index]
        return ExampleInfo(file.url, file.label, self._targets[file.label])

    def load(self, index: int) -> Image.Image:
        """The image: upright, RGB."""
        url = self._files[index].url
        return decode_image(storage.read_bytes(url), url)


class SegFolder(ImageDataset):
    """Images in ROOT/images/SPLIT, each with a mask of its stem in ROOT/annotations/SPLIT."""

    has_masks = True

    def __init__(self, cfg: ImgSegFolder):
        self.pixel_agg, self.bg_label = cfg.pixel_agg, cfg.bg_label
        folders = [_split_folder(cfg, part) for part in ("images", "annotations")]
        self._files = list_files(folders[0], IMAGE_SUFFIXES, what="the images of data.root")
        masks = list_files(folders[1], MASK_SUFFIXES, what="the masks of data.root")
        self._masks = _pair(self._files, masks, folders[1])
        by_stem = _read_labels(cfg.root)
        self._labels = _labels_of(self._files, by_stem, cfg.root)
        self.classes, self._targets = index_classes([*by_stem.values()])

    def __len__(self) -> int:
        return len(self._files)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over path and size of every image and mask, and its label, in order."""
        rows = (
            [image.key, image.size, mask.key, mask.size, label, self._targets[label]]
            for image, mask, label in zip(self._files, self._masks, self._labels, strict=True)
        )
        return digest_of("img-seg-folder", rows)

    def example(self, index: int) -> ExampleInfo:
        """URL and class of an example."""
        label = self._labels[index]
        return ExampleInfo(self._files[index].url, label, self._targets[label])

    def load(self, index: int) -> Image.Image:
        """The image: upright, RGB."""
        url = self._files[index].url
        return decode_image(storage.read_bytes(url), url)

    def load_mask(self, index: int) -> Image.Image:
        """The pixel labels: mode L."""
        url = self._masks[index].url
        return decode_mask(storage.read_bytes(url), url)


# --- Listing -------------------------------------------------------------------------------


def list_files(root: str, suffixes: Sequence[str], *, what: str) -> list[File]:
    """Files below a folder whose names end in one of ``suffixes``, in the order of their keys.

    Hidden files and folders (a name that starts with a dot) are left out. Components of a path
    are compared one by one, so the files of a folder stay together on every kind of storage.

    Args:
        root: URL of the folder.
        suffixes: lower case; a name's case does not matter.
        what: what errors call the folder.

    Raises:
        StorageError: the folder is missing, unreadable, a file, or holds no such file.
    """
    _check_folder(root, what)
    base = storage.normalize(root)
    files = _select(storage.walk(base), base, suffixes)
    if not files:
        raise StorageError(_nothing_found(base, suffixes))
    return _in_order(files)


def _check_folder(root: str, what: str) -> None:
    url = storage.normalize(root)
    if not storage.exists(url):
        raise StorageError(f"{what} is {url}, which does not exist. Check the path.")
    if not storage.is_dir(url):
        raise StorageError(f"{what} is {url}, a file; expected a folder that holds images.")


def _nothing_found(url: str, suffixes: Sequence[str]) -> str:
    return (
        f"No images in {url}: looked at any depth for names that end in {', '.join(suffixes)} "
        "and do not start with a dot."
    )


def _select(entries: Iterable[storage.Entry], base: str, suffixes: Sequence[str]) -> list[File]:
    """The entries that are wanted, with keys relative to ``base``."""
    files = []
    for entry in entries:
        if not entry.name.lower().endswith(tuple(suffixes)):
            continue
        key = entry.url.removeprefix(base).lstrip("/")
        if any(component.startswith(".") for component in key.split("/")):
            continue
        try:
            key.encode()
        except UnicodeEncodeError as err:  # Python holds the stray bytes as lone surrogates
            raise StorageError(
                f"The name {key!r} in {base} is not UTF-8: no table can hold it. Rename the file."
            ) from err
        files.append(File(entry.url, key, key.rpartition("/")[0], entry.size))
    return files


def _in_order(files: Iterable[File]) -> list[File]:
    return sorted(files, key=lambda file: file.key.split("/"))


def _is_pattern(root: str) -> bool:
    """Whether a root is a glob pattern; a folder that is really called so is not."""
    return re.search(r"[*?\[]", root) is not None and not storage.exists(root)


def _list_pattern(pattern: str) -> list[File]:
    """Images that match a pattern, and those below the folders that match it."""
    text = storage.normalize(pattern)
    components = text.split("/")
    magic = next(i for i, part in enumerate(components) if re.search(r"[*?\[]", part))
    base = "/".join(components[:magic])
    found: dict[str, File] = {}
    matches = storage.glob_entries(text)
    for match in matches:
        if not match.is_dir or _is_hidden(match.url, base):
            continue
        for file in _select(storage.walk(match.url), match.url, IMAGE_SUFFIXES):
            # The label is the path below the matched folder, the key that below the fixed part.
            key = file.url.removeprefix(base).lstrip("/")
            found.setdefault(file.url, file._replace(key=key))
    for file in _select((m for m in matches if not m.is_dir), base, IMAGE_SUFFIXES):
        found.setdefault(file.url, file)
    if not matches:
        raise StorageError(f"data.root is the pattern {text}, which matches nothing. Check it.")
    if not found:
        raise StorageError(_nothing_found(text, IMAGE_SUFFIXES))
    return _in_order(found.values())


def _is_hidden(url: str, base: str) -> bool:
    return any(part.startswith(".") for part in url.removeprefix(base).split("/"))


# --- Segmentation --------------------------------------------------------------------------


def _split_folder(cfg: ImgSegFolder, part: str) -> str:
    _check_folder(cfg.root, "data.root")
    folder = storage.join(cfg.root, part)
    if not storage.is_dir(folder):
        raise StorageError(
            f"data.root is {storage.normalize(cfg.root)}, which has no folder '{part}'; expected "
            f"images/{cfg.split} and annotations/{cfg.split} in it."
        )
    url = storage.join(folder, cfg.split)
    if not storage.is_dir(url):
        splits = [entry.name for entry in storage.list_dir(folder) if entry.is_dir]
        raise StorageError(
            f"There is no split '{cfg.split}' in {folder}; it has {', '.join(splits) or 'none'}. "
            "Set data.split."
        )
    return url


def _by_stem(files: Iterable[File]) -> dict[str, File]:
    stems: dict[str, File] = {}
    for file in files:
        other = stems.setdefault(file.stem, file)
        if other is not file:
            raise StorageError(
                f"{other.url} and {file.url} have the same stem, so an image and its mask cannot "
                "be told apart from others. Remove or rename one."
            )
    return stems


def _pair(images: Sequence[File], masks: Sequence[File], folder: str) -> list[File]:
    """The mask of every image."""
    mask_of = _by_stem(masks)
    _by_stem(images)
    missing = [image for image in images if image.stem not in mask_of]
    if missing:
        expected = storage.join(folder, missing[0].stem)
        raise StorageError(
            f"{len(missing)} of {len(images)} images have no mask. The first is {missing[0].url}: "
            f"expected {expected} with one of {', '.join(MASK_SUFFIXES)} (lossless formats)."
        )
    if len(masks) > len(images):
        logger.warning("%d masks in %s have no image.", len(masks) - len(images), folder)
    return [mask_of[image.stem] for image in images]


def _read_labels(root: str) -> dict[str, str]:
    """Class of each stem, from the file that there is; empty if there is none."""
    url = storage.join(root, LABELS_CSV)
    if storage.exists(url):
        return _collect(_parse_csv(storage.read_text(url), url), url)
    url = storage.join(root, SCENE_CATEGORIES)
    if storage.exists(url):
        return _collect(_parse_scene_categories(storage.read_text(url), url), url)
    return {}


def _parse_csv(text: str, url: str) -> list[tuple[str, str]]:
    rows = csv.DictReader(io.StringIO(text.removeprefix("\ufeff")), skipinitialspace=True)
    columns = [name.strip() for name in rows.fieldnames or []]
    labels = [name for name in columns if name != "stem"]
    if "stem" not in columns or not labels:
        raise ConfigError(
            f"{url} has the columns {', '.join(columns) or '(none)'}; expected a header "
            "'stem,label'."
        )
    rows.fieldnames = columns
    column = "label" if "label" in labels else labels[0]
    pairs = []
    for row in rows:
        if not row["stem"] or row[column] is None:
            raise ConfigError(f"{url}, line {rows.line_num}: expected a stem and a label.")
        pairs.append((row["stem"].strip(), row[column].strip()))
    return pairs


def _parse_scene_categories(text: str, url: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split(maxsplit=1)
        if len(fields) == 1:
            raise ConfigError(f"{url}, line {number}: expected 'STEM LABEL', found {line!r}.")
        if fields:
            pairs.append((fields[0], fields[1].strip()))
    return pairs


def _collect(pairs: Iterable[tuple[str, str]], url: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    for stem, label in pairs:
        if labels.setdefault(stem, label) != label:
            raise ConfigError(
                f"{url} gives {stem} two labels, '{labels[stem]}' and '{label}'. Keep one."
            )
    return labels


def _labels_of(files: Sequence[File], by_stem: Mapping[str, str], root: str) -> list[str]:
    """Class of each image: looked up by its path below the split, then by its bare name."""
    if not by_stem:
        return [""] * len(files)
    labels = [by_stem.get(f.stem, by_stem.get(f.stem.rpartition("/")[2])) for f in files]
    n_missing = labels.count(None)
    if n_missing == len(files):
        raise ConfigError(
            f"The labels in {storage.normalize(root)} name no image of this split; stems are file "
            f"names without suffix, as in '{files[0].stem}', found '{next(iter(by_stem))}'."
        )
    if n_missing:
        logger.warning("%d of %d images have no label in %s.", n_missing, len(files), root)
    return [label or "" for label in labels]
