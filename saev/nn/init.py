"""Initial weights of one SAE, from its own random numbers and a sample of training activations.

Data-point initialisation: every decoder row is a blend of a centred training activation and noise,
both at unit norm, normalised; the encoder is its transpose, scaled. Where there is a sample, the
decoder bias is its mean m, and b_enc = -m·W_enc, so that the encoder sees centred activations too.
"""

import math
import typing as tp

import torch
from jaxtyping import Float
from torch import Tensor

from saev.config.sae import BatchTopK, JumpRelu, SaeConfig, TopK
from saev.errors import ConfigError
from saev.nn import activations

_SCALE_SAMPLE = 1024
"""Rows that the encoder's initial scale is fitted on."""


class InitialWeights(tp.NamedTuple):
    """Of one SAE, in the bank's layout."""

    W_enc: Float[Tensor, "d_sae d_model"]
    """Encoder, transposed."""
    b_enc: Float[Tensor, " d_sae"]
    """Encoder bias."""
    W_dec: Float[Tensor, "d_sae d_model"]
    """Decoder."""
    b_dec: Float[Tensor, " d_model"]
    """Decoder bias."""
    log_threshold: Float[Tensor, " d_sae"]
    """ln θ (JumpReLU; zeros otherwise)."""


def initial_weights(
    cfg: SaeConfig, data: Float[Tensor, "n d_model"] | None, generator: torch.Generator
) -> InitialWeights:
    """Initial weights, float32 on the CPU.

    Args:
        cfg: with `d_model` and `d_sae` filled in.
        data: training activations as the SAE will see them (normalised); None starts from noise.
        generator: the member's own random numbers.

    Raises:
        ConfigError: `data` is empty or of another width.
    """
    assert cfg.d_model is not None
    assert cfg.d_sae is not None
    d_model, d_sae = cfg.d_model, cfg.d_sae
    w_dec = _unit(torch.randn(d_sae, d_model, generator=generator))
    b_dec = torch.zeros(d_model)
    centred = None
    if data is not None:
        if data.ndim != 2 or data.shape[1] != d_model or not data.shape[0]:
            raise ConfigError(
                f"The sample for initialisation has shape {list(data.shape)}, expected "
                f"[n, {d_model}] with n ≥ 1."
            )
        data = data.to("cpu", torch.float32)
        b_dec = data.mean(0)
        centred = data - b_dec
        order = torch.randperm(data.shape[0], generator=generator)
        rows = centred[order[torch.arange(d_sae) % order.shape[0]]]
        if cfg.reinit_blend > 0:
            w_dec = _unit(cfg.reinit_blend * _unit(rows) + (1 - cfg.reinit_blend) * w_dec)
        centred = centred[order[:_SCALE_SAMPLE]]
    scale = cfg.enc_scale
    if scale is None:
        scale = 1.0 if centred is None else least_error_scale(cfg, centred, w_dec)
    w_enc = w_dec * scale
    theta = cfg.activation.init_threshold if isinstance(cfg.activation, JumpRelu) else 1.0
    return InitialWeights(
        W_enc=w_enc,
        b_enc=-torch.linalg.vecdot(w_enc, b_dec),  # w_enc @ b_dec would depend on threads
        W_dec=w_dec,
        b_dec=b_dec,
        log_threshold=torch.full((d_sae,), math.log(theta)),
    )


def least_error_scale(
    cfg: SaeConfig, x: Float[Tensor, "n d_model"], w_dec: Float[Tensor, "d_sae d_model"]
) -> float:
    """The c that minimises ‖x - act(c·x·W_decᵀ)·W_dec‖²: c = ⟨x, x̂⟩ / ⟨x̂, x̂⟩ at c = 1, because
    act is positively homogeneous (JumpReLU's small initial threshold is left out of account)."""
    z = x @ w_dec.T
    match cfg.activation:
        case TopK(top_k=k):
            f = activations.top_k(z, k)
        case BatchTopK(top_k=k):
            f = activations.batch_top_k(z, k)
        case _:
            f = activations.relu(z)
    x_hat = (f @ w_dec).double()
    energy = float(x_hat.square().sum(1).sum())
    fit = float((x.double() * x_hat).sum(1).sum())
    return fit / energy if fit > 0 and energy > 0 else 1.0


def _unit(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-12)
