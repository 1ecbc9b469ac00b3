"""Widths and tokens of common vision transformers, so that sizes need neither torch nor weights.

A test compares every row with the model that `saev shards` would build.
"""

import re
import typing as tp

from saev.errors import ConfigError


class Vit(tp.NamedTuple):
    """The sizes of a model."""

    family: str
    """Model family."""
    arch: str
    """Name of the checkpoint without its weights."""
    d_model: int
    """Width of the residual stream."""
    patch: int
    """Side of a patch in pixels."""
    image_size: int
    """Default side of an image in pixels."""
    n_layers: int
    """Number of blocks."""
    cls_token: bool = True
    """Whether it has a class token."""

    def content_tokens(self, image_size: int | None = None) -> int:
        """Patches per image.

        Raises:
            ConfigError: the size is not a multiple of the patch's side.
        """
        if image_size is not None and image_size % self.patch:
            below = max(1, image_size // self.patch) * self.patch
            raise ConfigError(
                f"--image-size {image_size} does not fit {self.arch}: its patches are "
                f"{self.patch} pixels wide; use a multiple, such as {below} or "
                f"{below + self.patch}."
            )
        return ((image_size or self.image_size) // self.patch) ** 2


MODELS: dict[str, Vit] = {
    "clip-vitb32": Vit("clip", "ViT-B-32", 768, 32, 224, 12),
    "clip-vitb16": Vit("clip", "ViT-B-16", 768, 16, 224, 12),
    "clip-vitl14": Vit("clip", "ViT-L-14", 1024, 14, 224, 24),
    "clip-vitl14-336": Vit("clip", "ViT-L-14-336", 1024, 14, 336, 24),
    "clip-vith14": Vit("clip", "ViT-H-14", 1280, 14, 224, 32),
    "siglip-vitb16": Vit("siglip", "ViT-B-16-SigLIP", 768, 16, 224, 12, False),
    "siglip-vitb16-384": Vit("siglip", "ViT-B-16-SigLIP-384", 768, 16, 384, 12, False),
    "siglip-vitl16-256": Vit("siglip", "ViT-L-16-SigLIP-256", 1024, 16, 256, 24, False),
    "siglip-so400m14": Vit("siglip", "ViT-SO400M-14-SigLIP", 1152, 14, 224, 27, False),
    "siglip-so400m14-384": Vit("siglip", "ViT-SO400M-14-SigLIP-384", 1152, 14, 384, 27, False),
    "siglip2-vitb16": Vit("siglip", "ViT-B-16-SigLIP2", 768, 16, 224, 12, False),
    "siglip2-vitl16-256": Vit("siglip", "ViT-L-16-SigLIP2-256", 1024, 16, 256, 24, False),
    "dinov2-vits14": Vit("dinov2", "vits14", 384, 14, 518, 12),
    "dinov2-vitb14": Vit("dinov2", "vitb14", 768, 14, 518, 12),
    "dinov2-vitl14": Vit("dinov2", "vitl14", 1024, 14, 518, 24),
    "dinov2-vitg14": Vit("dinov2", "vitg14", 1536, 14, 518, 40),
    "dinov2-vits14-reg": Vit("dinov2", "vits14_reg", 384, 14, 518, 12),
    "dinov2-vitb14-reg": Vit("dinov2", "vitb14_reg", 768, 14, 518, 12),
    "dinov2-vitl14-reg": Vit("dinov2", "vitl14_reg", 1024, 14, 518, 24),
    "dinov3-vits16": Vit("dinov3", "vits16", 384, 16, 256, 12),
    "dinov3-vitb16": Vit("dinov3", "vitb16", 768, 16, 256, 12),
    "dinov3-vitl16": Vit("dinov3", "vitl16", 1024, 16, 256, 24),
    "dinov3-vith16plus": Vit("dinov3", "vith16plus", 1280, 16, 256, 32),
    "vit-tiny16": Vit("timm", "vit_tiny_patch16_224", 192, 16, 224, 12),
    "vit-small16": Vit("timm", "vit_small_patch16_224", 384, 16, 224, 12),
    "vit-base16": Vit("timm", "vit_base_patch16_224", 768, 16, 224, 12),
    "vit-large16": Vit("timm", "vit_large_patch16_224", 1024, 16, 224, 24),
}
"""Models by short name."""

_TIMM_NAMES = {
    "vit_small_patch14_dinov2": "dinov2-vits14",
    "vit_base_patch14_dinov2": "dinov2-vitb14",
    "vit_large_patch14_dinov2": "dinov2-vitl14",
    "vit_giant_patch14_dinov2": "dinov2-vitg14",
    "vit_small_patch14_reg4_dinov2": "dinov2-vits14-reg",
    "vit_base_patch14_reg4_dinov2": "dinov2-vitb14-reg",
    "vit_large_patch14_reg4_dinov2": "dinov2-vitl14-reg",
    "vit_small_patch16_dinov3": "dinov3-vits16",
    "vit_base_patch16_dinov3": "dinov3-vitb16",
    "vit_large_patch16_dinov3": "dinov3-vitl16",
    "vit_huge_plus_patch16_dinov3": "dinov3-vith16plus",
}
"""timm's names of these models, which the families `timm`, `dinov2` and `dinov3` accept."""


def by_name(name: str) -> Vit:
    """The model with a short name. Raises ConfigError that lists all names."""
    if name not in MODELS:
        raise ConfigError(
            f"There is no model {name!r} in the list: {', '.join(MODELS)}. For others give "
            "--family and --ckpt with --load-model, or --d-model and "
            "--content-tokens-per-example."
        )
    return MODELS[name]


def by_checkpoint(family: str, ckpt: str) -> Vit | None:
    """The model of a family and checkpoint; None if it is not in the list."""
    arch = re.split(r"[@/]", ckpt.strip().removeprefix("timm/"))[0]
    if family in ("timm", "dinov2", "dinov3"):
        known = _TIMM_NAMES.get(arch.split(".")[0])
        if known is not None:
            return MODELS[known]
        arch = arch.split(".")[0]
    found = (vit for vit in MODELS.values() if (vit.family, vit.arch) == (family, arch))
    return next(found, None)


def build(family: str, ckpt: str, image_size: int | None) -> tuple[int, int, bool]:
    """Build a model with random weights. Returns d_model, content tokens, and whether it has a
    class token.

    Raises:
        ConfigError: torch is not installed.
        ModelError: there is no such model.
    """
    try:
        from saev import vit
    except ModuleNotFoundError as err:
        raise ConfigError(
            f"--load-model needs {err.name}, which is not installed here. Give --d-model and "
            "--content-tokens-per-example instead."
        ) from err
    arch = re.split(r"[@/]", ckpt)[0]
    if family not in ("clip", "siglip"):
        arch = arch.split(".")[0]
    model = vit.load(family, f"{arch}/random", image_size=image_size)
    return model.d_model, model.content_tokens_per_example, model.has_cls_token
