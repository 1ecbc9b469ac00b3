"""Preprocessing of images for a model: resize, crop, normalise; and the same crop for masks.

:class:`ImageSpec` gives the same values as the evaluation transforms of timm
(``timm.data.transforms_factory.transforms_imagenet_eval``) and open_clip
(``open_clip.transform.image_transform``): PIL's antialiased resize, and torchvision's rounding of
sizes and crop offsets. It does not use these libraries, so that inputs, pictures in reports and
masks are cropped by the same code.
"""

import dataclasses
import typing as tp
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from saev.config.images import PixelAgg
from saev.errors import ConfigError, ImageError

Interpolation = tp.Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}

MAX_RESIZED_PIXELS = 1 << 27
"""Most pixels of a resized image before its crop. Without this limit, an image of 1 x 10,000 pixels
whose shorter side becomes 256 would need gigabytes."""


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """Preprocessing of images: resize, then centre crop, then normalise.

    The centre of the resized image is cropped to `image_size`. If the resized image is smaller, it
    is padded with `fill`.

    Raises:
        ConfigError: the fields do not fit together.
    """

    image_size: tuple[int, int]
    """Height and width of the model's input in pixels."""
    resize: int | tuple[int, int]
    """An int is the length of the shorter side; the aspect ratio is kept, and the longer side is
    rounded down (torchvision ``Resize(int)``). For a pair (height, width) see `fit`."""
    fit: tp.Literal["exact", "cover", "contain"] = "exact"
    """For a pair: "exact" stretches to this size. "cover" keeps the aspect ratio and makes no side
    shorter (timm ``ResizeKeepRatio(longest=0)``). "contain" keeps the aspect ratio and makes no
    side longer (``longest=1``: timm's crop_mode "border", open_clip's resize_mode "longest")."""
    interpolation: Interpolation = "bicubic"
    """PIL's resampling filter, with antialiasing."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each channel (red, green, blue), for values from 0 to 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, for values from 0 to 1."""
    fill: tuple[int, int, int] = (0, 0, 0)
    """Colour of padding, 0 to 255."""

    def __post_init__(self) -> None:
        if self.interpolation not in _RESAMPLING:
            raise ConfigError(
                f"interpolation is {self.interpolation!r}, "
                f"expected one of {', '.join(_RESAMPLING)}."
            )
        sides = (self.resize,) if isinstance(self.resize, int) else self.resize
        if min(*self.image_size, *sides) < 1:
            raise ConfigError(
                f"image_size {self.image_size} and resize {self.resize} must be at least 1 pixel."
            )

    @classmethod
    def from_timm(cls, data_config: Mapping[str, tp.Any]) -> "ImageSpec":
        """The spec of a timm model.

        Args:
            data_config: result of ``timm.data.resolve_model_data_config(model)``.

        Returns:
            The equivalent of ``timm.data.create_transform(**data_config)``.
        """
        height, width = (int(side) for side in data_config["input_size"][-2:])
        crop_pct = data_config.get("crop_pct") or 0.875
        scaled = (int(height / crop_pct), int(width / crop_pct))
        mode = data_config.get("crop_mode") or "center"
        mean = _triple(data_config["mean"])
        resize: int | tuple[int, int] = scaled
        fit: tp.Literal["exact", "cover", "contain"] = "exact"
        fill = (0, 0, 0)
        if mode == "border":
            fit, fill = (
                "contain",
                tp.cast(tuple[int, int, int], tuple(round(255 * v) for v in mean)),
            )
        elif mode != "squash":
            fit = "cover"
            if scaled[0] == scaled[1]:
                resize, fit = scaled[0], "exact"
        return cls(
            image_size=(height, width),
            resize=resize,
            fit=fit,
            interpolation=data_config.get("interpolation") or "bilinear",
            mean=mean,
            std=_triple(data_config["std"]),
            fill=fill,
        )

    @classmethod
    def from_open_clip(cls, preprocess_cfg: Mapping[str, tp.Any]) -> "ImageSpec":
        """The spec of an open_clip model.

        Args:
            preprocess_cfg: ``model.visual.preprocess_cfg`` as a dict (``PreprocessCfg``'s fields).

        Returns:
            The equivalent of ``open_clip.transform.image_transform_v2(cfg, is_train=False)``.
        """
        size = preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
        interpolation: Interpolation = "bicubic"
        if preprocess_cfg.get("interpolation") == "bilinear":
            interpolation = "bilinear"
        resize: int | tuple[int, int] = (height, width)
        fit: tp.Literal["exact", "cover", "contain"] = "exact"
        fill = (0, 0, 0)
        mode = preprocess_cfg.get("resize_mode") or "shortest"
        if mode == "longest":
            fit, fill = "contain", (int(preprocess_cfg.get("fill_color") or 0),) * 3
        elif mode == "shortest" and height == width:
            resize = height
        elif mode == "shortest":
            # open_clip ignores the configured interpolation here.
            fit, interpolation = "cover", "bicubic"
        return cls(
            image_size=(height, width),
            resize=resize,
            fit=fit,
            interpolation=interpolation,
            mean=_triple(preprocess_cfg["mean"]),
            std=_triple(preprocess_cfg["std"]),
            fill=fill,
        )

    def apply(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """The model's input: cropped, scaled to 0..1, normalised; float32.

        Args:
            image: PIL image of mode RGB, upright.

        Raises:
            ImageError: its aspect ratio is too extreme to resize.
        """
        # numpy, because each of many threads would start its own OpenMP threads with torch.
        # The division by 255 comes first, as in torchvision.
        chw = np.asarray(self.crop(image)).transpose(2, 0, 1).astype(np.float32, order="C")
        chw /= np.float32(255)
        chw -= np.asarray(self.mean, np.float32)[:, None, None]
        chw /= np.asarray(self.std, np.float32)[:, None, None]
        return torch.from_numpy(chw)

    def crop(self, image: Image.Image) -> Image.Image:
        """The part of the picture that the model sees: RGB, `image_size`.

        Args:
            image: PIL image of mode RGB, upright.

        Raises:
            ImageError: its aspect ratio is too extreme to resize.
        """
        image = image if image.mode == "RGB" else image.convert("RGB")  # convert always copies
        return self._crop(image, _RESAMPLING[self.interpolation], self.fill)

    def crop_mask(self, mask: Image.Image, fill: int = 0) -> UInt8[np.ndarray, "height width"]:
        """The part of a mask that the model sees: the crop of its image, by nearest neighbour.

        Args:
            mask: PIL image of mode L, with the size of its image.
            fill: value of padding.

        Raises:
            ImageError: its aspect ratio is too extreme to resize.
        """
        return np.array(self._crop(mask, Image.Resampling.NEAREST, fill), dtype=np.uint8)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which an image of this height and width is resized."""
        if isinstance(self.resize, int):
            short, long = min(height, width), max(height, width)
            long = int(self.resize * long / short)
            return (long, self.resize) if height > width else (self.resize, long)
        if self.fit == "exact":
            return self.resize
        ratios = (height / self.resize[0], width / self.resize[1])
        ratio = max(ratios) if self.fit == "contain" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _crop(
        self, image: Image.Image, resampling: Image.Resampling, fill: int | tuple[int, ...]
    ) -> Image.Image:
        height, width = self.resized(image.height, image.width)
        if height * width > MAX_RESIZED_PIXELS:
            raise ImageError(
                f"{image.width} x {image.height} pixels is too narrow: resized to {self.resize} it "
                f"would have {width} x {height} pixels, at most {MAX_RESIZED_PIXELS} are allowed."
            )
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), resampling)
        # As in torchvision: pad first (an odd pixel goes to the right and bottom), then crop. The
        # offset is rounded half to even, as Python does.
        crop_height, crop_width = self.image_size
        left_pad, top_pad = max(crop_width - width, 0) // 2, max(crop_height - height, 0) // 2
        padded = (max(width, crop_width), max(height, crop_height))
        if padded != image.size:
            canvas = Image.new(image.mode, padded, fill)
            canvas.paste(image, (left_pad, top_pad))
            image = canvas
        left = round((padded[0] - crop_width) / 2)
        top = round((padded[1] - crop_height) / 2)
        return image.crop((left, top, left + crop_width, top + crop_height))


def _triple(values: tp.Any) -> tuple[float, float, float]:
    if isinstance(values, int | float):
        values = (values,) * 3
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def token_labels(
    mask: UInt8[np.ndarray, "height width"],
    grid: tuple[int, int],
    pixel_agg: PixelAgg = "majority",
    bg_label: int = 0,
) -> UInt8[np.ndarray, " n_tokens"]:
    """Convert labels of pixels to labels of tokens.

    Args:
        mask: labels of the pixels that the model sees (:meth:`ImageSpec.crop_mask`).
        grid: rows and columns of content tokens. They must divide the sides of the mask.
        pixel_agg: "majority" takes the most frequent value under a token. "prefer-fg" takes the
            most frequent value that is not ``bg_label``, if there is one. Ties go to the lowest
            value.
        bg_label: the value of background, for "prefer-fg".

    Returns:
        Labels of the tokens, row by row.

    Raises:
        ConfigError: the grid does not divide the mask.
    """
    (height, width), (rows, columns) = mask.shape, grid
    if min(grid) < 1 or height % rows or width % columns:
        raise ConfigError(
            f"A mask of {height} x {width} pixels cannot be cut into {rows} x {columns} tokens "
            "(height x width): each must be divisible. Check the image size and patch size."
        )
    n_tokens = rows * columns
    token_of_row = np.arange(height) // (height // rows) * columns
    token_of_column = np.arange(width) // (width // columns)
    token_hw = token_of_row[:, None] + token_of_column
    counts = np.bincount((token_hw * 256 + mask).ravel(), minlength=n_tokens * 256)
    counts = counts.reshape(n_tokens, 256)
    if pixel_agg == "majority":
        return counts.argmax(axis=1).astype(np.uint8)  # argmax takes the first of equals
    counts[:, bg_label] = 0
    labels = np.where(counts.any(axis=1), counts.argmax(axis=1), bg_label)
    return labels.astype(np.uint8)
