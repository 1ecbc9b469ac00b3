"""Decoding of image files to upright 8-bit RGB. For masks see :mod:`saev.images.masks`.

Files may be damaged or hostile, so every defect raises an ImageError that names the file. Only
formats that PIL decodes by itself are allowed, none that starts another program (EPS) or opens
further files. Of an animation or a file with several pages, the first frame is used. Colour
profiles are not applied, as in the data pipelines that the models were trained with.
"""

import contextlib
import dataclasses
import functools
import io
import struct
import typing as tp
from collections.abc import Iterator

import numpy as np
from PIL import Image, TiffImagePlugin

from saev import distributions
from saev.config.images import MAX_PIXELS
from saev.errors import ConfigError, ImageError
from saev.images import budget

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
    ".jp2", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
"""Suffixes of images, in lower or upper case."""

HEIC_SUFFIXES = (".heic", ".heif", ".hif")
"""Suffixes of images that pillow-heif reads, if the dataset's config has `heic`."""

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM")
_BYTES_PER_PIXEL = 8  # four channels of 16 bits
_ORIENTATION = 0x0112  # EXIF tag
_T = Image.Transpose
_UPRIGHT = {
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE,
    6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90,
}  # fmt: skip
_PNG = b"\x89PNG\r\n\x1a\n"
_IMAGE_REMEDY = "Repair or remove the file, or leave such files out with --skip-unreadable."


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on the files that are decoded."""

    max_pixels: int = MAX_PIXELS
    """Most pixels of an image."""
    heic: bool = False
    """Whether HEIC files are decoded."""
    flag: str = "--data.max-pixels"
    """The flag that allows more pixels, for messages; "" if users cannot change the limit."""

    def __post_init__(self) -> None:
        """Adapt PIL's settings, which are those of the whole process.

        Raises:
            ConfigError: HEIC is wanted, but pillow-heif is not installed.
        """
        if Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = -(-self.max_pixels // 2)  # PIL refuses twice this number
        if self.heic:
            try:
                import pillow_heif
            except ImportError as err:
                raise ConfigError(
                    "data.heic needs pillow-heif, which is not installed. "
                    f"Install it: {distributions.install('heic')}."
                ) from err
            pillow_heif.register_heif_opener()

    @property
    def max_bytes(self) -> int:
        """Most bytes of a file. No format needs more for `max_pixels`."""
        return _BYTES_PER_PIXEL * self.max_pixels + (64 << 20)


class Upright(tp.NamedTuple):
    """A decoded image."""

    image: Image.Image
    """The upright image."""
    orientation: int
    """EXIF orientation of the file; 1 if it has none."""


def decode_image(
    data: bytes, name: str, limits: Limits | None = None, remedy: str = _IMAGE_REMEDY
) -> Image.Image:
    """Decode an image as it is displayed.

    The EXIF orientation is applied, transparent pixels are blended with white, and 16-bit grey
    values are scaled (not clipped) to 8 bits.

    Args:
        data: the whole file.
        name: name of the file in errors.
        limits: limits on the file.
        remedy: a sentence for errors.

    Returns:
        PIL image of mode RGB.

    Raises:
        ImageError: it is empty, damaged, too large or not an image.
    """
    return decode_upright(data, name, limits, remedy).image


def upright_rgb(
    image: Image.Image, name: str, limits: Limits, remedy: str = _IMAGE_REMEDY
) -> Image.Image:
    """An image that is open already, as :func:`decode_image` gives it. It is not changed.

    Raises:
        ImageError: it is damaged or too large.
    """
    with explained(name, remedy):
        _check_pixels(image, limits)
        image.load()
        image = _to_rgb(turned(image.copy(), _orientation(image)))
        image.info = {}
        return image


def decode_upright(
    data: bytes, name: str, limits: Limits | None = None, remedy: str = _IMAGE_REMEDY
) -> Upright:
    """As :func:`decode_image`, together with the EXIF orientation of the file."""
    with explained(name, remedy):
        image, orientation = open_upright(data, limits or Limits())
        image = _to_rgb(image)
        image.info = {}  # EXIF, palette and profile no longer describe these pixels
        return Upright(image, orientation)


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an image that is stored with an EXIF orientation to how it is displayed."""
    transpose = _UPRIGHT.get(orientation)
    return image if transpose is None else image.transpose(transpose)


def orientation_of(data: bytes, limits: Limits | None = None) -> int:
    """EXIF orientation of an image file; 1 if there is none, or it cannot be read."""
    try:
        return open_upright(data, limits or Limits()).orientation
    except Exception:  # decoding the image raises a clear error
        return 1


def n_pixels_of(data: bytes, limits: Limits) -> int:
    """Number of pixels in the header of an image file; 0 if it is not an image."""
    try:
        image = Image.open(io.BytesIO(data), formats=_formats(limits.heic))
    except Exception:  # decoding the image raises a clear error
        return 0
    return image.width * image.height


@contextlib.contextmanager
def explained(name: str, remedy: str) -> Iterator[None]:
    """Turn any error of a decoder into an ImageError about the file."""
    try:
        yield
    except (MemoryError, ConfigError):  # not a defect of the file, so it must not be skipped
        raise
    except Image.UnidentifiedImageError as err:
        reason = "it is not an image of a format that is read"
        raise ImageError(f"Cannot decode {name}: {reason}. {remedy}") from err
    except Exception as err:  # PIL's plugins raise errors of any type on damaged data
        reason = (str(err) or type(err).__name__).rstrip(".")
        raise ImageError(f"Cannot decode {name}: {reason}. {remedy}") from err


def open_upright(data: bytes, limits: Limits) -> Upright:
    """Decode an image in the file's own mode and turn it upright. Damaged data raise errors of any
    type."""
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    try:
        return _open(data, limits)
    except ValueError:
        # PIL refuses long texts and colour profiles. They do not affect the pixels.
        plain = _without_texts(data)
        if plain is None:
            raise
        return _open(plain, limits)


def _open(data: bytes, limits: Limits) -> Upright:
    image: Image.Image = Image.open(io.BytesIO(data), formats=_formats(limits.heic))
    _check_pixels(image, limits)
    budget.admit(image.width, image.height)
    before = _orientation_before(image)
    image.load()
    after = _orientation(image)  # 1 for TIFF and HEIC, which PIL has turned
    orientation = after if after in _UPRIGHT else before if before in _UPRIGHT else 1
    return Upright(turned(image, after), orientation)


def _check_pixels(image: Image.Image, limits: Limits) -> None:
    n_pixels = image.width * image.height
    if n_pixels > limits.max_pixels:
        more = f"; {limits.flag} {n_pixels} lets it through" if limits.flag else ""
        raise ImageError(
            f"it has {image.width} x {image.height} pixels, at most {limits.max_pixels} are "
            f"decoded{more}"
        )


def _without_texts(data: bytes) -> bytes | None:
    """A PNG without its colour profile and its texts, except those that hold EXIF.

    Returns None if the data are not a PNG, or a PNG without any of these.
    """
    if not data.startswith(_PNG):
        return None
    kept, start = [_PNG], len(_PNG)
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        is_text = kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
        if not is_text or data.startswith(b"Raw profile type ", start + 8):
            kept.append(data[start:end])
        start = end
    plain = b"".join(kept)
    return plain if len(plain) < len(data) else None


@functools.cache
def _formats(heic: bool) -> tuple[str, ...]:
    """The formats that this build of PIL has. Other names would be an error in PIL."""
    Image.init()
    wanted = (*_FORMATS, "HEIF") if heic else _FORMATS
    return tuple(format for format in wanted if format in Image.OPEN)


def _orientation_before(image: Image.Image) -> tp.Any:
    """EXIF orientation for formats that PIL turns while decoding; 1 for other formats.

    This must not start to decode, as reading the EXIF of a PNG would. If that failed, the second
    attempt would not fail, and half a picture would be taken for a whole one.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.tag_v2.get(_ORIENTATION, 1)
    return image.info.get("original_orientation", 1)  # HEIC


def _orientation(image: Image.Image) -> tp.Any:
    """EXIF orientation, 1 if there is none. In a PNG it may come after the pixels."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF is common, and other decoders ignore it too
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
