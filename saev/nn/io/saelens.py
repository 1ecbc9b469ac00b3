"""SAELens folders (sae-lens on PyPI), versions 1 to 6: import and export.

    cfg.json                 d_in, d_sae, architecture, apply_b_dec_to_input, …, metadata
    sae_weights.safetensors  W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec, threshold?
    sparsity.safetensors     "sparsity": log10(frequency + 1e-10) per latent (optional)

tests/interop compares with the installed package. Every architecture that it registers is either
read, or refused with a reason of :data:`REFUSED`.
"""

import typing as tp

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from saev import storage
from saev.config.sae import Activation, BatchTopK, JumpRelu, Relu, TopK
from saev.errors import CheckpointError
from saev.nn.folding import Weights, fold_decoder_norm, fold_gate, fold_rectifier, fold_shift
from saev.nn.io import files
from saev.nn.io.imported import Imported, Options, Reader
from saev.nn.sae import SparseAutoencoder

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"
FORMAT_VERSION = "6.0.0"
"""The SAELens version whose cfg.json layout is written."""

_TRANSCODER = (
    "it reconstructs the activations of another place than it reads, so it is not an autoencoder"
)
REFUSED = {
    "abstopk": "it keeps the values of largest magnitude, negative ones too, as no activation of "
    "saev does",
    "matching_pursuit": "it chooses latents one after the other, each by what the ones before it "
    "left over, instead of by an encoder",
    "temporal": "its latents depend on other tokens, through attention",
    "transcoder": _TRANSCODER,
    "skip_transcoder": _TRANSCODER,
    "jumprelu_transcoder": _TRANSCODER,
    "jumprelu_skip_transcoder": _TRANSCODER,
}
"""Architectures that cannot be imported, with the reason."""

_BASE = {"W_enc": "DS", "W_dec": "SD", "b_dec": "D"}
_TENSORS = {
    "standard": _BASE | {"b_enc": "S"},
    "topk": _BASE | {"b_enc": "S"},
    "jumprelu": _BASE | {"b_enc": "S", "threshold": "S"},
    "gated": _BASE | {"b_gate": "S", "b_mag": "S", "r_mag": "S"},
    "batchtopk": _BASE | {"b_enc": "S", "topk_threshold": ""},
    "matryoshka_batchtopk": _BASE | {"b_enc": "S", "topk_threshold": ""},
}
"""Architectures that can be imported, with their tensors. D is d_in, S is d_sae."""
_RESCALED = frozenset({"topk", "batchtopk", "matryoshka_batchtopk"})
"""Architectures that support rescale_acts_by_decoder_norm."""

_TRAINING_FLAGS = frozenset(
    "autocast autocast_lm compile_llm compile_sae dataset_trust_remote_code decoder_heuristic_init "
    "decoder_orthogonal_init disable_concat_sequences do_log exclude_special_tokens "
    "hf_is_private_repo init_encoder_as_decoder_transpose is_dataset_tokenized "
    "jumprelu_ste_to_input log_activations_store_to_wandb log_optimizer_state_to_wandb "
    "log_to_wandb log_weights_to_wandb normalize_sae_decoder prefetch_llm_batches prepend_bos "
    "resume save_final_checkpoint scale_sparsity_penalty_by_decoder_norm show_progress shuffle "
    "streaming use_cached_activations use_chat_formatting use_ghost_grads use_matryoshka_aux_loss "
    "use_sparse_activations verbose".split()
)
"""Flags of all versions that concern training and provenance only, and do not change results."""


def load_saelens(url: str) -> SparseAutoencoder:
    """Read a SAELens folder: architectures standard, topk, jumprelu, gated and batchtopk.

    Three features are folded into the weights: an encoder that subtracts b_dec from its input, a
    top-k that is chosen by values times the decoder's norms, and gates.

    Raises:
        CheckpointError: it is damaged, or has a feature that weights cannot express.
    """
    return read(storage.normalize(url), Options()).to_sae(Options())


def read(url: str, options: Options) -> Imported:
    """Read a SAELens folder. Raises CheckpointError."""
    source, weights_url = storage.join(url, CONFIG), storage.join(url, WEIGHTS)
    config = files.read_config(source)
    sizes = {
        "D": files.integer(config, "d_in", source),
        "S": files.integer(config, "d_sae", source),
    }
    is_old = _is_before_six(config, source)
    if is_old:
        config = _as_six(config, source)
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or architecture not in _TENSORS:
        raise CheckpointError(_refusal(architecture, source))
    needs_scale = _check_features(config, architecture, source, is_old=is_old)

    tensors = files.read_safetensors(weights_url)
    finetuned = _take_finetuning(config, tensors, sizes, weights_url)
    if "log_threshold" in tensors and architecture == "jumprelu":  # in training until 2025
        tensors["threshold"] = tensors.pop("log_threshold").double().exp()
    weights = files.take(tensors, _TENSORS[architecture], weights_url, sizes)
    activation, weights = _activation(config, architecture, weights, source)
    if finetuned is not None:  # a factor between latents and decoder
        weights["W_dec"] = weights["W_dec"].double() * finetuned.double()[:, None]
    if files.flag(config, "apply_b_dec_to_input", True, source):
        weights = fold_shift(weights, weights["b_dec"])
    if files.flag(config, "rescale_acts_by_decoder_norm", False, source):
        weights = _rescale(weights)
    return Imported(activation, weights, weights_url, needs_scale=needs_scale)


def _activation(
    config: dict[str, tp.Any], architecture: str, weights: Weights, source: str
) -> tuple[Activation, Weights]:
    """The activation, and the weights with the tensors of that activation."""
    match architecture:
        case "topk":
            return TopK(top_k=files.integer(config, "k", source)), weights
        case "jumprelu":
            return JumpRelu(), weights | {"threshold": fold_rectifier(weights["threshold"])}
        case "gated":
            return JumpRelu(), fold_gate(weights, "b_gate", "b_mag", "r_mag")
        case "batchtopk" | "matryoshka_batchtopk":
            weights = dict(weights)
            theta = fold_rectifier(weights.pop("topk_threshold")).reshape(())
            k = config.get("k")  # a mean, so it may be a fraction; evaluation does not use it
            if not isinstance(k, int | float) or isinstance(k, bool) or not k > 0:
                raise CheckpointError(f"{source} has k = {k!r:.60}, expected a positive number.")
            return BatchTopK(top_k=max(1, round(k))), weights | {"threshold": theta}
    return Relu(), weights


def _rescale(weights: Weights) -> Weights:
    """Fold decoder norms. The threshold is not changed: it was learned on values that include
    them."""
    return fold_decoder_norm({n: t for n, t in weights.items() if n != "threshold"}) | {
        n: t for n, t in weights.items() if n == "threshold"
    }


def _refusal(architecture: tp.Any, source: str) -> str:
    why = REFUSED.get(architecture) if isinstance(architecture, str) else None
    if why is None:
        why = f"saev knows {', '.join(_TENSORS)}"
    return f"{source} has architecture {architecture!r:.60}, which cannot be imported: {why}."


def _check_features(
    config: dict[str, tp.Any], architecture: str, source: str, *, is_old: bool
) -> bool:
    """Refuse features that weights cannot express. Returns whether inputs were scaled by a factor
    that is not recorded."""
    known = {"apply_b_dec_to_input"} | _TRAINING_FLAGS
    if is_old:
        known |= {"finetuning_scaling_factor"}
    if architecture in _RESCALED:
        known |= {"rescale_acts_by_decoder_norm"}
    files.refuse_flags(config, source=source, project="sae-lens", known=known)
    reshape = config.get("reshape_activations")
    if reshape not in (None, "none"):
        raise CheckpointError(
            f"{source} has reshape_activations = {reshape!r:.60}: it reads the heads of an "
            "attention layer one by one. Only 'none' can be imported."
        )
    activation = config.get("activation_fn")
    if activation not in (None, "relu", "topk"):
        raise CheckpointError(
            f"{source} has activation_fn = {activation!r:.60}, expected 'relu' or 'topk'. It "
            "cannot be imported."
        )
    normalize = config.get("normalize_activations")
    if normalize not in (None, "none", "expected_average_only_in"):
        raise CheckpointError(
            f"{source} has normalize_activations = {normalize!r:.60}, which depends on each input, "
            "or on statistics that are not in the folder. Weights cannot express it; only 'none' "
            "and 'expected_average_only_in' (with `scale`) can be imported."
        )
    return normalize == "expected_average_only_in"


def _take_finetuning(
    config: dict[str, tp.Any], tensors: dict[str, Tensor], sizes: dict[str, int], source: str
) -> Tensor | None:
    """Remove the factors per latent that versions 3 to 5 could finetune from ``tensors``.

    Earlier versions wrote factors of one, whether they were used or not.

    Returns:
        The factors; None if they are not used.
    """
    name = "scaling_factor" if "scaling_factor" in tensors else "finetuning_scaling_factor"
    factor = tensors.pop(name, None)
    is_used = config.get("finetuning_scaling_factor") is True
    if factor is None:
        if is_used:
            raise CheckpointError(f"{source} lacks {name}, which {CONFIG} says is used.")
        return None
    factor = files.take({name: factor}, {name: "S"}, source, sizes)[name]
    if not is_used and not torch.allclose(factor, torch.ones_like(factor)):
        raise CheckpointError(
            f"{source} has factors in {name}, but {CONFIG} does not say that they are used. It "
            "cannot be imported."
        )
    return factor if is_used else None


def _is_before_six(config: dict[str, tp.Any], source: str) -> bool:
    metadata = files.section(config, "metadata", source)
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    if version is None:
        return True
    major = str(version).split(".")[0]
    if not major.isdecimal():
        raise CheckpointError(f"{source} has sae_lens_version = {version!r:.60}, not a version.")
    return int(major) < 6


def _as_six(old: dict[str, tp.Any], source: str) -> dict[str, tp.Any]:
    """A config of versions 1 to 5 in the keys of version 6, which reads it in this way."""
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    config: dict[str, tp.Any] = {"architecture": "standard", "finetuning_scaling_factor": False}
    config |= {renamed.get(key, key): value for key, value in old.items()}
    kwargs = files.section(config, "activation_fn_kwargs", source)
    if config.get("activation_fn") == "topk":
        config |= {"architecture": "topk", "k": kwargs.get("k", config.get("k"))}
    if isinstance(config.get("normalize_activations"), bool):
        is_scaled = config["normalize_activations"]
        config["normalize_activations"] = "expected_average_only_in" if is_scaled else "none"
    if "reshape_activations" not in config and "hook_z" in str(config.get("hook_name", "")):
        config["reshape_activations"] = "hook_z"
    return config


def to_saelens(
    sae: SparseAutoencoder,
    url: str,
    metadata: dict[str, tp.Any] | None = None,
    frequency: Float[Tensor, " d_sae"] | None = None,
) -> None:
    """Write an SAE as a folder that SAELens loads with ``SAE.load_from_disk``.

    BatchTopK has no inference architecture of its own there: it is a ``jumprelu`` with a constant
    threshold.

    Args:
        sae: the SAE.
        url: folder.
        metadata: ``model_name``, ``hook_name``, … as SAELens wants them.
        frequency: share of tokens on which each latent fires, for sparsity.safetensors.

    Raises:
        CheckpointError: SAELens has no such activation (a TopK that keeps negative values).
    """
    if frequency is not None and frequency.shape != (sae.d_sae,):
        raise CheckpointError(
            f"frequency has shape {list(frequency.shape)}, expected [{sae.d_sae}]."
        )
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
        log_freq = torch.log10(frequency.detach().double().cpu() + 1e-10).float()
        storage.write_bytes(
            storage.join(url, SPARSITY), safetensors.torch.save({"sparsity": log_freq})
        )
    storage.write_json(storage.join(url, CONFIG), cfg)


READER = Reader("SAELens", (CONFIG, WEIGHTS), read)
