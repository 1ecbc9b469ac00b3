"""Pictures: an image as the model saw it, with its firing patches or its classes drawn over it.

Everything here takes and returns arrays or PIL images; nothing is read or written.
"""

import colorsys
import functools
import io

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

COLOURMAP = "viridis"
"""Perceptually uniform and readable with any colour vision. It rises in lightness, and its blues
and greens stand out from photographs, which are mostly warm (we looked at inferno, plasma, cividis
and viridis on scikit-image's photographs)."""

_DARKEST = 0.15  # where the colour map starts: its first colours are too dark to see as a tint
_TINT = (0.12, 0.5)  # opacity of the tint of the weakest and of the strongest patch
_GREY = 0.5  # how far the colours under a tint are greyed, so that they do not mix with it
_DIM = 0.6  # lightness of what does not fire
_DIM_SATURATION = 0.3  # saturation of what does not fire
_CLASS_OPACITY = 0.55
_DIM_CLASSES = 0.75
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601

# A neutral grey for 0, which most datasets use for background, then the colours of Okabe & Ito,
# told apart with any colour vision (their eighth, black, would not show over photographs).
_FIRST_COLOURS = (
    (190, 190, 190), (230, 159, 0), (86, 180, 233), (0, 158, 115),
    (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip


def _edges(length: int, n: int) -> np.ndarray:
    """The n + 1 boundaries of n patches along a side of `length` pixels."""
    return (np.arange(n + 1) * length + n // 2) // n


def spread(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Give every pixel its patch's value.

    Args:
        values: [rows, cols] of any dtype.
        size: height and width of the picture in pixels.

    Returns:
        [height, width] of the same dtype.
    """
    rows = np.repeat(np.arange(values.shape[0]), np.diff(_edges(size[0], values.shape[0])))
    cols = np.repeat(np.arange(values.shape[1]), np.diff(_edges(size[1], values.shape[1])))
    return values[rows][:, cols]


def picture(crop: Image.Image, long_side: int) -> Image.Image:
    """The model's view in the size that it is shown in, its aspect ratio kept."""
    scale = long_side / max(crop.size)
    size = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    return crop if size == crop.size else crop.resize(size, Image.Resampling.BICUBIC)


def colours(intensity: Float[np.ndarray, "..."]) -> Float[np.ndarray, "... 3"]:
    """Colours of intensities 0..1: red, green and blue, each 0..255."""
    clipped = np.clip(intensity, 0.0, 1.0)
    positions = (_DARKEST + (1 - _DARKEST) * clipped) * 255
    return _table()[np.round(positions).astype(np.intp)]


@functools.cache
def _table() -> np.ndarray:
    import matplotlib  # here because it takes a while to import

    return np.asarray(matplotlib.colormaps[COLOURMAP](np.arange(256)))[:, :3] * 255


def highlight(
    image: Image.Image, acts: Float[np.ndarray, "rows cols"], max_value: float
) -> Image.Image:
    """The picture with its firing patches tinted and outlined, and the rest dimmed.

    Args:
        image: RGB.
        acts: one latent's values on the image's patches; a patch fires where it is not 0.
        max_value: the value of full intensity (the latent's maximum over the dataset), so that
            the pictures of one latent can be compared.

    Returns:
        An image of the same size; `image` itself where no patch fires (the latent may fire on the
        class token alone).
    """
    if not acts.any():
        return image
    size = (image.height, image.width)
    pixels = np.asarray(image, dtype=np.float64)
    fires = spread(acts != 0, size)
    intensity = spread(np.clip(acts / max_value if max_value > 0 else 0 * acts, 0, 1), size)

    grey = (pixels @ _LUMA)[..., None]
    dimmed = (grey + _DIM_SATURATION * (pixels - grey)) * _DIM
    opacity = (_TINT[0] + (_TINT[1] - _TINT[0]) * intensity)[..., None]
    base = pixels + _GREY * (grey - pixels)
    tinted = base + opacity * (colours(intensity) - base)
    return _to_image(_outline(np.where(fires[..., None], tinted, dimmed), fires))


def segmentation(
    image: Image.Image,
    mask: UInt8[np.ndarray, "height width"],
    acts: Float[np.ndarray, "rows cols"],
) -> Image.Image:
    """The picture with every class in its colour and the firing patches outlined.

    Args:
        image: RGB.
        mask: class of every pixel; of any size, it is stretched to the image by nearest neighbour
            (one class per patch is the smallest such mask).
        acts: one latent's values on the image's patches.
    """
    size = (image.height, image.width)
    pixels = np.asarray(image, dtype=np.float64)
    classes = spread_mask(mask, size)
    table = np.array([class_colour(i) for i in range(256)], dtype=np.float64)
    grey = (pixels @ _LUMA)[..., None]
    out = grey + _CLASS_OPACITY * (table[classes] - grey)
    out[_border(classes)] *= 0.7
    fires = spread(acts != 0, size)
    if fires.any():
        out[~fires] *= _DIM_CLASSES
    return _to_image(_outline(out, fires))


def spread_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask stretched to `size` (height, width) by nearest neighbour."""
    rows = (np.arange(size[0]) * 2 + 1) * mask.shape[0] // (2 * size[0])
    cols = (np.arange(size[1]) * 2 + 1) * mask.shape[1] // (2 * size[1])
    return mask[rows][:, cols]


def class_colour(label: int) -> tuple[int, int, int]:
    """Colour of a class: the same in every picture. The first eight are colour-blind safe."""
    if label < len(_FIRST_COLOURS):
        return _FIRST_COLOURS[label]
    # Steps of the golden angle never come back to a hue; lightness and saturation alternate.
    step = label - len(_FIRST_COLOURS)
    hue = (0.11 + step * 0.6180339887498949) % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, (0.45, 0.62, 0.75)[step % 3], (0.85, 0.6)[step % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def hex_colour(rgb: tuple[float, ...] | np.ndarray) -> str:
    """As CSS writes it."""
    red, green, blue = (round(float(c)) for c in rgb)
    return f"#{red:02x}{green:02x}{blue:02x}"


def encode(image: Image.Image) -> bytes:
    """As a WebP file. Equal pictures give equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=88, method=4)
    return buffer.getvalue()


def _outline(
    pixels: Float[np.ndarray, "height width 3"], region: Bool[np.ndarray, "height width"]
) -> np.ndarray:
    """Draw a white line along the inside of a region and a dark one along its outside."""
    thickness = max(1, round(min(region.shape) / 240))
    inner, outer = region, ~region
    for _ in range(thickness):
        inner, outer = _eroded(inner), _eroded(outer)
    pixels = pixels.copy()
    pixels[region & ~inner] = 255.0
    pixels[~region & ~outer] *= 0.35
    return pixels


def _eroded(region: np.ndarray) -> np.ndarray:
    """A region without the pixels that touch what is not in it, also diagonally."""
    padded = np.pad(region, 1, mode="edge")
    height, width = region.shape
    out = region.copy()
    for dy in range(3):
        for dx in range(3):
            out &= padded[dy : dy + height, dx : dx + width]
    return out


def _border(classes: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour is of another class."""
    out = np.zeros(classes.shape, dtype=bool)
    out[:-1] |= classes[1:] != classes[:-1]
    out[:, :-1] |= classes[:, 1:] != classes[:, :-1]
    return out


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
