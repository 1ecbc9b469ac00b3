"""``load_sae``: an SAE from a run, a checkpoint folder, files of other projects, or the hub."""

import logging

import numpy as np
import torch
from torch import Tensor

from saev import hub, storage
from saev.errors import CheckpointError, ConfigError, StorageError
from saev.nn.io import foreign, native
from saev.nn.io.files import read_vector
from saev.nn.io.imported import Options
from saev.nn.io.native import CONFIG, WEIGHTS
from saev.nn.sae import SparseAutoencoder

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf-hub:"


def load_sae(
    url: str,
    device: str | torch.device = "cpu",
    *,
    subtract_b_dec: bool = False,
    centre: "Tensor | np.ndarray | str | None" = None,
    scale: float | None = None,
    top_k: int | None = None,
) -> SparseAutoencoder:
    """Load an SAE. docs/python-api.md lists whose files can be read, and how they differ.

    Args:
        url: a run folder, a checkpoint folder, a folder or file of another project (the published
            saev, SAELens, sparsify, dictionary_learning, Gemma Scope, overcomplete), or
            the same on the Hugging Face hub, as ``hf-hub:ORG/REPO[/PATH]``.
        device: where its weights go.
        subtract_b_dec: for ``sae.pt`` files from before August 2025, whose encoder saw x - b_dec:
            fold b_enc ← b_enc - b_dec·W_enc.
        centre: for SAEs of other projects that saw (x - centre)·scale: the vector [d_model], or its
            URL (an ``.npy`` file, or a tensor of torch.save). It is folded into the weights, so
            that the SAE takes recorded activations. The values of latents do not change.
        scale: the factor in (x - centre)·scale. osunlp's DINOv2 SAE divides by 2.018…, so its scale
            is 1/2.018….
        top_k: latents kept per token, for state dicts of overcomplete, which do not record it.

    Raises:
        CheckpointError: the files are damaged, of an unknown format, or do not fit each other.
        ConfigError: centre, scale or top_k do not fit.
        StorageError: nothing exists at ``url``, or it cannot be read.
    """
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ConfigError(f"top_k is {top_k!r}, expected a positive integer.")
    options = Options(bool(subtract_b_dec), _vector(centre), scale, top_k)
    name = url
    if url.startswith(HUB_PREFIX):
        url = _download(url)
    url = storage.normalize(url)
    if not storage.exists(url):
        raise StorageError(f"Cannot load an SAE from {name}: it does not exist. Check the path.")
    found = _locate(url)
    if isinstance(found, foreign.Found):
        return found.read(options).to_sae(options).to(device)
    if options.given():
        raise CheckpointError(
            f"{' and '.join(options.given())} are for SAEs of other projects, but {found} was "
            "written by saev, which folds these into the weights. Leave them out."
        )
    stored = native.read(found)
    sae = SparseAutoencoder.from_tensors(stored.cfg, stored.tensors, source=stored.source)
    sae.metadata = stored.metadata
    return sae.to(device)


def _vector(centre: "Tensor | np.ndarray | str | None") -> Tensor | None:
    if centre is None or isinstance(centre, Tensor):
        return centre
    if isinstance(centre, str):
        return read_vector(storage.normalize(centre))
    return torch.as_tensor(centre)


def _locate(url: str) -> str | foreign.Found:
    """The SAE at `url`: an SAE of another project, or the URL of a checkpoint folder of saev."""
    if not storage.is_dir(url):
        found = foreign.find_in_file(url)
        if found is None:
            raise CheckpointError(
                f"{url} is a file, expected a folder of a run or checkpoint, or a sae.pt (a JSON "
                "header, then a state dict), a state dict of torch.save, or a params.npz. If it is "
                "meant to be one of these it is damaged; copy it again."
            )
        return found
    for folder in (storage.join(url, "checkpoint"), url):
        if not storage.is_dir(folder):
            continue
        names = frozenset(entry.name for entry in storage.list_dir(folder))
        if WEIGHTS in names and CONFIG in names:
            return folder
        found = foreign.find_in_folder(folder, names)
        if found is not None:
            return found
        if WEIGHTS in names:
            raise CheckpointError(
                f"{folder} has {WEIGHTS} but no {CONFIG}: it was never finished. Train again; "
                "finished steps are kept."
            )
    seems = foreign.describe(url)
    expected = ", ".join(
        f"{' and '.join(reader.files)} ({reader.project})" for reader in foreign.READERS
    )
    raise CheckpointError(
        f"{url} holds no SAE: expected {WEIGHTS} and {CONFIG} (here or in checkpoint/), or "
        f"{expected}. {seems or 'If it is a run, it is not finished.'}"
    )


def _download(name: str) -> str:
    """Local path of ``hf-hub:ORG/REPO[/PATH]``, downloaded through the hub's own cache.

    PATH is a folder or a file; configs beside a file come with it.
    """
    parts = name.removeprefix(HUB_PREFIX).strip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise CheckpointError(f"{name} is not of the form {HUB_PREFIX}ORG/REPO[/PATH].")
    repo, path = "/".join(parts[:2]), "/".join(parts[2:])
    patterns = [path, f"{path}/**"] if path else None
    if patterns and "." in parts[-1]:
        patterns.append("/".join([*parts[2:-1], "*.json"]))
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as err:
        raise CheckpointError(
            f"{name} needs huggingface_hub: pip install huggingface_hub."
        ) from err
    logger.info("downloading %s from the hub", name)
    away = hub.problem()
    try:
        folder = huggingface_hub.snapshot_download(repo, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as err:
        reason = str(away or err).strip().split("\n")[0]
        raise CheckpointError(
            f"Cannot download {name}: {reason}. Check the name, your access and the network."
        ) from err
    return storage.join(folder, path)
