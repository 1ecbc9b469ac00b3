"""Datasets that are folders of image files, with or without masks, on any storage."""

import csv
import io
import logging
import re
import threading
import typing as tp
from collections.abc import Iterable, Iterator, Mapping, Sequence

from PIL import Image

from saev import storage
from saev.config.images import ImgFolder, ImgSegFolder
from saev.errors import ConfigError, ImageError, StorageError
from saev.images import left_out
from saev.images.datasets import (
    ExampleInfo,
    Form,
    ImageDataset,
    index_classes,
    one_name,
    spelled,
)
from saev.images.decode import (
    HEIC_SUFFIXES,
    IMAGE_SUFFIXES,
    Limits,
    decode_image,
    decode_upright,
    n_pixels_of,
    orientation_of,
    turned,
)
from saev.images.listed import File, Files, in_order
from saev.images.masks import MASK_SUFFIXES, MaskMap, decode_mask, read_mask_map
from saev.once import say_once

logger = logging.getLogger(__name__)

LABELS_CSV = "labels.csv"
SCENE_CATEGORIES = "sceneCategories.txt"


class Folder(ImageDataset):
    """Images below a folder or a glob pattern; the sub-folders are the classes."""

    has_class_folders = True
    header = "img-folder"

    def __init__(self, cfg: ImgFolder):
        self._limits, self.max_pixels = Limits(cfg.max_pixels, cfg.heic), cfg.max_pixels
        suffixes = _suffixes(cfg)
        if _is_pattern(cfg.root):
            self._files = _list_pattern(cfg.root, suffixes)
        else:
            self._files = list_files(cfg.root, suffixes, what="data.root")
        self.classes, self._targets = index_classes(file.label for file in self._files)

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        """Path below the root."""
        return self._files[index].key

    def row(self, index: int, form: Form | None = None) -> list[tp.Any]:
        """Path below the root, label and size."""
        file = self._files[index]
        return [spelled(file.key, form), spelled(self._label(file), form), file.size]

    def example(self, index: int) -> ExampleInfo:
        """URL and class of an example."""
        file = self._files[index]
        return ExampleInfo(file.url, self._label(file), self._targets[file.label])

    def load(self, index: int) -> Image.Image:
        """The image: upright, RGB."""
        file = self._files[index]
        return decode_image(_read(file, self._limits), file.url, self._limits)

    def _label(self, file: File) -> str:
        """Name of a file's class. The file's folder may spell this name differently."""
        return self.classes[self._targets[file.label]] if file.label else ""


class SegFolder(ImageDataset):
    """Images in ROOT/images/SPLIT, each with a mask of its stem in ROOT/annotations/SPLIT."""

    has_masks = True

    def __init__(self, cfg: ImgSegFolder):
        self.pixel_agg, self.bg_label = cfg.pixel_agg, cfg.bg_label
        self._limits, self.max_pixels = Limits(cfg.max_pixels, cfg.heic), cfg.max_pixels
        folders = [_split_folder(cfg, part) for part in ("images", "annotations")]
        self._files = list_files(folders[0], _suffixes(cfg), what="the images of data.root")
        masks = list_files(folders[1], MASK_SUFFIXES, what="the masks of data.root", files="masks")
        self._masks = _pair(self._files, masks, folders[1])
        self._mask_map = _mask_map(cfg, self._limits)
        self.header = "img-seg-folder"
        if self._mask_map is not None:
            self.header = [self.header, self._mask_map.rows]
        self._turning = Turning(cfg.mask_orientation)
        by_stem = _read_labels(cfg.root)
        self.classes, self._targets = index_classes([*by_stem.values()])
        self._labels = [
            self.classes[self._targets[label]] if label else ""
            for label in _labels_of(self._files, by_stem, cfg.root)
        ]

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        """Path below ROOT/images/SPLIT."""
        return self._files[index].key

    def row(self, index: int, form: Form | None = None) -> list[tp.Any]:
        """Path and size of image and mask, and the image's label."""
        image, mask, label = self._files[index], self._masks[index], self._labels[index]
        keys = (spelled(image.key, form), spelled(mask.key, form))
        return [keys[0], image.size, keys[1], mask.size, label, self._targets[label]]

    def example(self, index: int) -> ExampleInfo:
        """URL and class of an example."""
        label = self._labels[index]
        return ExampleInfo(self._files[index].url, label, self._targets[label])

    def load(self, index: int) -> Image.Image:
        """The image: upright, RGB."""
        file = self._files[index]
        return decode_image(_read(file, self._limits), file.url, self._limits)

    def load_mask(self, index: int) -> Image.Image:
        """The pixel labels: mode L, upright as the image is."""
        orientation = 1
        if self._turning.wanted == "stored":
            orientation = orientation_of(_read(self._files[index], self._limits), self._limits)
        return self._upright_mask(index, _read(self._masks[index], self._limits), orientation)

    def load_pair(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Image and mask, checked to be of one size."""
        file = self._files[index]
        image, orientation = decode_upright(_read(file, self._limits), file.url, self._limits)
        data = _read(self._masks[index], self._limits)
        # Checked before the mask is decoded, because the pixel budget assumes the image's size.
        n_claimed = n_pixels_of(data, self._limits)
        if n_claimed > image.width * image.height:
            raise self._disagree(index, image, f"{n_claimed} pixels", orientation)
        mask = self._upright_mask(index, data, orientation)
        if mask.size != image.size:
            found = f"{mask.width} x {mask.height} pixels"
            raise self._disagree(index, image, found, orientation)
        return image, mask

    def _disagree(self, index: int, image: Image.Image, found: str, orientation: int) -> ImageError:
        return ImageError(
            f"The mask {self._masks[index].url} has {found}, its image (upright) {image.width} x "
            f"{image.height}; they must agree.{self._turning.remedy(orientation)}"
        )

    def notes(self) -> list[str]:
        """How many masks may be turned differently from their images."""
        return self._turning.notes()

    def _upright_mask(self, index: int, data: bytes, orientation: int) -> Image.Image:
        """A mask, turned as its image was turned if that is necessary."""
        url = self._masks[index].url
        mask, own = decode_mask(data, url, self._limits, mask_map=self._mask_map)
        if own != 1 or orientation == 1:  # the mask has its own orientation, or none is needed
            return mask
        return self._turning.turn(mask, orientation, self._files[index].url)


class Turning:
    """Turns masks without EXIF orientation whose images have one.

    Args:
        wanted: orientation of such masks; None if the config does not say.
    """

    def __init__(self, wanted: tp.Literal["displayed", "stored"] | None):
        self.wanted = wanted
        self._urls: set[str] = set()
        self._lock = threading.Lock()

    def turn(self, mask: Image.Image, orientation: int, url: str) -> Image.Image:
        """Turn a mask without an orientation of its own to how its image is displayed."""
        if self.wanted == "stored":
            return turned(mask, orientation)
        if self.wanted is None:
            with self._lock:
                is_first = not self._urls
                self._urls.add(url)
            if is_first:
                logger.warning(
                    "%s has an EXIF orientation (%d) and its mask has none. Such masks are used as "
                    "if they were drawn on the displayed picture. If this is right, give "
                    "--data.mask-orientation displayed. If they were drawn on the pixels as "
                    "stored, give --data.mask-orientation stored.",
                    url, orientation,
                )  # fmt: skip
        return mask

    def remedy(self, orientation: int) -> str:
        """A sentence with a remedy for a mask of another size than its image; "" for none."""
        if orientation == 1 or self.wanted == "stored":
            return ""
        return (
            f" The image has an EXIF orientation ({orientation}). If its mask was drawn on the "
            "pixels as stored, give --data.mask-orientation stored."
        )

    def notes(self) -> list[str]:
        """A sentence with the number of masks that may be turned wrongly, if there are any."""
        n = len(self._urls)
        if not n:
            return []
        return [f"{n} masks belong to images with an EXIF orientation; see the warning above."]


def _mask_map(cfg: ImgSegFolder, limits: Limits) -> MaskMap | None:
    if not cfg.mask_map:
        return None
    is_below = not storage.is_url(cfg.mask_map) and not cfg.mask_map.startswith(("/", "~"))
    url = storage.join(cfg.root, cfg.mask_map) if is_below else storage.normalize(cfg.mask_map)
    if not storage.exists(url):
        raise StorageError(
            f"data.mask_map is {url}, which does not exist. Give a URL, or a path below data.root."
        )
    return read_mask_map(url, limits)


def _read(file: File, limits: Limits) -> bytes:
    """Read a whole file. Raises ImageError if it is too large for `max_pixels`."""
    if file.size > limits.max_bytes:
        raise ImageError(
            f"Cannot decode {file.url}: it has {file.size} bytes, at most {limits.max_bytes} are "
            "read. Raise --data.max-pixels, or leave such files out with --skip-unreadable."
        )
    return storage.read_bytes(file.url)


# --- Listing -------------------------------------------------------------------------------


def _suffixes(cfg: ImgFolder | ImgSegFolder) -> tuple[str, ...]:
    """Suffixes of images."""
    return (*IMAGE_SUFFIXES, *HEIC_SUFFIXES) if cfg.heic else IMAGE_SUFFIXES


def list_files(root: str, suffixes: Sequence[str], *, what: str, files: str = "images") -> Files:
    """Files below a folder whose names end in one of ``suffixes``, in the order of their keys.

    Hidden files and folders (names that start with a dot) are left out. One log line tells which
    files are left out.

    Args:
        root: URL of the folder.
        suffixes: suffixes in lower case. They match names in any case.
        what: name of the folder in errors.
        files: name of the files in messages.

    Raises:
        StorageError: the folder is missing, unreadable, a file, or holds no such file.
    """
    _check_folder(root, what)
    base = storage.normalize(root)
    left: set[str] = set()
    found = in_order(_select(_files(base), base, suffixes, left))
    _say_left_out(base, base, found, left, suffixes, files)
    return found


def _say_left_out(
    url: str, base: str, found: Files, left: set[str], suffixes: Sequence[str], files: str
) -> None:
    """Log one line about files that are left out. Raises StorageError if ``found`` is empty."""
    keys = (_key(other, base) for other in left)
    counted = left_out.count(((key, storage.name(key)) for key in keys), found.n_empty)
    if not found:
        raise StorageError(_nothing_found(url, suffixes, counted, files))
    left_out.say(url, len(found), files, counted)


def _key(url: str, base: str) -> str:
    return url.removeprefix(base).lstrip("/")


def _check_folder(root: str, what: str) -> None:
    url = storage.normalize(root)
    if not storage.exists(url):
        raise StorageError(f"{what} is {url}, which does not exist. Check the path.")
    if not storage.is_dir(url):
        raise StorageError(f"{what} is {url}, a file; expected a folder that holds images.")


def _nothing_found(
    url: str, suffixes: Sequence[str], left: left_out.LeftOut, files: str = "images"
) -> str:
    holds = f"it holds {left}" if str(left) else "it is empty"
    return (
        f"No {files} in {url}: {holds}. Looked at any depth for names that end in "
        f"{', '.join(suffixes)} and do not start with a dot. Check the path."
    )


def _files(folder: str) -> Iterator[tuple[str, int]]:
    """URL and size of every file below a folder."""
    return ((storage.join(folder, found.key), found.size) for found in storage.walk(folder))


def _select(
    listed: Iterable[tuple[str, int]], base: str, suffixes: Sequence[str], left: set[str]
) -> Iterator[File]:
    """The wanted files, with keys relative to ``base``. URLs of other files are added to
    ``left``."""
    endings = tuple(suffixes)
    for url, size in listed:
        key = _key(url, base)
        if not url.lower().endswith(endings) or key.startswith(".") or "/." in key:
            left.add(url)
            continue
        try:
            key.encode()
        except UnicodeEncodeError as err:  # Python turns invalid bytes into lone surrogates
            raise StorageError(
                f"The name {key!r} in {base} is not UTF-8, so no table can hold it. Rename the "
                "file."
            ) from err
        yield File(url, key, key.rpartition("/")[0], size)


def _is_pattern(root: str) -> bool:
    """Whether a root is a glob pattern. An existing folder with this name is not a pattern."""
    return re.search(r"[*?\[]", root) is not None and not storage.exists(root)


def _list_pattern(pattern: str, suffixes: Sequence[str]) -> Files:
    """Images that match a pattern, and those below the folders that match it."""
    text = storage.normalize(pattern)
    components = text.split("/")
    magic = next(i for i, part in enumerate(components) if re.search(r"[*?\[]", part))
    base = "/".join(components[:magic])
    matches = storage.glob(text)
    if not matches:
        raise StorageError(f"data.root is the pattern {text}, which matches nothing. Check it.")
    left: set[str] = set()
    found = in_order(_matched(matches, base, suffixes, left))
    left.difference_update(file.url for file in found)  # matches may overlap
    _say_left_out(text, base, found, left, suffixes, "images")
    return found


def _matched(
    matches: Sequence[storage.Entry], base: str, suffixes: Sequence[str], left: set[str]
) -> Iterator[File]:
    """Images below the folders that match, and images that match the pattern themselves."""
    for match in matches:
        if match.is_dir and not _is_hidden(match.url, base):
            for file in _select(_files(match.url), match.url, suffixes, left):
                # The label is a path below the matched folder, the key one below the fixed part.
                yield file._replace(key=_key(file.url, base))
    yield from _select(((m.url, m.size) for m in matches if not m.is_dir), base, suffixes, left)


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
        for split in splits:
            if one_name(split) == one_name(cfg.split):
                return storage.join(folder, split)
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
        say_once(logger, f"{len(masks) - len(images)} masks in {folder} have no image.")
    return [mask_of[image.stem] for image in images]


def _read_labels(root: str) -> dict[str, str]:
    """Class of each stem, from labels.csv or sceneCategories.txt; empty if there is neither."""
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
        stem = one_name(stem)
        if one_name(labels.setdefault(stem, label)) != one_name(label):
            raise ConfigError(
                f"{url} gives {stem} two labels, '{labels[stem]}' and '{label}'. Keep one."
            )
    return labels


def _labels_of(files: Sequence[File], by_stem: Mapping[str, str], root: str) -> list[str]:
    """Class of each image, found by its path below the split, or else by its file name."""
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
        say_once(logger, f"{n_missing} of {len(files)} images have no label in {root}.")
    return [label or "" for label in labels]
