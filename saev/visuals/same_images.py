"""Checks whether a dataset holds the images from which activations were recorded.

The recorded digest decides. It covers names below the root, sizes in bytes and labels, also those
of masks. So it does not depend on the place of the images. If a copy spells names in another of
Unicode's forms, it holds the same images in another order. If the digest differs in every form, or
was not recorded, the table of examples tells the first difference.
"""

import dataclasses
import logging
import re
from collections.abc import Iterator, Sequence

from PIL import Image

from saev.config import ImageData
from saev.errors import ConfigError, ImageError, SaevError
from saev.images.datasets import ImageDataset, one_name
from saev.images.respelled import spellings
from saev.once import say_once
from saev.shards import Shards

logger = logging.getLogger(__name__)

_MAX_DECODED = 2000
"""Most images that are decoded to find the first different one, if all names are the same."""


def check(shards: Shards, data: ImageData, dataset: ImageDataset) -> ImageDataset:
    """Compare a dataset with what was recorded.

    Args:
        shards: the activations.
        data: where the images are.
        dataset: the images that were found there.

    Returns:
        The dataset, in the order of the recording.

    Raises:
        ConfigError: another kind of dataset, or another number of images.
        ImageError: an image has another name, label or size; the first one is named.
    """
    recorded, metadata = shards.metadata.data, shards.metadata
    kind = recorded.get("kind") if isinstance(recorded, dict) else None
    if kind is not None and kind != data.kind:
        raise ConfigError(
            f"{shards.url} was recorded from data:{kind}, the images are given as data:"
            f"{data.kind}, which reads other files or labels. Give them as data:{kind}."
        )
    if metadata.data_digest is not None and len(dataset) == metadata.n_examples:
        for spelling in spellings(dataset):
            if spelling.digest == metadata.data_digest:
                return spelling
    rows = _rows(shards)
    if len(dataset) != metadata.n_examples:
        raise ConfigError(
            f"The dataset now has {len(dataset)} images, {metadata.n_examples} were recorded in "
            f"{shards.url}.{_first_of_other_number(rows, dataset)}"
        )
    dataset = next((s for s in spellings(dataset) if _all_named(rows, s)), dataset)
    _compare(rows, dataset)
    if metadata.data_digest is not None:
        _find_other_size(rows, dataset)
        raise ImageError(
            f"The images are other ones than were recorded in {shards.url}: names and labels are "
            f"the same, but the size in bytes of {_files(dataset)} is not (digest "
            f"{dataset.digest[:12]}…, recorded was {metadata.data_digest[:12]}…). Version 0.1.0 of "
            "saev did not record which it had."
        )
    if not rows:
        say_once(
            logger,
            f"{shards.url} does not say which images it was recorded from, except for their number "
            f"({metadata.n_examples}): it is not checked whether these are the same images.",
        )
    return dataset


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One image, as it was recorded."""

    index: int
    """Index in the dataset."""
    url: str
    label: str
    target: int | None
    """Index of its class."""
    height: int
    width: int
    digest: int | None
    """CRC-32C of name, sizes and label; None in shards of version 0.1.0."""


_COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def check_pixels(image: Image.Image, height: int | None, width: int | None, url: str) -> None:
    """Check that an image has the size in pixels that it was recorded with, if that is known.

    Raises:
        ImageError: it has another size.
    """
    if height and width and (width, height) != image.size:
        raise ImageError(
            f"{url} has {image.width} x {image.height} pixels, it had {width} x {height} when it "
            "was recorded: it is another image now."
        )


def _rows(shards: Shards) -> list[Row]:
    """The rows of all recorded images, in order; empty without recorded names (protocol 2.1)."""
    table = shards.examples()
    if "url" not in table.column_names:
        return []
    unknown = [None] * table.num_rows
    columns = (
        table[name].to_pylist() if name in table.column_names else unknown for name in _COLUMNS
    )
    return [Row(*values) for values in zip(*columns, strict=True)]


def _compare(rows: Sequence[Row], dataset: ImageDataset) -> None:
    """Raise ImageError for the first row that has another name or label now."""
    for row in rows:
        key, info = dataset.key(row.index), dataset.example(row.index)
        if not _is_named(row.url, key):
            raise ImageError(
                f"Image {row.index} was recorded from {row.url}; in its place the dataset now has "
                f"{info.url}."
            )
        if one_name(row.label) != one_name(info.label):
            raise ImageError(
                f"Image {row.index}, {info.url}, was recorded with the label {row.label!r}; it now "
                f"has {info.label!r}."
            )
    for row in rows:
        target = dataset.example(row.index).target
        if row.target not in (None, target):
            raise ImageError(
                f"Image {row.index}, {dataset.example(row.index).url}, was of class {row.target} "
                f"when it was recorded; it is of class {target} now: other classes were added or "
                "removed."
            )


def _all_named(rows: Sequence[Row], dataset: ImageDataset) -> bool:
    return all(_is_named(row.url, dataset.key(row.index)) for row in rows)


def _is_named(recorded: str, key: str) -> bool:
    """Whether a recorded URL ends in a name below a root, in any form of Unicode."""
    recorded, key = one_name(recorded), one_name(key)
    return recorded == key or recorded.endswith((f"/{key}", f"#{key}"))


def _first_of_other_number(rows: Sequence[Row], dataset: ImageDataset) -> str:
    """A sentence about the first image that is missing or new; "" without recorded names."""
    keys = [one_name(dataset.key(i)) for i in range(len(dataset))]
    there = set(keys)
    for row in rows:
        if there.isdisjoint(_endings(row.url)):
            return f" The first that is missing is {row.url}."
    if any(row.index != i for i, row in enumerate(rows)):
        return ""  # the recording skipped images, so the new one may be one of these
    recorded = {ending for row in rows for ending in _endings(row.url)}
    for i, key in enumerate(keys if rows else ()):
        if key not in recorded:
            return f" The first that was not there is {dataset.example(i).url}."
    return ""


def _endings(url: str) -> Iterator[str]:
    """A URL, then without its first component, without its first two, and so on; in NFC."""
    rest = one_name(url)
    while rest:
        yield rest
        found = re.search("[/#]", rest)
        rest = rest[found.end() :] if found else ""


def _find_other_size(rows: Sequence[Row], dataset: ImageDataset) -> None:
    """Raise ImageError for the first image whose file, or whose mask, has another size."""
    for row in rows:
        if row.digest is not None and row.digest != dataset.row_digest(row.index):
            raise ImageError(
                f"{dataset.example(row.index).url} is not the image that was recorded: its name "
                f"and label are the same, but the size in bytes of {_files(dataset)} is another."
            )
    for row in rows[:_MAX_DECODED]:  # recorded by version 0.1.0
        url = dataset.example(row.index).url
        try:
            image = dataset.load(row.index)
        except SaevError as err:
            raise ImageError(f"{url} is not the image that was recorded: {err}") from err
        check_pixels(image, row.height, row.width, url)


def _files(dataset: ImageDataset) -> str:
    return "the image or of its mask" if dataset.has_masks else "the image"
