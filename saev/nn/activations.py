"""The four activation functions and their equations.

Pre-activations are z = x·W_enc + b_enc; latents are f = activation(z). B is the number of tokens.
"""

import typing as tp

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def relu(z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """f = max(0, z)."""
    return torch.relu(z)


def top_k(
    z: Float[Tensor, "*batch d_sae"], k: int, *, rectify: bool = True
) -> Float[Tensor, "*batch d_sae"]:
    """f = ReLU(TopK(z)): the k largest of each token (Gao et al. 2024, arXiv:2406.04093, eq. 3).

    Args:
        z: pre-activations.
        k: latents kept per token.
        rectify: set negative values among the k to zero. Published saev checkpoints do not.
    """
    top = z.topk(k, dim=-1, sorted=False)
    values = torch.relu(top.values) if rectify else top.values
    return torch.zeros_like(z).scatter(-1, top.indices, values)


def batch_top_k(z: Float[Tensor, "batch d_sae"], k: int) -> Float[Tensor, "batch d_sae"]:
    """The k·B largest of all B·d_sae pre-activations, rectified (Bussmann et al. 2024,
    arXiv:2412.06410, eq. 3). For training; see :func:`threshold` for evaluation."""
    flat = z.flatten()
    top = flat.topk(min(k * z.shape[0], flat.numel()), sorted=False)
    return torch.zeros_like(flat).scatter(0, top.indices, torch.relu(top.values)).view_as(z)


def threshold(
    z: Float[Tensor, "*batch d_sae"], theta: Float[Tensor, "..."]
) -> Float[Tensor, "*batch d_sae"]:
    """f = z·[z > θ] for θ ≥ 0: BatchTopK (scalar θ) and JumpReLU (θ per latent) at evaluation."""
    # `z <= theta` is false for NaN, so NaN stays NaN. With `z > theta` it would become 0.
    return torch.where(z <= theta, torch.zeros((), dtype=z.dtype, device=z.device), z)


def rectangle(
    z: Float[Tensor, "*batch d_sae"], theta: Float[Tensor, " d_sae"], width: float
) -> Bool[Tensor, "*batch d_sae"]:
    """Kernel K((z - θ)/ε) = [|z - θ| < ε/2] of the straight-through estimator, with ε = width·θ.

    The paper uses one ε for all latents, and inputs of norm 1. Here ε is proportional to θ, so the
    kernel does not depend on the scale of the activations.
    """
    return (z - theta).abs() < theta * (width / 2)


class JumpRelu(torch.autograd.Function):
    """f = z·H(z - θ) (Rajamanoharan et al. 2024, arXiv:2407.14435, eq. 8), with pseudo-derivatives

    ∂f/∂z = H(z - θ)    and    ∂f/∂θ = -(θ/ε)·K((z - θ)/ε)    (eq. 11; here ε = width·θ).
    """

    @staticmethod
    def forward(ctx: tp.Any, z: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return threshold(z, theta)

    @staticmethod
    def backward(ctx: tp.Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, theta = ctx.saved_tensors
        near = rectangle(z, theta, ctx.width)
        grad_theta = -(1 / ctx.width) * (grad * near).flatten(0, -2).sum(0)
        return grad * (z > theta), grad_theta, None


class Step(torch.autograd.Function):
    """H(z - θ), whose sum over latents is L0, with the pseudo-derivative

    ∂H/∂θ = -(1/ε)·K((z - θ)/ε)    (eq. 12; none with respect to z).
    """

    @staticmethod
    def forward(ctx: tp.Any, z: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: tp.Any, grad: Tensor) -> tuple[None, Tensor, None]:
        z, theta = ctx.saved_tensors
        near = rectangle(z, theta, ctx.width)
        return None, -(1 / (ctx.width * theta)) * (grad * near).flatten(0, -2).sum(0), None


def jump_relu(z: Tensor, theta: Tensor, width: float) -> Tensor:
    """Differentiable JumpReLU; see :class:`JumpRelu`."""
    return tp.cast(Tensor, JumpRelu.apply(z, theta, width))


def step(z: Tensor, theta: Tensor, width: float) -> Tensor:
    """Differentiable Heaviside step; see :class:`Step`."""
    return tp.cast(Tensor, Step.apply(z, theta, width))
