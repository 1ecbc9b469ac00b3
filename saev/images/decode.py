"""Bytes to pixels: any image file becomes upright 8-bit RGB, any mask its 8-bit label values.

Files come from the wild, so every defect ends in an ImageError that names the file. Only formats
that PIL decodes by itself are tried: none that starts another program (EPS) or opens further files.
Of an animation or a file of several pages the first frame counts. Colour profiles are not applied,
as in the data pipelines that the models were trained with.
"""

import contextlib
import functools
import io
import typing as tp
from collections.abc import Iterator

import numpy as np
from PIL import Image

from saev.errors import ImageError

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
    ".jp2", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
"""Names that end so, in any case, are images."""

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".pgm", ".pbm")
"""Names that end so are masks: formats that keep label values exactly. GIF is not among them,
because its writers renumber palettes."""

MAX_PIXELS = 178_956_970
"""Most pixels of an image: where PIL, too, stops believing in an honest file (2**30 / 6)."""

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM")
_ORIENTATION = 0x0112  # EXIF tag
_T = Image.Transpose
_UPRIGHT = {
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE,
    6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90,
}  # fmt: skip


def decode_image(data: bytes, name: str) -> Image.Image:
    """An image as the eye sees it.

    EXIF orientation is applied, transparent pixels are laid over white, 16-bit grey values are
    scaled (not clipped) to 8 bits.

    Args:
        data: the whole file.
        name: what errors call it.

    Returns:
        PIL image of mode RGB.

    Raises:
        ImageError: it is empty, damaged, too large or not an image.
    """
    with _explained(name):
        image = _to_rgb(_open(data))
        image.info = {}  # EXIF, palette and profile describe the file, no longer these pixels
        return image


def decode_mask(data: bytes, name: str) -> Image.Image:
    """A segmentation mask: its stored values, untouched by palettes or scaling.

    A 1-bit mask has the values 0 and 1. EXIF orientation is applied.

    Args:
        data: the whole file.
        name: what errors call it.

    Returns:
        PIL image of mode L whose pixels are labels.

    Raises:
        ImageError: as for images; or it is a colour image, or has a value over 255.
    """
    with _explained(name):
        mask = _open(data)
        if mask.mode in ("L", "P", "1"):
            values = np.array(mask)
        elif mask.mode == "I" or mask.mode.startswith("I;16"):
            values = np.array(mask)
            low, high = int(values.min()), int(values.max())
            if low < 0 or high > 255:
                raise ImageError(
                    f"it has the value {low if low < 0 else high}, labels are 0 to 255"
                )
        else:
            raise ImageError(
                f"its mode is {mask.mode}, a mask has one channel whose values are labels"
            )
        return Image.fromarray(values.astype(np.uint8))


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into one sentence about the file."""
    try:
        yield
    except MemoryError:  # the machine's defect, not the file's: it must not be skipped over
        raise
    except Image.UnidentifiedImageError as err:
        raise _error(name, "it is not an image of a format that is read") from err
    except Exception as err:  # PIL's plugins raise about everything on damaged data
        reason = str(err) or type(err).__name__
        raise _error(name, reason.rstrip(".")) from err


def _error(name: str, reason: str) -> ImageError:
    return ImageError(
        f"Cannot decode {name}: {reason}. Repair or remove the file, or leave such files out "
        "with --skip-unreadable."
    )


def _open(data: bytes) -> Image.Image:
    """Decoded and upright, in its own mode."""
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"it has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are decoded"
        )
    image.load()
    transpose = _UPRIGHT.get(_orientation(image))
    return image if transpose is None else image.transpose(transpose)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of the formats that this build of PIL has: it stumbles over any other name."""
    Image.init()
    return tuple(format for format in _FORMATS if format in Image.OPEN)


def _orientation(image: Image.Image) -> tp.Any:
    """EXIF orientation, 1 if there is none. To be asked after loading: TIFF turns itself then."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF beside good pixels is common, and no decoder minds it
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        return _from_16_bit(image)
    if mode == "F":
        return _from_float(image)
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA") if mode != "La" else image.convert("LA").convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.array(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"its values go from {low} to {high}, grey values are 0 to 65535")
    grey = ((values + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _from_float(image: Image.Image) -> Image.Image:
    values = np.array(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise ImageError(f"its values go from {low:g} to {high:g}, floating point ones are 0 to 1")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
