"""Loads the model that activations were recorded with, and compares it with the record."""

import dataclasses
import json
import logging

import torch

from saev import storage
from saev.config.source import ActivationSource, compare
from saev.errors import ConfigError, CorruptDataError, ModelError, StorageError
from saev.vit import checkpoints
from saev.vit.model import VisionModel
from saev.vit.registry import load

logger = logging.getLogger(__name__)

_HUB = ("hf-hub:", "hf_hub:")


def load_recorded(
    source: ActivationSource, record: str, *, ckpt: str = "", device: str | torch.device = "cpu"
) -> VisionModel:
    """Load a model again, with the image size of the recording.

    Args:
        source: what was recorded.
        record: URL of the file or folder that says so.
        ckpt: where the weights are now, in the family's naming. By default they are where the
            record says, if a stored file may name that place (:mod:`saev.storage.stored`).
        device: where to run.

    Raises:
        ConfigError: the record does not name its model, or names a place that only the user may
            name.
        ModelError: the weights are missing, or are others than those that were recorded.
    """
    if source.family is None or source.ckpt is None:
        raise ConfigError(
            f"{record} does not say which model its activations are of. Name the shards folder "
            "that they were recorded into with --shards URL."
        )
    name = ckpt or _trusted(source.ckpt, record)
    try:
        model = _load(source, name, device)
    except (ModelError, StorageError) as err:
        moved = "" if ckpt or not checkpoints.parse(name).url else f" {_remedy(source)}"
        raise ModelError(f"{record} needs its model, {source.model}: {err}{moved}") from err
    _check(source, model, record)
    return model


def describe(model: VisionModel) -> ActivationSource:
    """What a recording says about its model."""
    return ActivationSource(
        family=model.family,
        ckpt=model.ckpt,
        ckpt_checksum=model.ckpt_checksum,
        network=model.network,
        weights=model.weights,
        structure=model.structure,
        image_size=model.image_size,
        image_spec=json.loads(json.dumps(dataclasses.asdict(model.spec))),
    )


def _load(source: ActivationSource, ckpt: str, device: str | torch.device) -> VisionModel:
    family = source.family or ""
    try:
        return load(family, ckpt, image_size=source.image_size, device=device)
    except ModelError as err:
        # Some networks are built only in their own size, which may be the recorded one.
        if not isinstance(err.__cause__, TypeError | AssertionError):
            raise
        model = load(family, ckpt, device=device)
        if model.image_size != source.image_size:
            raise
        return model


def _check(source: ActivationSource, model: VisionModel, record: str) -> None:
    found = compare(source, describe(model)).refused
    if source.network is None and model.network_before is not None:
        found.append(f"network {model.network_before}, as version 0.1.0 built it, there")
    if found:
        wrong = "; ".join(found).replace(" in training", " there")
        raise ModelError(
            f"The model that was loaded is not the one that {record} was made with: {wrong}. "
            f"{_remedy(source)}"
        )


def _trusted(ckpt: str, record: str) -> str:
    """A checkpoint's name from a stored file, if the place that it names may be opened."""
    remedy = "If it is yours, name it: --ckpt CKPT."
    if ckpt.startswith(checkpoints.LOCAL_DIR):
        place = ckpt.removeprefix(checkpoints.LOCAL_DIR)
        return f"{checkpoints.LOCAL_DIR}{storage.recorded_folder(place, record, remedy)}"
    if ckpt.startswith(_HUB) and not ckpt.partition(":")[2].startswith("timm/"):
        raise ConfigError(
            f"{record} names the model {ckpt} on the Hugging Face hub, which is downloaded only if "
            f"you name it yourself. {remedy}"
        )
    url = checkpoints.parse(ckpt).url
    if url is None or ckpt.startswith(_HUB):
        return ckpt
    folder = storage.recorded_folder(storage.parent(url), record, remedy)
    try:
        place = storage.inside(folder, storage.name(url))
    except CorruptDataError as err:  # a link to another folder, as in the hub's cache
        raise ConfigError(f"{err} {remedy}") from err
    return ckpt[: ckpt.index(url)] + place


def _remedy(source: ActivationSource) -> str:
    arch = (source.ckpt or "ARCH").partition("@")[0]
    return f"Say where its weights are now with --ckpt, for example --ckpt {arch}@URL."
