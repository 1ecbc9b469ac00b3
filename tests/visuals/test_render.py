"""Pictures: which pixels belong to which patch, and what happens to them."""

import io

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from saev.visuals import render

sizes = st.integers(1, 70)


@hypothesis.given(rows=st.integers(1, 20), cols=st.integers(1, 20), h=sizes, w=sizes)
def test_patches_tile_the_picture(rows: int, cols: int, h: int, w: int) -> None:
    h, w = max(h, rows), max(w, cols)
    numbers = np.arange(rows * cols).reshape(rows, cols)
    spread = render.spread(numbers, (h, w))
    for axis, (length, n) in enumerate([(h, rows), (w, cols)]):
        # A pixel belongs to the patch in which its middle lies; a tie goes to the later one.
        middles = (2 * np.arange(length) + 1) / (2 * length) * n
        index = spread[:, 0] // cols if axis == 0 else spread[0]
        assert (np.abs(index + 0.5 - middles) <= 0.5 + 1e-9).all()
    assert (spread == spread[:, :1] + spread[:1] - spread[0, 0]).all()  # rectangles


@pytest.mark.parametrize(
    ("row", "col", "grid", "size", "expected"),
    [
        (0, 0, (16, 16), (256, 256), (0, 0, 16, 16)),
        (3, 5, (16, 16), (256, 256), (80, 48, 96, 64)),
        (1, 2, (2, 4), (64, 128), (64, 32, 96, 64)),
        (15, 15, (16, 16), (224, 224), (210, 210, 224, 224)),
        (1, 0, (3, 3), (10, 10), (0, 3, 3, 7)),
    ],
)
def test_rectangle_of_a_patch(
    row: int,
    col: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    expected: tuple[int, int, int, int],
) -> None:
    left, top, right, bottom = expected
    only = np.zeros(grid)
    only[row, col] = 1
    pixels = np.zeros(size)
    pixels[top:bottom, left:right] = 1
    assert (render.spread(only, size) == pixels).all()


def grey(size: tuple[int, int] = (96, 96)) -> Image.Image:
    return Image.new("RGB", size, (120, 120, 120))


def test_highlight_tints_the_patch_outlines_it_and_dims_the_rest() -> None:
    acts = np.zeros((4, 4), np.float32)
    acts[1, 2] = 2.0
    out = np.asarray(render.highlight(grey(), acts, max_value=2.0)).astype(int)
    left, top, right, bottom = 48, 24, 72, 48
    assert (out[top, left:right] == 255).all()  # a white line inside the patch, at its border
    assert (out[top:bottom, left] == 255).all()
    assert (out[top:bottom, right - 1] == 255).all()
    inside = out[top + 1 : bottom - 1, left + 1 : right - 1]
    assert (inside == inside[0, 0]).all()
    red, green, blue = inside[0, 0]
    assert red > 120
    assert green > 120
    assert blue < 120  # towards the bright end of viridis
    assert (out[top - 1, left:right] < 40).all()  # a dark line outside
    assert (out[:20] == round(120 * 0.6)).all()


def test_intensity_is_relative_to_the_latents_maximum() -> None:
    acts = np.array([[1.0, 4.0]])
    out = np.asarray(render.highlight(grey((64, 32)), acts, max_value=8.0))
    weak, medium = out[16, 16], out[16, 48]
    full = np.asarray(render.highlight(grey((64, 32)), acts * 8, max_value=8.0))[16, 48]
    assert not (weak == medium).all()
    assert not (medium == full).all()
    strongest = np.asarray(render.highlight(grey((64, 32)), acts * 1e6, max_value=8.0))[16, 48]
    assert (strongest == full).all()  # clipped, not wrapped


def test_nothing_fires_nothing_changes() -> None:
    image = Image.effect_noise((32, 32), 50).convert("RGB")
    out = render.highlight(image, np.zeros((4, 4)), max_value=0.0)
    assert out.tobytes() == image.tobytes()


def test_highlights_keep_the_picture_readable() -> None:
    """Where everything fires at full strength, light and dark pixels are still far apart."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[::8] = 255
    out = np.asarray(render.highlight(Image.fromarray(pixels), np.ones((4, 4)), 1.0)).astype(int)
    assert out[32, 30].sum() - out[33, 30].sum() > 300


def test_segmentation_gives_every_class_its_colour() -> None:
    mask = np.zeros((48, 96), np.uint8)
    mask[:, 48:] = 9
    out = np.asarray(render.segmentation(grey((96, 48)), mask, np.ones((2, 4)))).astype(float)
    for x, label in ((20, 0), (80, 9)):
        colour = np.array(render.class_colour(label))
        expected = 120 + 0.55 * (colour - 120)
        assert np.abs(out[20, x] - expected).max() <= 1


def test_segmentation_takes_masks_of_any_size() -> None:
    mask = np.array([[1, 2], [3, 4]], np.uint8)
    assert (render.spread_mask(mask, (64, 64)) == np.kron(mask, np.ones((32, 32)))).all()
    assert (render.spread_mask(np.kron(mask, np.ones((50, 50))), (2, 2)) == mask).all()


def test_class_colours_differ() -> None:
    table = np.array([render.class_colour(i) for i in range(256)])
    assert table.min() >= 0
    assert table.max() <= 255
    assert len(np.unique(table, axis=0)) == 256


def test_colours_rise_in_lightness() -> None:
    luma = render.colours(np.linspace(0, 1, 50)) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luma) > 0).all()
    assert (render.colours(np.array([-1.0, 2.0])) == render.colours(np.array([0.0, 1.0]))).all()


@pytest.mark.parametrize(("size", "expected"), [((30, 60), (48, 96)), ((200, 100), (96, 48))])
def test_picture_keeps_its_aspect_ratio(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert render.picture(Image.new("RGB", size), 96).size == expected


def test_encoding_is_deterministic_and_close() -> None:
    image = Image.linear_gradient("L").convert("RGB")
    data = render.encode(image)
    assert data == render.encode(image)
    decoded = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decoded - np.asarray(image).astype(int)).mean() < 3
