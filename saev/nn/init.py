"""Initial weights of one SAE, from its own random numbers and a sample of training activations.

Data-point initialisation: every decoder row is a blend of a centred training activation and noise,
both at unit norm, and is then normalised. The encoder is the transpose, scaled. With a sample, the
decoder bias is the sample's mean m, and b_enc = -m·W_enc, so the encoder also sees centred
activations. JumpReLU's θ is a quantile of the sample's pre-activations, so that it starts sparse. A
ReLU SAE with a target L0 starts at this L0: the quantile is subtracted from b_enc.
"""

import math
import typing as tp

import torch
from jaxtyping import Float
from torch import Tensor

from saev.config.sae import BatchTopK, JumpRelu, Relu, SaeConfig, TopK
from saev.errors import ConfigError
from saev.nn import activations

_SCALE_SAMPLE = 1024
"""Rows used to choose the encoder's initial scale and θ."""
INIT_L0 = 64
"""Initial L0 of JumpReLU if neither init_l0 nor target_l0 is given."""


class InitialWeights(tp.NamedTuple):
    """Initial weights of one SAE, in the bank's layout."""

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
    cfg: SaeConfig,
    data: Float[Tensor, "n d_model"] | None,
    generator: torch.Generator,
    target_l0: float | None = None,
) -> InitialWeights:
    """Initial weights, float32 on the CPU.

    Args:
        cfg: with `d_model` and `d_sae` filled in.
        data: normalised training activations; None starts from noise.
        generator: random numbers of this member.
        target_l0: target L0 of the objective, at which JumpReLU and ReLU start.

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
    scale = 1.0 if centred is None else least_error_scale(cfg, centred, w_dec, target_l0)
    w_enc = w_dec * scale
    theta, l0 = 1.0, initial_l0(cfg, target_l0)
    if l0:
        if centred is None:
            centred = torch.randn(_SCALE_SAMPLE, d_model, generator=generator)
        theta = initial_threshold(centred @ w_enc.T, l0)
    lowered = theta if isinstance(cfg.activation, Relu) and l0 else 0.0
    return InitialWeights(
        W_enc=w_enc,
        # vecdot, because the bits of `@` depend on the number of threads.
        b_enc=-torch.linalg.vecdot(w_enc, b_dec) - lowered,
        W_dec=w_dec,
        b_dec=b_dec,
        log_threshold=torch.full((d_sae,), math.log(theta)),
    )


def initial_l0(cfg: SaeConfig, target_l0: float | None) -> int:
    """Initial L0: `init_l0` if given, else at most a quarter of d_sae; 0 does not set it."""
    assert cfg.d_sae is not None
    wanted = target_l0 or 0
    if isinstance(cfg.activation, JumpRelu):
        if cfg.activation.init_l0 is not None:
            return min(cfg.activation.init_l0, cfg.d_sae)
        wanted = wanted or INIT_L0
    return max(1, min(round(wanted), cfg.d_sae // 4)) if wanted else 0


def initial_threshold(z: Float[Tensor, "n d_sae"], l0: int) -> float:
    """The θ at which `l0` latents per token are active on average."""
    n = min(l0 * z.shape[0], z.numel())
    smallest = float(z.flatten().topk(n, sorted=False).values.min())
    # θ has to be positive for every sample, because ln θ is trained.
    largest = float(z.max())
    return max(smallest, 1e-3 * largest) if largest > 0 else 1.0


def least_error_scale(
    cfg: SaeConfig,
    x: Float[Tensor, "n d_model"],
    w_dec: Float[Tensor, "d_sae d_model"],
    target_l0: float | None = None,
) -> float:
    """The c that minimises ‖x - act(c·x·W_decᵀ)·W_dec‖².

    It is c = ⟨x, x̂⟩ / ⟨x̂, x̂⟩ with x̂ for c = 1, because act(c·z) = c·act(z) for c > 0. This also
    holds if θ is a quantile of z, which grows with c.
    """
    z, l0 = x @ w_dec.T, initial_l0(cfg, target_l0)
    match cfg.activation:
        case TopK(top_k=k):
            f = activations.top_k(z, k)
        case BatchTopK(top_k=k):
            f = activations.batch_top_k(z, k)
        case JumpRelu():
            f = activations.batch_top_k(z, l0)
        case Relu() if l0:
            f = activations.relu(z - initial_threshold(z, l0))
        case _:
            f = activations.relu(z)
    x_hat = (f @ w_dec).double()
    energy = float(x_hat.square().sum(1).sum())
    fit = float((x.double() * x_hat).sum(1).sum())
    return fit / energy if fit > 0 and energy > 0 else 1.0


def _unit(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-12)
