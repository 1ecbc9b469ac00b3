"""Converts flags and files to the configs that the stages would get."""

import typing as tp

from saev import storage
from saev.config.images import FakeImg, ImageData, ImgSegFolder
from saev.config.inference import InferenceConfig
from saev.config.run import RunFile
from saev.config.shards import ShardsConfig
from saev.config.size import SizeConfig
from saev.config.stages import resolve_stages
from saev.config.sweeps import requested_configs
from saev.config.train import TrainConfig
from saev.errors import ConfigError
from saev.shards.protocol import Metadata
from saev.size import models

_PLACE = "memory://size"
"""Placeholder for URLs, which do not affect sizes."""


class Inputs(tp.NamedTuple):
    """The work whose size is estimated."""

    recording: Metadata
    """Metadata of the future shards folder, without names."""
    labels: bool
    """Whether patches have labels."""
    saes: tuple[TrainConfig, ...]
    """One config per SAE."""
    max_parallel: int
    """Most SAEs on one pass over the data; 0 means no limit."""
    inference: InferenceConfig
    """Config of inference."""

    def groups(self) -> list[list[int]]:
        """Numbers of the SAEs that are trained on the same batches, as training groups them."""
        by_data: dict[tuple[tp.Any, ...], list[int]] = {}
        for i, sae in enumerate(self.saes):
            steps = (sae.batch_size, sae.n_train, sae.n_val, sae.data_seed)
            by_data.setdefault((sae.train_data, sae.val_data, *steps), []).append(i)
        found = []
        for members in by_data.values():
            size = self.max_parallel or len(members)
            found += [members[start : start + size] for start in range(0, len(members), size)]
        return found


def gather(cfg: SizeConfig) -> Inputs:
    """Collect all inputs from flags and files.

    Raises:
        ConfigError: something is missing or does not fit. The message names the flag.
        StorageError: a file or the images cannot be read.
    """
    file = RunFile.portable(cfg.config) if cfg.config else RunFile()
    images = cfg.data or file.data
    shards, saes, inference = _stages(cfg, file, images)
    n_images = _count(cfg, images)
    vit = _model(cfg, shards, named=bool(cfg.config))
    for sae in saes:
        sae.sae.resolved(vit.d_model)
    recording = Metadata(
        family=shards.family,
        ckpt=shards.ckpt,
        layers=tuple(range(cfg.layers or len(shards.layers))),
        content_tokens_per_example=vit.content_tokens,
        cls_token=cfg.cls_token and shards.cls_token and vit.cls_token,
        d_model=vit.d_model,
        n_examples=n_images,
        max_tokens_per_shard=cfg.max_tokens_per_shard or shards.max_tokens_per_shard,
        data=None,
        dtype=cfg.dtype or shards.dtype,
    )
    labels = cfg.labels or isinstance(images, ImgSegFolder) or _is_fake_seg(images)
    max_parallel = saes[0].max_parallel
    return Inputs(recording, labels, saes, max_parallel, inference)


def _is_fake_seg(images: ImageData | None) -> bool:
    return images is not None and images.kind == "fake-img-seg"


# --- Images --------------------------------------------------------------------------------


def _count(cfg: SizeConfig, images: ImageData | None) -> int:
    if cfg.n_images is not None:
        return cfg.n_images
    if images is None:
        raise ConfigError(
            "How many images? Give --n-images, or name them: data:img-folder --data.root URL."
        )
    from saev.images import open_dataset  # the small image has no decoder

    return len(open_dataset(images))


# --- The model -----------------------------------------------------------------------------


class _Sizes(tp.NamedTuple):
    d_model: int
    content_tokens: int
    cls_token: bool


def _model(cfg: SizeConfig, shards: ShardsConfig, *, named: bool) -> _Sizes:
    """Sizes from explicit flags, or else from the model that a flag or the file names."""
    d_model = cfg.d_model or (shards.d_model if named else None)
    tokens = cfg.content_tokens_per_example or (
        shards.content_tokens_per_example if named else None
    )
    if d_model and tokens:
        return _Sizes(d_model, tokens, cls_token=True)
    image_size = cfg.image_size or shards.image_size
    if cfg.model:
        vit: models.Vit | None = models.by_name(cfg.model)
    elif cfg.family or cfg.ckpt or named:
        vit = models.by_checkpoint(shards.family, shards.ckpt)
    else:
        raise ConfigError(
            "Which model? Give --model (--model list prints the names), --family and --ckpt, or "
            "--d-model and --content-tokens-per-example."
        )
    if cfg.load_model:
        family, ckpt = (vit.family, vit.arch) if vit else (shards.family, shards.ckpt)
        found = _Sizes(*models.build(family, ckpt, image_size))
    elif vit is not None:
        found = _Sizes(vit.d_model, vit.content_tokens(image_size), vit.cls_token)
    else:
        raise ConfigError(
            f"{shards.family} {shards.ckpt} is not in the list of models. Give --load-model, which "
            "builds it, or --d-model and --content-tokens-per-example."
        )
    return found._replace(
        d_model=d_model or found.d_model, content_tokens=tokens or found.content_tokens
    )


# --- Stages --------------------------------------------------------------------------------


def _stages(
    cfg: SizeConfig, file: RunFile, images: ImageData | None
) -> tuple[ShardsConfig, tuple[TrainConfig, ...], InferenceConfig]:
    source = storage.normalize(cfg.config) if cfg.config else "the flags"
    stages = resolve_stages(file, _PLACE, images or FakeImg(), source)
    flags = {name: v for name in ("family", "ckpt") if (v := getattr(cfg, name)) is not None}
    shards = stages.shards.model_copy(update=flags)
    members = requested_configs(stages.train, table=stages.sweep)
    saes = tuple(_with_flags(cfg, sae) for sae in members)
    if cfg.config and cfg.n_saes > 1:
        raise ConfigError(f"--n-saes is {cfg.n_saes}, but the number comes from {source}.")
    inference = InferenceConfig.from_dict({**stages.inference, "run": _PLACE}, source=source)
    return shards, saes * cfg.n_saes, inference


def _with_flags(cfg: SizeConfig, sae: TrainConfig) -> TrainConfig:
    """A training config with the values of flags."""
    raw = sae.to_dict()
    for name in ("n_train", "batch_size"):
        if getattr(cfg, name) is not None:
            raw[name] = getattr(cfg, name)
    if cfg.buffer_mb is not None:
        raw["train_data"]["buffer_mb"] = cfg.buffer_mb
    if cfg.d_sae is not None:
        raw["sae"]["d_sae"] = cfg.d_sae
    if cfg.top_k is not None and "top_k" in raw["sae"]["activation"]:
        raw["sae"]["activation"]["top_k"] = cfg.top_k
    return TrainConfig.from_dict(raw, source="the flags")
