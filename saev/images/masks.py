"""Masks: the pixels of a file become labels from 0 to 255.

The values of a grey or indexed image are labels. Colours, and values above 255, need a map from
colours or values to labels. Values are never wrapped around, and labels are never guessed.
"""

import csv
import dataclasses
import io
import re

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from saev import storage
from saev.errors import ConfigError, ImageError
from saev.images.decode import Limits, Upright, explained, open_upright

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".pgm", ".pbm")
"""Suffixes of masks, for formats that keep label values exactly. GIF is not among them,
because its writers renumber palettes."""

N_LABELS = 256
"""Labels are stored as uint8."""

_REMEDY = "Repair or replace the mask, or leave its image out with --skip-unreadable."
_COLUMNS = (("red", "green", "blue"), ("r", "g", "b"), ("value",))
_SPAN = re.compile(r"(-?\d+)(?:-(-?\d+))?")
_Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class MaskMap:
    """A map from colours or values to labels. The first row that matches a pixel is used."""

    url: str
    """The file of the map."""
    rows: tuple[tuple[tuple[_Span, ...], int], ...]
    """For each row the least and greatest number of each channel, and the label."""

    @property
    def n_channels(self) -> int:
        """3 for colours, 1 for values."""
        return len(self.rows[0][0])

    def labels(self, found: np.ndarray) -> UInt8[np.ndarray, " n"]:
        """Labels of colours or values.

        Args:
            found: integers [n, n_channels].

        Raises:
            ConfigError: one of them has no label.
        """
        labels = np.full(len(found), -1)
        for spans, label in reversed(self.rows):
            low, high = np.array(spans).T
            labels[((found >= low) & (found <= high)).all(axis=1)] = label
        if (missing := labels < 0).any():
            first = found[missing][0].tolist()
            everything = ",".join("*" * self.n_channels)
            raise ConfigError(
                f"{self.url} (data.mask_map) has no label for {_shown(first)}. Add it, or end the "
                f"file with a row {everything},0 that gives all other pixels the label 0."
            )
        return labels.astype(np.uint8)


def _shown(pixel: list[int]) -> str:
    if len(pixel) == 1:
        return f"the value {pixel[0]}"
    return f"the colour red {pixel[0]}, green {pixel[1]}, blue {pixel[2]}"


# --- Masks ---------------------------------------------------------------------------------


def decode_mask(
    data: bytes, name: str, limits: Limits | None = None, *, mask_map: MaskMap | None = None
) -> Upright:
    """Decode the labels of a segmentation mask: its stored values, or their labels in the map.

    The values of an indexed image are its indices, those of a 1-bit image are 0 and 1. Transparency
    is ignored. EXIF orientation is applied.

    Args:
        data: the whole file.
        name: name of the file in errors.
        limits: limits on the file.
        mask_map: map from colours or values to labels.

    Returns:
        A PIL image of mode L whose pixels are labels, and the EXIF orientation of the file.

    Raises:
        ImageError: it is empty, damaged or too large, or cannot be a map of labels.
        ConfigError: the mask needs a map of labels, or the map that is given does not fit it.
    """
    with explained(name, _REMEDY):
        mask, orientation = open_upright(data, limits or Limits())
        if mask_map is not None and mask_map.n_channels == 3:
            labels = _look_up(mask_map, _colours(mask), name)
        else:
            labels = _labels(_values(mask, name, mask_map), name, mask_map)
        return Upright(Image.fromarray(labels), orientation)


def _values(mask: Image.Image, name: str, mask_map: MaskMap | None) -> np.ndarray:
    """One integer per pixel [height, width]."""
    pixels = np.asarray(mask)
    mode = mask.mode
    if mode in ("L", "P", "1", "I") or mode.startswith("I;16"):
        return pixels
    if mode in ("LA", "PA"):
        return pixels[..., 0]
    if mode == "F" and (pixels == np.rint(pixels)).all():  # false for NaN and infinity
        return pixels.astype(np.int64)
    if mode not in ("RGB", "RGBA", "RGBX"):
        raise ImageError(f"its mode is {mode}, which cannot be a map of labels")
    red, green, blue = (pixels[..., channel] for channel in range(3))
    if (red == green).all() and (green == blue).all():  # grey, saved as colours
        return red
    if mask_map is not None:
        raise ConfigError(
            f"The mask {name} has colours, and {mask_map.url} (data.mask_map) is a map of values. "
            "Give it the columns red,green,blue,label."
        )
    n_colours = len(np.unique(_packed(pixels[..., :3])))
    way = (
        "--data.mask-map FILE with the columns red,green,blue,label, or an image whose palette "
        "has the colours in the order of their labels"
    )
    if n_colours > N_LABELS:
        raise ImageError(
            f"it has {n_colours} colours, as photographs have, and labels are 0 to 255. If its "
            f"colours do stand for labels, give {way}"
        )
    raise ConfigError(
        f"The mask {name} has {n_colours} colours, and it is not known which labels they stand "
        f"for. Give {way}."
    )


def _labels(values: np.ndarray, name: str, mask_map: MaskMap | None) -> np.ndarray:
    if mask_map is not None:
        return _look_up(mask_map, values[..., None], name)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= N_LABELS:
        raise ConfigError(
            f"The mask {name} has the value {low if low < 0 else high}, and labels are 0 to 255. "
            "Map values to labels by --data.mask-map FILE with the columns value,label "
            "(24000-24999,24 is a range, *,0 all other values)."
        )
    return values.astype(np.uint8)


def _colours(mask: Image.Image) -> np.ndarray:
    """Red, green and blue of each pixel [height, width, 3], 0 to 255."""
    if mask.mode not in ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1"):
        raise ImageError(f"its mode is {mask.mode}, which has no colours of 8 bits")
    if mask.mode in ("P", "PA"):
        mask = mask.convert("RGBA")  # a palette may have transparency: convert keeps the colour
    elif mask.mode in ("L", "LA", "1"):
        mask = mask.convert("L").convert("RGB")
    return np.asarray(mask)[..., :3]


def _packed(pixels: np.ndarray) -> np.ndarray:
    """Pack the channels [..., n_channels] of each pixel into one integer."""
    if pixels.shape[-1] == 1:
        return pixels[..., 0].astype(np.int64)
    red, green, blue = (pixels[..., channel].astype(np.int64) for channel in range(3))
    return red << 16 | green << 8 | blue


def _look_up(mask_map: MaskMap, pixels: np.ndarray, name: str) -> np.ndarray:
    packed = _packed(pixels)
    keys = np.unique(packed)  # a mask has few different values
    found = keys[:, None]
    if mask_map.n_channels == 3:
        found = np.stack([keys >> 16, keys >> 8 & 255, keys & 255], axis=1)
    try:
        labels = mask_map.labels(found)
    except ConfigError as err:
        raise ConfigError(f"Cannot read the labels of {name}: {err}") from err
    return labels[np.searchsorted(keys, packed)]


# --- Maps ----------------------------------------------------------------------------------


def read_mask_map(url: str, limits: Limits | None = None) -> MaskMap:
    """Read a map from a CSV file, or from the palette of an image.

    Args:
        url: the file.
        limits: limits on an image.

    Raises:
        ConfigError: the file is not such a map.
        StorageError: the file cannot be read.
    """
    data = storage.read_bytes(url)
    if re.search(r"\.(csv|txt|tsv)$", url, re.IGNORECASE):
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as err:
            raise ConfigError(
                f"{url} (data.mask_map) is not UTF-8 text ({err}). Save it as UTF-8."
            ) from err
        return MaskMap(url, _parse_csv(text, url))
    try:
        image = open_upright(data, limits or Limits()).image
        palette = image.getpalette("RGB") if image.mode == "P" else None
    except MemoryError:
        raise
    except Exception as err:  # PIL raises errors of any type
        raise ConfigError(
            f"{url} (data.mask_map) is neither a CSV file, called .csv, nor an image ({err}). Take "
            "an indexed PNG, or a CSV file with the columns red,green,blue,label or value,label."
        ) from err
    if palette is None:
        raise ConfigError(
            f"{url} (data.mask_map) is an image of mode {image.mode}, which has no palette. Take "
            "an indexed PNG, or a CSV file with the columns red,green,blue,label."
        )
    colours = [tuple(palette[i : i + 3]) for i in range(0, len(palette), 3)]
    return MaskMap(
        url, tuple((tuple((c, c) for c in rgb), label) for label, rgb in enumerate(colours))
    )


def _parse_csv(text: str, url: str) -> tuple[tuple[tuple[_Span, ...], int], ...]:
    rows = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    columns = [name.strip().lower() for name in rows.fieldnames or []]
    keys = next((keys for keys in _COLUMNS if set(keys) <= set(columns)), None)
    if keys is None or "label" not in columns:
        raise ConfigError(
            f"{url} (data.mask_map) has the columns {', '.join(columns) or '(none)'}; expected "
            "red,green,blue,label or value,label."
        )
    rows.fieldnames = columns
    parsed: dict[tuple[_Span, ...], int] = {}
    for row in rows:
        where = f"{url}, line {rows.line_num}"
        spans = tuple(_span(row[key], where) for key in keys)
        label = (row["label"] or "").strip()
        if not label.isdecimal() or int(label) >= N_LABELS:
            raise ConfigError(f"{where}: the label is {label!r}, expected 0 to 255.")
        if parsed.setdefault(spans, int(label)) != int(label):
            raise ConfigError(
                f"{where}: the same pixels had the label {parsed[spans]} before, now {label}. Keep "
                "one of these rows."
            )
    if not parsed:
        raise ConfigError(f"{url} (data.mask_map) has no row. Add one for each label.")
    return tuple(parsed.items())


def _span(text: str | None, where: str) -> _Span:
    """Parse `7`, `24000-24999` or `*`."""
    text = (text or "").strip()
    if text == "*":
        return -(1 << 62), 1 << 62
    match = _SPAN.fullmatch(text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if low > high or max(abs(low), abs(high)) >= 1 << 62:
        raise ConfigError(
            f"{where}: {text!r} is not a number, a range such as 1-9, or *, which is expected."
        )
    return low, high
