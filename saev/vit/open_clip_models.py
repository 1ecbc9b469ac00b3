"""Families `clip` and `siglip`: the image towers of open_clip."""

import dataclasses
import typing as tp
from collections.abc import Mapping
from types import SimpleNamespace

from torch import Tensor, nn

from saev import hub, storage
from saev.errors import ModelError, did_you_mean
from saev.images.transforms import ImageSpec
from saev.vit import checkpoints, tags, timm_models
from saev.vit.model import Tower
from saev.vit.registry import register_family

HF_HUB = "hf-hub:"
_CONFIG = "open_clip_config.json"
_DIGITS = 12
_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
"""Files of weights, in the order of open_clip's preference."""


@register_family("clip")
def load_clip(ckpt: str, image_size: tuple[int, int] | None = None) -> Tower:
    """The image tower of a CLIP model.

    Args:
        ckpt: ``ARCH/TAG`` of open_clip (``ViT-B-16/openai``), ``hf-hub:ORG/NAME``,
            ``local-dir:URL`` (a folder with open_clip_config.json and weights), ARCH/random,
            ARCH@URL, or ARCH/TAG@URL (preprocessing and activation function of TAG, weights from
            the file).
        image_size: (height, width), if not the model's own; position embeddings are interpolated.

    Raises:
        ModelError: no such model, no such weights, weights that do not fit, or not a ViT.
    """
    if ckpt.startswith(HF_HUB):
        return _from_hub(ckpt, None, image_size)
    if ckpt.startswith(checkpoints.LOCAL_DIR):
        return _from_folder(ckpt, image_size)
    name = checkpoints.parse(ckpt)
    if name.arch is None:
        raise ModelError(
            f"{ckpt} does not say which architecture it holds; write ARCH@{ckpt}, "
            "for example ViT-B-16@URL."
        )
    _check_known(name.arch, name.tag)
    if name.url is None and not name.random:
        if name.tag is None:
            raise ModelError(
                f"Checkpoint '{ckpt}' names no weights; write {name.arch}/TAG with one of "
                f"{', '.join(_tags(name.arch)) or 'none'}, {name.arch}@URL, or {name.arch}/random."
            )
        return _from_hub(name.arch, name.tag, image_size)
    weights = checkpoints.read_weights(name.url) if name.url else None
    choice = _choose(name.arch, name.tag, weights)
    network = _network(name.arch, choice.config)
    if weights is None:
        network = f"{network}/{checkpoints.RANDOM}"
    tower = _from_config(name.arch, choice.config, choice.preprocess, weights, image_size)
    before = name.arch if choice.mistaken else None
    return dataclasses.replace(tower, network=network, network_before=before)


@register_family("siglip")
def load_siglip(ckpt: str, image_size: tuple[int, int] | None = None) -> Tower:
    """The image tower of a SigLIP or SigLIP 2 model; it has no class token.

    Args and errors as :func:`load_clip`; ARCH is one of open_clip's SigLIP architectures
    (``ViT-B-16-SigLIP2/webli``).
    """
    is_folder = ckpt.startswith(checkpoints.LOCAL_DIR)
    arch = ckpt if is_folder or ckpt.startswith(HF_HUB) else checkpoints.parse(ckpt).arch
    if arch is not None and not is_folder and "siglip" not in arch.lower():
        import open_clip

        known = [name for name in open_clip.list_models() if "siglip" in name.lower()]
        raise ModelError(
            f"'{arch}' is not a SigLIP model.{did_you_mean(f'{arch}-SigLIP', known, n=3)} For "
            "other models use family clip."
        )
    return load_clip(ckpt, image_size)


def _check_known(arch: str, tag: str | None) -> None:
    import open_clip

    known = open_clip.list_models()
    if arch not in known:
        raise ModelError(f"open_clip has no model '{arch}'.{did_you_mean(arch, known, n=3)}")
    if tag is not None and not open_clip.get_pretrained_cfg(arch, tag):
        raise ModelError(
            f"open_clip has no pretrained tag '{tag}' of {arch}; "
            f"known: {', '.join(_tags(arch)) or 'none'}."
        )


def _tags(arch: str) -> list[str]:
    import open_clip

    return list(open_clip.list_pretrained_tags_by_model(arch))


def _arch_config(arch: str) -> dict[str, tp.Any]:
    import open_clip

    config: dict[str, tp.Any] = open_clip.get_model_config(arch)
    return config


class _Choice(tp.NamedTuple):
    """Config and preprocessing of a network."""

    config: dict[str, tp.Any]
    """Config of the network."""
    preprocess: Mapping[str, tp.Any]
    """Preprocessing of images, as open_clip describes it."""
    mistaken: bool
    """Whether version 0.1.0 built another network: without a tag, that version always took the
    architecture's own activation function."""


def _choose(arch: str, tag: str | None, weights: checkpoints.Weights | None) -> _Choice:
    """Choose activation function and preprocessing, by the rules of `saev.vit.tags`."""
    import open_clip

    config = _arch_config(arch)
    own = bool(config.get("quick_gelu"))
    by_tag = {t: dict(open_clip.get_pretrained_cfg(arch, t)) for t in _tags(arch)}
    quick_by_tag = {t: own or bool(c.get("quick_gelu")) for t, c in by_tag.items()}
    if weights is None:  # untrained
        quick = own if tag is None else quick_by_tag[tag]
        preprocess = _agreed(by_tag)[0] if tag is None else by_tag[tag]
        return _Choice({**config, "quick_gelu": quick}, preprocess, False)
    is_openai = tags.is_openai(weights.tensors)
    known = tags.OPENAI if tag is None and is_openai and tags.OPENAI in by_tag else tag
    if known is not None:
        quick, preprocess = quick_by_tag[known], by_tag[known]
    else:
        preprocess, disagreements = _agreed(by_tag)
        quick, activation = (True, None) if is_openai else tags.quick_gelu(quick_by_tag, own)
        if activation is not None and not _on_timm(config):
            disagreements = [activation, *disagreements]
        tags.warn_of(disagreements, arch, weights.url, f"{arch}/TAG@URL")
    if is_openai and not quick:
        tags.warn_of_gelu(f"{arch}/{tag}", weights.url)
    mistaken = tag is None and quick != own and not _on_timm(config)
    return _Choice({**config, "quick_gelu": quick}, preprocess, mistaken)


def _on_timm(config: Mapping[str, tp.Any]) -> bool:
    """Whether the image tower is one of timm's, which has its own activation function."""
    return bool(config["vision_cfg"].get("timm_model_name"))


def _network(arch: str, config: Mapping[str, tp.Any]) -> str:
    """open_clip's name of an architecture with the activation function of a config."""
    is_other = config.get("quick_gelu") and not _arch_config(arch).get("quick_gelu")
    return f"{arch}-quickgelu" if is_other and not _on_timm(config) else arch


def _agreed(
    by_tag: Mapping[str, Mapping[str, tp.Any]],
) -> tuple[dict[str, tp.Any], list[tags.Disagreement]]:
    """The preprocessing that all tags of an architecture have in common, and their
    disagreements."""
    from open_clip.transform import PreprocessCfg

    default = dataclasses.asdict(PreprocessCfg())
    agreed: dict[str, tp.Any] = {}
    disagreements = []
    for key in ("mean", "std", "interpolation", "resize_mode"):
        found = tags.by_value({t: str(c.get(key, default[key])) for t, c in by_tag.items()})
        if len(found) > 1:
            disagreements.append(tags.Disagreement(key, str(default[key]), found))
        elif by_tag:
            agreed[key] = next(iter(by_tag.values())).get(key, default[key])
    return agreed, disagreements


def _from_hub(arch: str, tag: str | None, image_size: tuple[int, int] | None) -> Tower:
    import open_clip

    options: dict[str, tp.Any] = {}
    if tag is not None and open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu"):
        # open_clip only warns when weights trained with QuickGELU are loaded into GELU networks.
        options["force_quick_gelu"] = True
    if image_size is not None:
        options["force_image_size"] = image_size
    away = hub.problem()
    try:
        model = open_clip.create_model(
            arch, pretrained=tag, require_pretrained=True, pretrained_text=False, **options
        )
    except Exception as err:
        # The hub's clients raise dozens of types, and open_clip turns some into RuntimeError.
        name = f"{arch}/{tag}" if tag else arch
        raise timm_models.hub_error(name, err, away) from err
    visual = model.visual
    if image_size is not None:
        _check_patch(visual, arch, image_size)
    tower = _tower(visual, arch, visual.preprocess_cfg, None)
    if tag is None:
        return tower
    config = _arch_config(arch)
    config["quick_gelu"] = "force_quick_gelu" in options or config.get("quick_gelu")
    return dataclasses.replace(tower, network=_network(arch, config))


def _from_folder(ckpt: str, image_size: tuple[int, int] | None) -> Tower:
    folder = storage.normalize(ckpt.removeprefix(checkpoints.LOCAL_DIR))
    raw = storage.read_json(storage.join(folder, _CONFIG))
    if not isinstance(raw, Mapping) or not isinstance(raw.get("model_cfg"), Mapping):
        raise ModelError(
            f"{storage.join(folder, _CONFIG)} has no 'model_cfg'; expected a folder "
            "that open_clip's push_to_hf_hub wrote."
        )
    names = {entry.name for entry in storage.list_dir(folder)}
    weights_name = next((n for n in _WEIGHTS if n in names), None)
    if weights_name is None:
        raise ModelError(f"{folder} holds no weights; expected one of {', '.join(_WEIGHTS)}.")
    weights = checkpoints.read_weights(storage.join(folder, weights_name))
    config = {**raw["model_cfg"], "vision_cfg": dict(raw["model_cfg"]["vision_cfg"])}
    mistaken = False
    if tags.is_openai(weights.tensors) and not config.get("quick_gelu"):
        if "quick_gelu" in config:
            tags.warn_of_gelu(storage.join(folder, _CONFIG), weights.url)
        else:
            config["quick_gelu"] = mistaken = True
    image_tower = {key: config.get(key) for key in ("embed_dim", "vision_cfg", "quick_gelu")}
    network = checkpoints.LOCAL_DIR + storage.content_hash(image_tower, _DIGITS)
    tower = _from_config(folder, config, raw.get("preprocess_cfg") or {}, weights, image_size)
    before = "a network with GELU" if mistaken else None
    return dataclasses.replace(tower, network=network, network_before=before)


def _from_config(
    arch: str,
    config: dict[str, tp.Any],
    preprocess: Mapping[str, tp.Any],
    weights: checkpoints.Weights | None,
    image_size: tuple[int, int] | None,
) -> Tower:
    """Build the image tower only. A text tower can be larger (SigLIP's vocabulary has 256k
    entries)."""
    from open_clip.model import _build_vision_tower
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    vision = config["vision_cfg"]
    on_timm = _on_timm(config)
    if image_size is not None and not on_timm:
        vision["image_size"] = image_size
    vision.pop("timm_model_pretrained", None)
    with checkpoints.untrained():
        visual = _build_vision_tower(
            config["embed_dim"], vision, bool(config.get("quick_gelu", False))
        )
    if image_size is not None:
        _check_patch(visual, arch, image_size)
    if weights is not None:
        _fill(visual, arch, weights, is_asked=image_size is not None)
    if image_size is not None and on_timm:
        visual.set_input_size(image_size)
    merged = merge_preprocess_dict(dataclasses.asdict(PreprocessCfg()), dict(preprocess))
    merged["size"] = visual.image_size
    return _tower(visual, arch, merged, weights.checksum if weights is not None else None)


def _fill(visual: nn.Module, arch: str, weights: checkpoints.Weights, *, is_asked: bool) -> None:
    from open_clip.model import resize_pos_embed

    expected = visual.state_dict().keys()
    tensors = checkpoints.strip_prefix(weights.tensors, expected, weights.url)
    key = "positional_embedding"
    if key in expected and key in tensors:
        own = visual.state_dict()[key]
        checkpoints.log_resized(arch, weights.url, tensors[key], own, is_asked=is_asked)
        renamed = {f"visual.{key}": tensors[key]}
        try:
            resize_pos_embed(renamed, SimpleNamespace(visual=visual))
        except RuntimeError as err:
            raise ModelError(
                f"{weights.url} does not fit {arch}: its position embeddings are "
                f"{list(tensors[key].shape)}, which are no class token and a square of patches; "
                f"expected {list(own.shape)}. Check the architecture before '@'."
            ) from err
        tensors[key] = renamed[f"visual.{key}"]
    checkpoints.load_into(visual, tensors, arch=arch, url=weights.url)


def _check_patch(visual: tp.Any, arch: str, image_size: tuple[int, int]) -> None:
    embed = getattr(getattr(visual, "trunk", None), "patch_embed", visual)
    patch = getattr(embed, "patch_size", None)
    if patch is not None:
        patch = (patch, patch) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))
        timm_models.check_divisible(arch, image_size, patch)


def _tower(
    visual: tp.Any, arch: str, preprocess: Mapping[str, tp.Any], ckpt_checksum: str | None
) -> Tower:
    spec = ImageSpec.from_open_clip(preprocess)

    def pool(images: Tensor) -> Tensor:
        pooled = visual(images)
        return pooled[0] if isinstance(pooled, tuple) else pooled  # CoCa also returns its tokens

    if hasattr(visual, "trunk"):
        parts = timm_models.tower_parts(visual.trunk, arch, spec.image_size)
    elif hasattr(visual, "transformer") and hasattr(visual, "class_embedding"):
        parts = {
            "blocks": list(visual.transformer.resblocks),
            "grid": (int(visual.grid_size[0]), int(visual.grid_size[1])),
            "special_tokens": 1,
            "cls_token": True,
        }
    else:
        raise ModelError(
            f"{arch} ({type(visual).__name__}) is not a plain ViT; choose one whose name starts "
            "with ViT."
        )
    return Tower(module=visual, spec=spec, pool=pool, ckpt_checksum=ckpt_checksum, **parts)
