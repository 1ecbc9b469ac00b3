"""Reading and writing SAEs.

A checkpoint is a folder of two objects, the second published last:

    sae.safetensors   W_enc [d_model, d_sae], b_enc, W_dec [d_sae, d_model], b_dec, threshold?
    config.json       {"format": "saev-sae", "version": 1, "sae": …, "weights": {size, checksum}}

config.json records the checksum of the weights, so a damaged or mixed-up pair is an error.
"""

import logging
import typing as tp

import safetensors.torch
import torch

import saev
from saev import storage
from saev.config.sae import SaeConfig
from saev.errors import CheckpointError, CorruptDataError, StorageError
from saev.nn import published, saelens
from saev.nn.sae import SparseAutoencoder

logger = logging.getLogger(__name__)

FORMAT = "saev-sae"
VERSION = 1
CONFIG = "config.json"
WEIGHTS = "sae.safetensors"
HUB_PREFIX = "hf-hub:"


def save_sae(sae: SparseAutoencoder, url: str, metadata: dict[str, tp.Any] | None = None) -> None:
    """Write a checkpoint folder. See :meth:`SparseAutoencoder.save`."""
    tensors = {
        name: t.detach().to("cpu", torch.float32).contiguous()
        for name, t in sae.state_dict().items()
    }
    data = safetensors.torch.save(tensors)
    storage.write_bytes(storage.join(url, WEIGHTS), data)
    storage.write_json(
        storage.join(url, CONFIG),
        {
            "format": FORMAT,
            "version": VERSION,
            "saev": saev.__version__,
            "sae": sae.cfg.to_dict(),
            "weights": {
                "name": WEIGHTS,
                "n_bytes": len(data),
                "checksum": storage.format_checksum(storage.crc32c(data)),
            },
            "metadata": metadata or {},
        },
    )


def load_sae(
    url: str, device: str | torch.device = "cpu", *, subtract_b_dec: bool = False
) -> SparseAutoencoder:
    """Load an SAE.

    Args:
        url: a run folder, a checkpoint folder, a SAELens folder, a file ``sae.pt`` of the published
            saev (or a folder that holds one), or ``hf-hub:ORG/REPO[/SUBDIR]``.
        device: where its weights go.
        subtract_b_dec: for ``sae.pt`` files from before August 2025, whose encoder saw x - b_dec:
            fold b_enc ← b_enc - b_dec·W_enc.

    Raises:
        CheckpointError: the files are damaged, of an unknown format, or do not fit each other.
        StorageError: there is nothing to read.
    """
    if url.startswith(HUB_PREFIX):
        url = _download(url)
    url = storage.normalize(url)
    kind, location = _locate(url)
    if subtract_b_dec and kind != "published":
        raise CheckpointError(
            f"subtract_b_dec is for sae.pt files of the published saev, but {location} is not one. "
            "Leave it out."
        )
    if kind == "published":
        sae = published.load_published(location, subtract_b_dec=subtract_b_dec)
    elif kind == "saelens":
        sae = saelens.load_saelens(location)
    else:
        sae = _load_native(location)
    return sae.to(device)


def _locate(url: str) -> tuple[tp.Literal["native", "saelens", "published"], str]:
    """Which format stands at `url`, and exactly where."""
    if not storage.exists(url):
        raise StorageError(f"Cannot load an SAE from {url}: it does not exist. Check the path.")
    if not storage.is_dir(url):
        if url.endswith(".pt"):
            return "published", url
        raise CheckpointError(
            f"{url} is a file, expected a run folder, a checkpoint folder or a sae.pt."
        )
    for folder in (storage.join(url, "checkpoint"), url):
        if not storage.is_dir(folder):
            continue
        names = {entry.name for entry in storage.list_dir(folder)}
        if WEIGHTS in names and CONFIG in names:
            return "native", folder
        if saelens.CONFIG in names:
            return "saelens", folder
        if published.FILE in names:
            return "published", storage.join(folder, published.FILE)
        if WEIGHTS in names:
            raise CheckpointError(
                f"{folder} has {WEIGHTS} but no {CONFIG}: it was never finished. Train again; "
                "finished steps are kept."
            )
    raise CheckpointError(
        f"{url} holds no SAE: expected {WEIGHTS} and {CONFIG} (here or in checkpoint/), "
        f"{saelens.CONFIG} (SAELens) or {published.FILE}. If it is a run, it is not finished."
    )


def _load_native(url: str) -> SparseAutoencoder:
    config_url, weights_url = storage.join(url, CONFIG), storage.join(url, WEIGHTS)
    try:
        record = storage.read_json(config_url)
    except CorruptDataError as err:
        raise CheckpointError(str(err)) from err
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f'{config_url} is not an SAE config: expected "format": "{FORMAT}".')
    if record.get("version") != VERSION:
        raise CheckpointError(
            f"{config_url} has format version {record.get('version')}, this saev reads {VERSION}. "
            "Install the saev that wrote it."
        )
    weights = record.get("weights")
    if not isinstance(weights, dict) or {"n_bytes", "checksum"} - set(weights):
        raise CheckpointError(f"{config_url} does not record the size and checksum of {WEIGHTS}.")
    cfg = SaeConfig.from_dict(record.get("sae"), source=config_url)
    data = storage.read_bytes(weights_url)
    if len(data) != weights["n_bytes"]:
        raise CheckpointError(
            f"{weights_url} has {len(data)} bytes, expected {weights['n_bytes']}: it is truncated "
            "or belongs to another config.json. Copy the folder again."
        )
    found = storage.format_checksum(storage.crc32c(data))
    if found != weights["checksum"]:
        raise CheckpointError(
            f"{weights_url} has checksum {found}, expected {weights['checksum']}: it is damaged or "
            "belongs to another config.json. Copy the folder again."
        )
    return SparseAutoencoder.from_tensors(
        cfg, saelens.parse_safetensors(data, weights_url), source=weights_url
    )


def _download(name: str) -> str:
    """Local folder of ``hf-hub:ORG/REPO[/SUBDIR]``, downloaded through the hub's own cache."""
    parts = name.removeprefix(HUB_PREFIX).strip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise CheckpointError(f"{name} is not of the form {HUB_PREFIX}ORG/REPO[/SUBDIR].")
    repo, subdir = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as err:
        raise CheckpointError(
            f"{name} needs huggingface_hub: pip install huggingface_hub."
        ) from err
    logger.info("downloading %s from the hub", name)
    try:
        folder = huggingface_hub.snapshot_download(
            repo, allow_patterns=[f"{subdir}/**"] if subdir else None
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as err:
        reason = str(err).strip().split("\n")[0]
        raise CheckpointError(
            f"Cannot download {name}: {reason}. Check the name, your access and the network."
        ) from err
    return storage.join(folder, subdir)
