"""ImageSpec against the libraries it must agree with, value by value, and against itself."""

import dataclasses
import typing as tp

import numpy as np
import open_clip.transform
import pytest
import timm.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from saev.errors import ConfigError, ImageError
from saev.images import ImageSpec

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Smaller than the input, larger, square, extreme, and sizes whose halves are odd and even.
SIZES = [(32, 32), (33, 47), (47, 33), (100, 101), (64, 201), (7, 5), (224, 224), (300, 20)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    ("input_hw", "crop_pct"), [((32, 32), 0.9), ((48, 33), 1.0), ((31, 40), 0.875)]
)
def test_equals_timm(
    size: tuple[int, int],
    interpolation: str,
    crop_mode: str,
    input_hw: tuple[int, int],
    crop_pct: float,
):
    config = {
        "input_size": (3, *input_hw),
        "interpolation": interpolation,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.25),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }
    image = noise(*size)
    expected = timm.data.create_transform(**config)(image)
    found = ImageSpec.from_timm(config).apply(image)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("input_size", [32, (32, 32), (48, 33)])
def test_equals_open_clip(
    size: tuple[int, int], interpolation: str, resize_mode: str, input_size: tp.Any
):
    config = open_clip.transform.PreprocessCfg(
        size=input_size,
        mean=MEAN,
        std=STD,
        interpolation=interpolation,
        resize_mode=resize_mode,
        fill_color=77,
    )
    image = noise(*size)
    expected = open_clip.transform.image_transform_v2(config, is_train=False)(image)
    found = ImageSpec.from_open_clip(dataclasses.asdict(config)).apply(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_every_byte_is_normalised_as_torchvision_does():
    """All 256 values of each channel, not only those that random images happen to hold."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    config = {"input_size": (3, 16, 16), "mean": MEAN, "std": STD, "crop_pct": 1.0}
    expected = timm.data.create_transform(**config)(Image.fromarray(ramp))
    found = ImageSpec.from_timm(config).apply(Image.fromarray(ramp))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def specs() -> st.SearchStrategy[ImageSpec]:
    side = st.integers(4, 40)
    pair = st.tuples(side, side)
    return st.builds(
        ImageSpec,
        image_size=pair,
        resize=st.one_of(side, pair),
        fit=st.sampled_from(["exact", "cover", "contain"]),
        interpolation=st.just("nearest"),
        fill=st.just((9, 9, 9)),
    )


@given(specs(), st.integers(1, 70), st.integers(1, 70))
@settings(max_examples=200, deadline=None)
def test_mask_gets_exactly_the_crop_of_the_image(spec: ImageSpec, height: int, width: int):
    """An image whose colours are its mask's values: after nearest resizing they still agree."""
    values = np.random.default_rng(height * 71 + width).integers(0, 256, (height, width), np.uint8)
    picture = spec.crop(Image.fromarray(np.repeat(values[..., None], 3, axis=2)))
    mask = spec.crop_mask(Image.fromarray(values), fill=9)
    assert mask.dtype == np.uint8
    assert mask.shape == spec.image_size == (picture.height, picture.width)
    np.testing.assert_array_equal(np.asarray(picture)[..., 0], mask)


def test_mask_follows_the_image_through_the_models_own_filter():
    """With bicubic pixels a mask is still where its object is: away from edges they agree."""
    values = np.zeros((90, 160), np.uint8)
    values[20:60, 50:110] = 255
    spec = ImageSpec(image_size=(56, 56), resize=64)
    seen = np.asarray(spec.crop(Image.fromarray(values).convert("RGB")))[..., 0]
    mask = spec.crop_mask(Image.fromarray(values))
    certain = (seen < 5) | (seen > 250)
    assert certain.mean() > 0.9
    np.testing.assert_array_equal(seen[certain] > 128, mask[certain] == 255)


def test_a_hair_thin_image_is_an_error_not_an_out_of_memory():
    with pytest.raises(ImageError, match="1 x 30000 pixels is too narrow"):
        ImageSpec(image_size=(224, 224), resize=224).apply(noise(30_000, 1))


def test_a_thin_image_keeps_one_pixel_when_contained():
    spec = ImageSpec(image_size=(16, 16), resize=(16, 16), fit="contain")
    assert spec.resized(1000, 1) == (16, 1)
    assert spec.apply(noise(1000, 1)).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interpolation": "cubic"}, "interpolation is 'cubic', expected one of nearest"),
        ({"resize": 0}, "at least 1 pixel"),
        ({"image_size": (0, 4)}, "at least 1 pixel"),
    ],
)
def test_bad_fields(fields: dict[str, tp.Any], message: str):
    with pytest.raises(ConfigError, match=message):
        ImageSpec(**{"image_size": (4, 4), "resize": 4} | fields)
