"""The checkpoint folder that saev writes: two objects, of which config.json is published last.

    sae.safetensors   W_enc [d_model, d_sae], b_enc, W_dec [d_sae, d_model], b_dec, threshold?
    config.json       {"format": "saev-sae", "version": 1, "sae": …, "files": …, "checksum": …}

config.json lists the weights and has its own checksum (:mod:`saev.storage.manifest`). A damaged
object, or weights of another config, are an error. Version 0.1.0 had only the key `weights`, which
is still written for that version.
"""

import typing as tp

import safetensors.torch
import torch
from torch import Tensor

from saev import storage
from saev.config.sae import SaeConfig
from saev.errors import CheckpointError, CorruptDataError
from saev.nn.io.files import parse_safetensors
from saev.version import __version__

FORMAT = "saev-sae"
VERSION = 1
CONFIG = "config.json"
WEIGHTS = "sae.safetensors"

_REMEDY = "Copy the folder again, or train the SAE again."


class Stored(tp.NamedTuple):
    """Content of a checkpoint folder."""

    cfg: SaeConfig
    tensors: dict[str, Tensor]
    metadata: dict[str, tp.Any]
    source: str
    """URL of the weights, for messages."""


def write(
    url: str,
    cfg: SaeConfig,
    tensors: tp.Mapping[str, Tensor],
    metadata: dict[str, tp.Any] | None = None,
) -> dict[str, storage.Listed]:
    """Write a checkpoint folder; returns the size and checksum of both objects, by name.

    Args:
        url: folder.
        cfg: of the SAE.
        tensors: its weights, written as float32.
        metadata: JSON-able provenance.
    """
    plain = {n: t.detach().to("cpu", torch.float32).contiguous() for n, t in tensors.items()}
    data = safetensors.torch.save(plain)
    storage.write_bytes(storage.join(url, WEIGHTS), data)
    weights = storage.Listed.of(data)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "saev": __version__,
        "sae": cfg.to_dict(),
        "weights": {"name": WEIGHTS, "n_bytes": weights.n_bytes, "checksum": weights.checksum},
        "metadata": metadata or {},
    }
    config = storage.json_bytes(storage.seal(record, {WEIGHTS: weights}))
    storage.write_bytes(storage.join(url, CONFIG), config)
    return {WEIGHTS: weights, CONFIG: storage.Listed.of(config)}


def read(url: str) -> Stored:
    """Read a checkpoint folder.

    Raises:
        CheckpointError: it is damaged, or of another version of the format.
    """
    config_url, weights_url = storage.join(url, CONFIG), storage.join(url, WEIGHTS)
    try:
        sealed = storage.read_sealed(config_url, remedy=_REMEDY)
    except CorruptDataError as err:
        raise CheckpointError(str(err)) from err
    record = sealed.record
    if record.get("format") != FORMAT:
        raise CheckpointError(f'{config_url} is not an SAE config: expected "format": "{FORMAT}".')
    if record.get("version") != VERSION:
        raise CheckpointError(
            f"{config_url} has format version {record.get('version')}, this saev reads {VERSION}. "
            "Install the saev that wrote it."
        )
    cfg = SaeConfig.from_dict(record.get("sae"), source=config_url)
    listed = (sealed.files or {}).get(WEIGHTS)
    try:
        if listed is None:
            listed = _of_0_1_0(record.get("weights"), config_url)
        data = storage.read_listed(weights_url, listed, _REMEDY)
    except CorruptDataError as err:
        raise CheckpointError(f"{err} Or the weights belong to another {CONFIG}.") from err
    tensors, metadata = parse_safetensors(data, weights_url), record.get("metadata")
    return Stored(cfg, tensors, metadata if isinstance(metadata, dict) else {}, weights_url)


def _of_0_1_0(weights: tp.Any, url: str) -> storage.Listed:
    """Size and checksum of the weights as version 0.1.0 recorded them, without blocks."""
    keys = ("n_bytes", "checksum")
    if not isinstance(weights, dict) or set(keys) - set(weights):
        raise CorruptDataError(f"{url} does not record the size and checksum of {WEIGHTS}.")
    return storage.Listed.whole(weights["n_bytes"], weights["checksum"], f"{url}: weights")
