"""How an image becomes what the model sees: resize, crop, normalise, and the same for its mask.

:class:`ImageSpec` reproduces the evaluation transforms of timm (``timm.data.transforms_factory.
transforms_imagenet_eval``) and open_clip (``open_clip.transform.image_transform``) value by value:
PIL's own antialiased resize and torchvision's rounding of sizes and crop offsets. It needs neither
library, so the arithmetic is here, in the open, and one and the same for image, picture and mask.
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
"""Most pixels of a resized image before its crop. An image of 1 x 10,000 pixels whose shorter side
shall be 256 would otherwise ask for gigabytes."""


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How an image becomes a model's input: resize, then centre crop, then normalise.

    `image_size` is cut from the middle of the resized image, which is padded with `fill` where it
    is smaller.

    Raises:
        ConfigError: the fields do not fit together.
    """

    image_size: tuple[int, int]
    """Height and width of the model's input in pixels."""
    resize: int | tuple[int, int]
    """An int: the length of the shorter side, aspect ratio kept, the longer side rounded down
    (torchvision ``Resize(int)``). A pair (height, width): see `fit`."""
    fit: tp.Literal["exact", "cover", "contain"] = "exact"
    """For a pair: "exact" stretches to it; "cover" keeps the aspect ratio and covers it with the
    shorter side (timm ``ResizeKeepRatio(longest=0)``); "contain" keeps the aspect ratio and stays
    inside it (``longest=1``: timm's crop_mode "border", open_clip's resize_mode "longest")."""
    interpolation: Interpolation = "bicubic"
    """Resampling filter, PIL's, with antialiasing."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per channel (red, green, blue), on the scale of 0 to 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per channel, on the scale of 0 to 1."""
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
            data_config: what ``timm.data.resolve_model_data_config(model)`` returns.

        Returns:
            What ``timm.data.create_transform(**data_config)`` does.
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
            What ``open_clip.transform.image_transform_v2(cfg, is_train=False)`` does.
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
            # open_clip leaves the interpolation at its default here, whatever was configured.
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
        # numpy rather than torch: this runs in many threads, each of which would otherwise start
        # its own pool of OpenMP threads. Division by 255 comes first, as in torchvision.
        chw = np.asarray(self.crop(image)).transpose(2, 0, 1).astype(np.float32, order="C")
        chw /= np.float32(255)
        chw -= np.asarray(self.mean, np.float32)[:, None, None]
        chw /= np.asarray(self.std, np.float32)[:, None, None]
        return torch.from_numpy(chw)

    def crop(self, image: Image.Image) -> Image.Image:
        """The picture that the model saw: RGB, `image_size`.

        Args:
            image: PIL image of mode RGB, upright.

        Raises:
            ImageError: its aspect ratio is too extreme to resize.
        """
        image = image if image.mode == "RGB" else image.convert("RGB")  # which would be a copy
        return self._crop(image, _RESAMPLING[self.interpolation], self.fill)

    def crop_mask(self, mask: Image.Image, fill: int = 0) -> UInt8[np.ndarray, "height width"]:
        """The part of a mask that the model saw, by nearest neighbour: exactly the image's crop.

        Args:
            mask: PIL image of mode L, as large as the image that it belongs to.
            fill: value of pixels that are padding in the image.

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
        # As in torchvision: pad first (the odd pixel goes right and below), then crop with
        # Python's rounding of the offset, half to even.
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
    """Pixel labels to token labels.

    Args:
        mask: labels of the pixels that the model saw (:meth:`ImageSpec.crop_mask`).
        grid: rows and columns of content tokens; each divides its side of the mask.
        pixel_agg: "majority" takes the most frequent value under a token; "prefer-fg" the most
            frequent one that is not ``bg_label``, if there is any. Ties go to the lowest value.
        bg_label: the value of background, for "prefer-fg".

    Returns:
        Labels in the tokens' order: row by row.

    Raises:
        ConfigError: the mask cannot be cut into the grid.
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
