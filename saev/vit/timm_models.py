"""Family `timm`: any plain ViT of timm (ViT, DeiT, DINOv2, DINOv3, EVA, MAE, PE, SigLIP …)."""

import dataclasses
import importlib
import inspect
import re
import typing as tp
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from saev import hub
from saev.errors import ModelError, did_you_mean
from saev.images.transforms import ImageSpec
from saev.vit import checkpoints, tags
from saev.vit.model import Tower
from saev.vit.registry import register_family

_HUB = ("hf-hub:", "hf_hub:")
_POSITIONS = re.compile(r"(^|\.)(pos_embed|(visual\.)?positional_embedding)$")


@register_family("timm")
def load_timm(ckpt: str, image_size: tuple[int, int] | None = None) -> Tower:
    """A timm model.

    Args:
        ckpt: a timm name with or without a pretrained tag (``vit_base_patch16_224.mae``; weights
            from the hub or its local cache), ``hf-hub:ORG/NAME``, NAME/random, NAME@URL, or the
            URL of safetensors whose metadata names its architecture.
        image_size: (height, width), if not the model's own; position embeddings are interpolated.

    Raises:
        ModelError: no such model, no such weights, or weights that do not fit.
    """
    if ckpt.startswith(_HUB):
        own = ckpt.partition(":")[2].removeprefix("timm/")
        if "/" in own or _native(own, None) == own:
            tower = _tower(_create(ckpt, image_size, pretrained=True), image_size)
            return dataclasses.replace(tower, network=None)  # its config is on the hub
        ckpt = own
    # The hub calls timm's own models timm/NAME.
    name = checkpoints.parse(ckpt.removeprefix("timm/"))
    weights = checkpoints.read_weights(name.url) if name.url else None
    arch = name.arch
    if weights is not None and arch is None:
        arch = weights.metadata.get(checkpoints.ARCHITECTURE)
    if arch is None:
        raise ModelError(
            f"{ckpt} does not say which architecture it holds; write ARCH@{ckpt}, "
            "for example vit_base_patch16_224@URL."
        )
    if name.tag is not None:
        raise ModelError(
            f"Checkpoint '{ckpt}': timm writes a pretrained tag after a dot, "
            f"as in {arch}.{name.tag}; after a slash only 'random' may stand."
        )
    _check_known(arch)
    base = arch.partition(".")[0]
    if not name.random:
        arch = _native(arch, weights)
    mistaken = base if arch.partition(".")[0] != base else None
    if weights is not None:
        with checkpoints.untrained():
            net = _create(arch, image_size, pretrained=False)
        fill(net, arch, weights, is_asked=image_size is not None)
        tower = _tower(net, image_size, weights.checksum)
        return dataclasses.replace(tower, network_before=mistaken)
    if name.random:
        with checkpoints.untrained():
            tower = _tower(_create(arch, image_size, pretrained=False), image_size)
        return dataclasses.replace(tower, network=f"{tower.network}/{checkpoints.RANDOM}")
    tower = _tower(_create(arch, image_size, pretrained=True), image_size)
    return dataclasses.replace(tower, network_before=mistaken)


def _native(arch: str, weights: checkpoints.Weights | None) -> str:
    """timm's name of the network in which weights were trained, by the rules of `saev.vit.tags`.

    timm has two variants of CLIP's networks, with GELU and with QuickGELU, and loads any weights
    into either. The notes of a tag say whether its weights are "natively QuickGELU".
    """
    import timm

    base, _, tag = arch.partition(".")
    configs = {t: _config(f"{base}.{t}") for t in _tags(base)}
    variant = base.replace("_clip_", "_clip_quickgelu_")
    has_variant = variant != base and timm.is_model(variant)
    is_openai = weights is not None and tags.is_openai(weights.tensors)
    if not tag and is_openai and tags.OPENAI in configs:
        tag = tags.OPENAI
        arch = f"{base}.{tag}"
    quick = is_openai
    if weights is not None and not tag:
        disagreements = _disagreements(base, configs)
        if has_variant and not is_openai:
            by_tag = {t: _is_quick(config) for t, config in configs.items()}
            quick, activation = tags.quick_gelu(by_tag, False)
            disagreements = [*([activation] if activation else []), *disagreements]
        tags.warn_of(disagreements, base, weights.url, f"{base}.TAG@URL")
    else:
        quick = _is_quick(_config(f"{base}.{tag}" if tag else base))
    if not has_variant:
        return arch
    if weights is not None and is_openai and not quick:
        tags.warn_of_gelu(arch, weights.url)
    if not quick:
        return arch
    return f"{variant}.{tag}" if tag in _tags(variant) else variant


def _is_quick(config: tp.Any) -> bool:
    return config is not None and "quickgelu" in " ".join(config.notes or ()).lower()


def _disagreements(base: str, configs: Mapping[str, tp.Any]) -> list[tags.Disagreement]:
    """Differences in preprocessing between the tags of an architecture. The first tag is used."""
    taken, found = _config(base), []
    for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size"):
        values = tags.by_value({t: str(getattr(c, key)) for t, c in configs.items()})
        if len(values) > 1:
            found.append(tags.Disagreement(key, str(getattr(taken, key)), values))
    return found


def _config(name: str) -> tp.Any:
    import timm

    return timm.get_pretrained_cfg(name, allow_unregistered=True)


def _tags(base: str) -> list[str]:
    import timm

    return [name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")]


def fill(
    net: nn.Module, arch: str, weights: checkpoints.Weights, *, is_asked: bool = False
) -> None:
    """Load weights in timm's or the original authors' naming, of any resolution.

    Args:
        net: a network of timm.
        arch: name of the network.
        weights: the weights file.
        is_asked: whether the user asked for an image size.

    Raises:
        ModelError: a parameter is missing, has another shape, or would be dropped.
    """
    tensors = checkpoints.strip_prefix(weights.tensors, net.state_dict().keys(), weights.url)
    _check_dropped_bias(net, arch, tensors, weights.url)
    _log_resized(net, arch, tensors, weights.url, is_asked=is_asked)
    tensors = _convert(net, arch, tensors, weights.url)
    checkpoints.load_into(net, tensors, arch=arch, url=weights.url)


def tower_parts(net: nn.Module, arch: str, size: tuple[int, int]) -> dict[str, tp.Any]:
    """The fields `blocks`, `grid`, `special_tokens` and `cls_token` of a :class:`Tower`.

    Raises:
        ModelError: the network is not a plain ViT.
    """
    blocks = getattr(net, "blocks", None)
    stem = getattr(net, "embeds", None) or net  # of NaFlexVit: holds tokens and embeddings
    embed = getattr(net, "patch_embed", None) or getattr(net, "embeds", None)
    if blocks is None or embed is None:
        raise ModelError(
            f"{arch} ({type(net).__name__}) is not a plain ViT: it has no "
            f"{'blocks' if blocks is None else 'patch embedding'}; choose a vit, deit, eva or beit."
        )
    if hasattr(embed, "dynamic_feat_size"):
        rows, columns = embed.dynamic_feat_size(size)
    elif isinstance(getattr(embed, "grid_size", None), tuple):
        rows, columns = embed.grid_size
    else:
        raise ModelError(
            f"{arch} ({type(net).__name__}) is not a plain ViT: its patch embedding has no grid."
        )
    special = int(getattr(net, "num_prefix_tokens", 0))
    if hasattr(net, "blocks_token_only"):  # CaiT adds the class token after these blocks
        special = 0
    return {
        "blocks": list(blocks),
        "grid": (int(rows), int(columns)),
        "special_tokens": special,
        "cls_token": special > 0 and getattr(stem, "cls_token", None) is not None,
    }


def _tower(
    net: nn.Module, image_size: tuple[int, int] | None, ckpt_checksum: str | None = None
) -> Tower:
    from timm.data import resolve_model_data_config

    model: tp.Any = net
    arch = str(model.pretrained_cfg.get("architecture") or type(net).__name__)
    size = image_size or getattr(getattr(net, "patch_embed", None), "img_size", None)
    args = {} if size is None else {"input_size": (3, *size)}
    config = resolve_model_data_config(net, args=args)
    spec = ImageSpec.from_timm(config)
    parts = tower_parts(net, arch, spec.image_size)
    if image_size is not None:
        embed = getattr(net, "patch_embed", None) or model.embeds
        check_divisible(arch, image_size, _patch(embed))

    def pool(images: Tensor) -> Tensor:
        features = model.forward_features(images)
        pooled: Tensor = model.forward_head(features, pre_logits=True)
        if pooled.ndim == 3:  # the model does not pool (global_pool='')
            special = parts["special_tokens"]
            pooled = pooled[:, 0] if parts["cls_token"] else pooled[:, special:].mean(dim=1)
        return pooled

    return Tower(
        module=net, spec=spec, pool=pool, ckpt_checksum=ckpt_checksum, network=arch, **parts
    )


def check_divisible(arch: str, size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Raise ModelError if a side of an image is not a multiple of the patch's side.

    Pixels at the edge would then be in no patch.
    """
    for side, step in zip(size, patch, strict=True):
        if side % step:
            below = max(side // step, 1) * step
            raise ModelError(
                f"image_size {size[0]} x {size[1]} does not fit {arch}: its patches are "
                f"{patch[0]} x {patch[1]} pixels; use a multiple, such as {below} "
                f"or {below + step}."
            )


def _patch(embed: tp.Any) -> tuple[int, int]:
    patch = embed.feat_ratio(as_scalar=False) if hasattr(embed, "feat_ratio") else embed.patch_size
    return (patch, patch) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))


def _check_known(arch: str) -> None:
    import timm

    base, _, tag = arch.partition(".")
    if not timm.is_model(base):
        hint = did_you_mean(base, timm.list_models(), n=3)
        raise ModelError(f"timm has no model '{base}'.{hint}")
    known = _tags(base)
    if tag and tag not in known:
        raise ModelError(
            f"timm has no pretrained tag '{tag}' of {base}; known: {', '.join(known) or 'none'}."
        )


def _create(name: str, image_size: tuple[int, int] | None, *, pretrained: bool) -> nn.Module:
    import timm

    size: dict[str, tp.Any] = {} if image_size is None else {"img_size": image_size}
    away = hub.problem() if pretrained else None
    try:
        net: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
    except (TypeError, AssertionError) as err:
        if image_size is None:
            raise
        raise ModelError(
            f"{name} cannot be built for images of {image_size[0]} x {image_size[1]} pixels "
            f"({err or type(err).__name__}); leave --image-size out."
        ) from err
    except Exception as err:
        # The hub's clients raise dozens of types (httpx, huggingface_hub, urllib, OSError …).
        if not pretrained:
            raise
        raise hub_error(name, err, away) from err
    return net


def hub_error(name: str, err: Exception, away: Exception | None) -> ModelError:
    """The error for weights that the model hub does not give.

    Args:
        name: name of the model.
        err: error of the hub's client.
        away: why the hub cannot be reached; None if it can.
    """
    err = away or err
    reason = next((line.strip() for line in str(err).splitlines() if line.strip()), "")
    arch = "ARCH" if name.startswith(_HUB) else name
    error = ModelError(
        f"Cannot get the weights of {name} from the model hub ({type(err).__name__}: "
        f"{reason[:200]}). Without internet access name a weights file, "
        f"--ckpt {arch}@FILE (a path or URL of safetensors or a torch state dict, fetched "
        "elsewhere), or set HF_HOME to a folder that holds the hub's cache."
    )
    error.passing = away is not None
    return error


def _check_dropped_bias(net: nn.Module, arch: str, tensors: Mapping[str, Tensor], url: str) -> None:
    """Raise ModelError if a file has qkv biases and the network has none: timm's DINOv3 would drop
    them silently."""
    if any(name.endswith(("q_bias", "qkv.bias", "q_proj.bias")) for name in net.state_dict()):
        return
    for name, bias in tensors.items():
        if not name.endswith("qkv.bias"):
            continue
        query, _, value = bias.chunk(3)  # the original masks the key's bias
        if bool(query.any()) or bool(value.any()):
            base, dot, tag = arch.partition(".")
            raise ModelError(
                f"{url} has attention biases ({name}), which {arch} lacks; "
                f"use {base}_qkvb{dot}{tag}@URL."
            )


def _log_resized(
    net: nn.Module, arch: str, tensors: Mapping[str, Tensor], url: str, *, is_asked: bool
) -> None:
    """Log that timm interpolates position embeddings, which it does silently."""
    needed = net.state_dict().get("pos_embed")
    found = [t for name, t in tensors.items() if _POSITIONS.search(name) and t.ndim > 1]
    if needed is not None and needed.ndim == 3 and len(found) == 1:
        checkpoints.log_resized(arch, url, found[0], needed, is_asked=is_asked)


def _convert(net: nn.Module, arch: str, tensors: dict[str, Tensor], url: str) -> dict[str, Tensor]:
    """Convert foreign names and resolutions with timm's own function, as its hub loading does."""
    import timm

    entry = timm.model_entrypoint(arch)
    convert = getattr(importlib.import_module(entry.__module__), "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    # timm sets these options per variant inside functions that build models
    # (timm.models.deit._create_deit, timm.models.vision_transformer._create_vision_transformer).
    options: dict[str, tp.Any] = {}
    if entry.__module__.endswith(".deit"):
        options["adapt_layer_scale"] = True
    if "flexi" in arch or "radio" in arch:
        options |= {"interpolation": "bilinear", "antialias": False}
    accepted = inspect.signature(convert).parameters
    options = {k: v for k, v in options.items() if k in accepted}
    try:
        with torch.no_grad():
            converted: dict[str, Tensor] = convert(dict(tensors), net, **options)
    except (KeyError, RuntimeError, AttributeError, IndexError, ValueError) as err:
        raise ModelError(
            f"{url} does not fit {arch}: timm cannot convert it ({type(err).__name__}: {err}). "
            "Check the architecture before '@'."
        ) from err
    return converted
