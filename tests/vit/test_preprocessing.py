"""A loaded model's spec against the library's own evaluation transform, pixel by pixel."""

import typing as tp

import numpy as np
import open_clip
import open_clip.transform
import pytest
import timm
import timm.data
import torch
from PIL import Image

from saev import vit

PICTURES = [(97, 140), (64, 64), (31, 20)]  # height, width


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


def same(model: vit.VisionModel, transform: tp.Any) -> None:
    for size in PICTURES:
        found = model.spec.apply(picture(*size))
        assert tuple(found.shape[1:]) == model.image_size
        torch.testing.assert_close(found, transform(picture(*size)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", None),  # crop_pct 0.9
        ("vit_tiny_patch16_224.augreg_in21k", (32, 48)),
        ("deit_tiny_patch16_224.fb_in1k", 64),  # crop_pct 0.9, ImageNet's mean
        ("vit_small_patch14_dinov2.lvd142m", 56),  # crop_pct 1
        ("eva02_tiny_patch14_336.mim_in22k_ft_in1k", 56),  # crop_mode squash
        ("vit_pe_core_tiny_patch16_384.fb", 64),  # squash, bilinear
        ("test_vit.r160_in1k", None),
    ],
)
def test_timm(name: str, size: int | tuple[int, int] | None):
    model = vit.load("timm", f"{name}/random", image_size=size)
    size = model.image_size if size is None else (size, size) if isinstance(size, int) else size
    assert model.image_size == size
    reference = timm.create_model(name, num_classes=0)
    config = timm.data.resolve_model_data_config(reference, args={"input_size": (3, *size)})
    same(model, timm.data.create_transform(**config))


@pytest.mark.parametrize("size", [None, 64, (32, 96)])
def test_clip(size: int | tuple[int, int] | None):
    model = vit.load("clip", "ViT-S-32/random", image_size=size)
    cfg = open_clip.transform.PreprocessCfg(size=size or 224)
    same(model, open_clip.transform.image_transform_v2(cfg, is_train=False))


def test_siglip():
    model = vit.load("siglip", "ViT-B-16-SigLIP2/random", image_size=48)
    tag = open_clip.get_pretrained_cfg("ViT-B-16-SigLIP2", "webli")
    cfg = open_clip.transform.PreprocessCfg(
        size=48, mean=tag["mean"], std=tag["std"], resize_mode="squash"
    )
    assert (tag["resize_mode"], tag["mean"]) == ("squash", (0.5, 0.5, 0.5))
    same(model, open_clip.transform.image_transform_v2(cfg, is_train=False))
