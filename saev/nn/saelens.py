"""SAELens folders: import and export.

    cfg.json                 d_in, d_sae, architecture, apply_b_dec_to_input, …, metadata
    sae_weights.safetensors  W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec, threshold?
    sparsity.safetensors     "sparsity": log10(frequency + 1e-10) per latent (optional)

BatchTopK has no inference architecture of its own there: it is a ``jumprelu`` with a constant
threshold.
"""

import typing as tp

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from saev import storage
from saev.config.sae import Activation, BatchTopK, JumpRelu, Relu, SaeConfig, TopK
from saev.errors import CheckpointError, CorruptDataError
from saev.nn.folding import project
from saev.nn.sae import SparseAutoencoder

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"
FORMAT_VERSION = "6.0.0"
"""The SAELens version whose cfg.json layout is written."""


def to_saelens(
    sae: SparseAutoencoder,
    url: str,
    metadata: dict[str, tp.Any] | None = None,
    frequency: Float[Tensor, " d_sae"] | None = None,
) -> None:
    """Write an SAE as a folder that SAELens loads with ``SAE.load_from_disk``.

    Args:
        sae: the SAE.
        url: folder.
        metadata: ``model_name``, ``hook_name``, … as SAELens wants them.
        frequency: share of tokens on which each latent fires, for sparsity.safetensors.

    Raises:
        CheckpointError: SAELens has no such activation (a TopK that keeps negative values).
    """
    tensors = {n: t.detach().to("cpu", torch.float32).clone() for n, t in sae.state_dict().items()}
    cfg: dict[str, tp.Any] = {
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": FORMAT_VERSION, **(metadata or {})},
    }
    match sae.cfg.activation:
        case Relu():
            cfg["architecture"] = "standard"
        case TopK(top_k=k, rectify=True):
            cfg |= {"architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}
        case TopK():
            raise CheckpointError(
                "SAELens' topk sets negative values to zero, this SAE keeps them (it comes from a "
                "published saev checkpoint), so it cannot be exported exactly."
            )
        case BatchTopK() | JumpRelu():
            cfg["architecture"] = "jumprelu"
            tensors["threshold"] = tensors["threshold"].expand(sae.d_sae).contiguous()
    storage.write_bytes(storage.join(url, WEIGHTS), safetensors.torch.save(tensors))
    if frequency is not None:
        if frequency.shape != (sae.d_sae,):
            raise CheckpointError(
                f"frequency has shape {list(frequency.shape)}, expected [{sae.d_sae}]."
            )
        log_freq = torch.log10(frequency.detach().double().cpu() + 1e-10).float()
        storage.write_bytes(
            storage.join(url, SPARSITY), safetensors.torch.save({"sparsity": log_freq})
        )
    storage.write_json(storage.join(url, CONFIG), cfg)


def load_sparsity(url: str) -> Float[Tensor, " d_sae"] | None:
    """log10(frequency + 1e-10) per latent of a SAELens folder, or None if it has none."""
    location = storage.join(url, SPARSITY)
    if not storage.exists(location):
        return None
    tensors = parse_safetensors(storage.read_bytes(location), location)
    if "sparsity" not in tensors:
        raise CheckpointError(f"{location} has tensors {sorted(tensors)}, expected 'sparsity'.")
    return tensors["sparsity"]


def load_saelens(url: str) -> SparseAutoencoder:
    """Read a SAELens folder (architectures standard, topk and jumprelu).

    An encoder that subtracts b_dec from its input, and a top-k that is chosen by
    decoder-norm-weighted values, are folded into the weights.

    Raises:
        CheckpointError: damaged, or it normalises its input in a way that weights cannot express.
    """
    config_url, weights_url = storage.join(url, CONFIG), storage.join(url, WEIGHTS)
    try:
        raw = storage.read_json(config_url)
    except CorruptDataError as err:
        raise CheckpointError(str(err)) from err
    if not isinstance(raw, dict) or not all(isinstance(raw.get(k), int) for k in ("d_in", "d_sae")):
        raise CheckpointError(f"{config_url} is not a SAELens config: it lacks d_in or d_sae.")
    for key, fine in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if raw.get(key, fine) not in (fine, None):
            raise CheckpointError(
                f"{config_url} has {key} = {raw[key]!r}, which weights cannot express; "
                f"only {fine!r} can be imported."
            )
    activation = _activation(raw, config_url)
    tensors = parse_safetensors(storage.read_bytes(weights_url), weights_url)
    wanted = {"W_enc", "b_enc", "W_dec", "b_dec"}
    wanted |= {"threshold"} if isinstance(activation, JumpRelu) else set()
    if wanted - set(tensors):
        raise CheckpointError(f"{weights_url} lacks {sorted(wanted - set(tensors))}.")
    weights = {name: tensors[name].double() for name in wanted}
    cfg = SaeConfig(d_model=raw["d_in"], d_sae=raw["d_sae"], activation=activation)
    sae = SparseAutoencoder.from_tensors(cfg, weights, source=weights_url)  # checks shapes
    if raw.get("apply_b_dec_to_input", False):
        weights["b_enc"] = weights["b_enc"] - project(weights["b_dec"], weights["W_enc"])
    if raw.get("rescale_acts_by_decoder_norm", False):
        norm = weights["W_dec"].norm(dim=1)
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norm, weights["b_enc"] * norm
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
    return SparseAutoencoder.from_tensors(sae.cfg, weights, source=weights_url)


def _activation(raw: dict[str, tp.Any], source: str) -> Activation:
    architecture = raw.get("architecture", "standard")
    kwargs = raw.get("activation_fn_kwargs") or {}  # before version 6
    name = raw.get("activation_fn") or raw.get("activation_fn_str") or "relu"
    if architecture == "topk" or (architecture == "standard" and name == "topk"):
        k = raw.get("k", kwargs.get("k"))
        if not isinstance(k, int) or k < 1:
            raise CheckpointError(f"{source} has k = {k!r}, expected a positive integer.")
        return TopK(top_k=k)
    if architecture == "standard" and name == "relu":
        return Relu()
    if architecture == "jumprelu":
        return JumpRelu()
    raise CheckpointError(
        f"{source} has architecture {architecture!r} (activation {name!r}); standard, topk and "
        "jumprelu can be imported."
    )


def parse_safetensors(data: bytes, source: str) -> dict[str, Tensor]:
    """Tensors of a safetensors object. Raises CheckpointError if it does not parse."""
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as err:
        raise CheckpointError(
            f"{source} is not a safetensors file ({err}). It may be truncated; copy it again."
        ) from err
