"""Families `dinov2` and `dinov3`: short names for timm's models."""

import re
from collections.abc import Mapping

from saev import storage
from saev.errors import ModelError
from saev.vit import checkpoints
from saev.vit.model import Tower
from saev.vit.registry import register_family
from saev.vit.timm_models import load_timm

DINOV2: Mapping[str, str] = {
    "vits14": "vit_small_patch14_dinov2.lvd142m",
    "vitb14": "vit_base_patch14_dinov2.lvd142m",
    "vitl14": "vit_large_patch14_dinov2.lvd142m",
    "vitg14": "vit_giant_patch14_dinov2.lvd142m",
    "vits14_reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "vitb14_reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "vitl14_reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    "vitg14_reg": "vit_giant_patch14_reg4_dinov2.lvd142m",
}
"""Meta's names without ``dinov2_`` -> timm's. ``_reg`` has four register tokens."""

DINOV3: Mapping[str, str] = {
    "vits16": "vit_small_patch16_dinov3.lvd1689m",
    "vits16plus": "vit_small_plus_patch16_dinov3.lvd1689m",
    "vitb16": "vit_base_patch16_dinov3.lvd1689m",
    "vitl16": "vit_large_patch16_dinov3.lvd1689m",
    "vitl16_sat": "vit_large_patch16_dinov3.sat493m",
    "vith16plus": "vit_huge_plus_patch16_dinov3.lvd1689m",
    "vit7b16": "vit_7b_patch16_dinov3.lvd1689m",
    "vit7b16_sat": "vit_7b_patch16_dinov3.sat493m",
}
"""Meta's names without ``dinov3_`` -> timm's. ``_sat`` was trained on satellite images."""

_SIZES = {
    "dinov2": {"small": "vits14", "base": "vitb14", "large": "vitl14", "giant": "vitg14"},
    "dinov3": {"small": "vits16", "base": "vitb16", "large": "vitl16", "huge": "vith16plus"},
}

_GRAMMAR = {
    "dinov2": re.compile(
        r"(?P<before>with_registers_)?(?P<size>[a-z0-9]+)(?P<reg>_(reg4?|registers))?(_pretrain)?"
    ),
    "dinov3": re.compile(r"(?P<size>[a-z0-9]+)(_pretrain)?((?P<sat>_sat(493m)?)|_lvd1689m)?"),
}
"""Meta's names, without their prefix, with ``_`` instead of ``-``."""


@register_family("dinov2")
def load_dinov2(ckpt: str, image_size: tuple[int, int] | None = None) -> Tower:
    """DINOv2: a name of :data:`DINOV2`; or ``small``, ``base``, ``large``, ``giant`` (``-reg``);
    or Meta's file and hub names, or a timm name; then as for family `timm` (/random, @URL).

    The models' own image size is 518; patches are 14 pixels wide, so 224 is a usual choice.

    Raises:
        ModelError: as for family `timm`.
    """
    return _load("dinov2", DINOV2, ckpt, image_size)


@register_family("dinov3")
def load_dinov3(ckpt: str, image_size: tuple[int, int] | None = None) -> Tower:
    """DINOv3: a name of :data:`DINOV3`, ``small``, ``base``, ``large`` or ``huge``, Meta's file and
    hub names, or a timm name; then as for family `timm` (/random, @URL).

    Meta's files contain attention biases. timm's models leave them out if they are zero. If a file
    has other biases, the error names timm's model that has them (``…_qkvb``).

    Raises:
        ModelError: as for family `timm`.
    """
    return _load("dinov3", DINOV3, ckpt, image_size)


def timm_name(family: str, names: Mapping[str, str], arch: str) -> str:
    """timm's name for a short name. timm's names are returned as they are.

    Raises:
        ModelError: it is neither a short name nor a timm name of this family.
    """
    base = arch.lower()
    if base.startswith("vit_") and family in base:
        return arch
    base = base.removeprefix("facebook/").replace("-", "_").removeprefix(f"{family}_")
    found = _GRAMMAR[family].fullmatch(base)
    if found is not None:
        parts = found.groupdict()
        key = _SIZES[family].get(parts["size"], parts["size"])
        key += "_reg" if parts.get("before") or parts.get("reg") else ""
        key += "_sat" if parts.get("sat") else ""
        if key in names:
            return names[key]
    sizes = ", ".join([*names, *_SIZES[family]])
    raise ModelError(
        f"{family} has no checkpoint '{arch}'; known: {sizes}, or a timm name with '{family}'."
    )


def _load(
    family: str, names: Mapping[str, str], ckpt: str, image_size: tuple[int, int] | None
) -> Tower:
    if ckpt.startswith(("hf-hub:", "hf_hub:")):
        return load_timm(ckpt, image_size)
    ckpt = ckpt.removeprefix("facebook/")
    name = checkpoints.parse(ckpt)
    arch, tail = name.arch, "/random" if name.random else ""
    if name.tag is not None:
        raise ModelError(
            f"{family} has no checkpoint '{ckpt}'; after a slash only 'random' may stand."
        )
    if name.url is not None:
        tail = f"@{name.url}"
        if arch is None:
            # The architecture is in the name of Meta's files, and in the metadata of ours.
            file = storage.name(name.url)
            try:
                arch = timm_name(family, names, re.sub(r"(-[0-9a-f]{8})?\.\w+$", "", file))
            except ModelError:
                return load_timm(ckpt, image_size)
    assert arch is not None  # parse returns an architecture or a URL
    return load_timm(timm_name(family, names, arch) + tail, image_size)
