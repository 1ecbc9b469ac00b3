"""Folding the normalisation of inputs into weights, so that a saved SAE takes recorded activations.

Training sees y = (x - μ)·s. With z = y·W_enc + b_enc, f = act(z), ŷ = f·W_dec + b_dec, the
reconstruction of x is ŷ/s + μ. For all four activations act(z; θ)/s = act(z/s; θ/s), so the factor
can be moved from the decoder into the encoder's bias and the threshold:

    W_enc' = W_enc                     b_enc' = b_enc/s - μ·W_enc        θ' = θ/s
    W_dec' = W_dec                     b_dec' = b_dec/s + μ              f' = f/s

Decoder rows keep unit norm. The value of a latent is in the units of the recorded activations: it
is the norm of the latent's contribution to the reconstruction.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saev.errors import ConfigError
from saev.nn.sae import SparseAutoencoder

Weights = dict[str, Tensor]
"""W_enc [d_model, d_sae], b_enc, W_dec [d_sae, d_model], b_dec, and threshold if there is one."""


def project(vector: Float[Tensor, " d_model"], w_enc: Float[Tensor, "d_model d_sae"]) -> Tensor:
    """vector·W_enc. Unlike MKL's product, its bits do not depend on the number of threads."""
    return torch.linalg.vecdot(w_enc.T.contiguous(), vector)


def fold_normalization(
    sae: SparseAutoencoder, mean: Tensor | None, scale: float
) -> SparseAutoencoder:
    """The SAE on x that is equivalent to `sae` on (x - mean)·scale. Computed in float64.

    Args:
        sae: SAE on normalised activations.
        mean: [d_model], subtracted in training; None is zero.
        scale: multiplied in training, positive.

    Raises:
        ConfigError: `scale` is not positive and finite, or `mean` has another width.
    """
    if not 0 < scale < float("inf"):
        raise ConfigError(f"The normalisation scale is {scale}, expected a positive number.")
    if mean is not None and mean.shape != (sae.d_model,):
        raise ConfigError(
            f"The mean has shape {list(mean.shape)}, expected [{sae.d_model}] as the SAE has."
        )
    tensors = {name: t.detach().double() for name, t in sae.state_dict().items()}
    mu = torch.zeros_like(tensors["b_dec"]) if mean is None else mean.to(tensors["b_dec"])
    tensors["b_enc"] = tensors["b_enc"] / scale - project(mu, tensors["W_enc"])
    tensors["b_dec"] = tensors["b_dec"] / scale + mu
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"] / scale
    return SparseAutoencoder.from_tensors(sae.cfg, tensors).to(sae.b_dec.device)


def fold_shift(weights: Weights, shift: Float[Tensor, " d_model"]) -> Weights:
    """Weights on x of an SAE whose encoder takes x - shift: b_enc' = b_enc - shift·W_enc."""
    shifted = project(shift.double(), weights["W_enc"].double())
    return weights | {"b_enc": weights["b_enc"].double() - shifted}


def fold_decoder_norm(weights: Weights) -> Weights:
    """Weights with unit decoder rows, for an SAE that selects latents by f·‖W_dec row‖.

    W_enc' = W_enc·n, b_enc' = b_enc·n, θ' = θ·n, W_dec' = W_dec/n: the same reconstruction.
    """
    norm = weights["W_dec"].double().norm(dim=1).clamp(min=1e-8)
    folded = {name: weights[name].double() * norm for name in ("W_enc", "b_enc")}
    if "threshold" in weights:
        folded["threshold"] = weights["threshold"].double() * norm
    return weights | folded | {"W_dec": weights["W_dec"].double() / norm[:, None]}


def fold_input(weights: Weights, centre: Tensor | None, scale: float) -> Weights:
    """Weights on x of an SAE on (x - centre)·scale, without changing the values of latents.

    :func:`fold_normalization` instead changes the latents, to keep decoder rows at unit norm.
    Here W_enc' = W_enc·s, b_enc' = b_enc - s·μ·W_enc, W_dec' = W_dec/s and b_dec' = b_dec/s + μ.

    Raises:
        ConfigError: `scale` is not positive and finite, or `centre` has another width.
    """
    d_model = len(weights["b_dec"])
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise ConfigError(f"scale is {scale!r}, expected a positive number.")
    if centre is not None and centre.shape != (d_model,):
        raise ConfigError(
            f"centre has shape {list(centre.shape)}, expected [{d_model}] as the SAE has."
        )
    if centre is not None and not centre.double().isfinite().all():
        raise ConfigError("centre has values that are not finite numbers.")
    mu = torch.zeros(d_model) if centre is None else centre
    scaled = weights | {"W_enc": weights["W_enc"].double() * scale}
    return fold_shift(scaled, mu) | {
        "W_dec": weights["W_dec"].double() / scale,
        "b_dec": weights["b_dec"].double() / scale + mu.double(),
    }


def fold_rectifier(theta: Tensor) -> Tensor:
    """θ of z·[z > θ] for an SAE with relu(z)·[z > θ]: max(0, θ), float64."""
    return theta.double().clamp(min=0)


def fold_gate(weights: Weights, b_gate: str, b_mag: str, r_mag: str) -> Weights:
    """The JumpReLU SAE that is equivalent to a gated SAE (Rajamanoharan et al. 2024,
    arXiv:2404.16014).

    The magnitude path uses the encoder of the gate times a factor eʳ. With z = x·W_enc·eʳ + b_mag,
    the gate x·W_enc + b_gate > 0 means z > b_mag - eʳ·b_gate. So f = z·[z > θ] with
    θ = max(0, b_mag - eʳ·b_gate).

    Args:
        weights: with the three tensors of a gated SAE instead of b_enc.
        b_gate, b_mag, r_mag: names of these tensors.
    """
    gate, magnitude = weights[b_gate].double(), weights[b_mag].double()
    factor = weights[r_mag].double().exp()
    rest = {name: t for name, t in weights.items() if name not in (b_gate, b_mag, r_mag)}
    return rest | {
        "W_enc": weights["W_enc"].double() * factor,
        "b_enc": magnitude,
        "threshold": fold_rectifier(magnitude - factor * gate),
    }
