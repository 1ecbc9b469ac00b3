"""Dense latents: the decoder in blocks, and the two activations that have a penalty."""

import itertools
import typing as tp

import torch
from jaxtyping import Float
from torch import Tensor

from saev.nn.kernels.errors import where_positive_


def product(a: Tensor, b: Tensor, bf16: bool) -> Tensor:
    """a·b, in bfloat16 if ``bf16``. Differentiable."""
    return (a.bfloat16() @ b.bfloat16()).to(a.dtype) if bf16 else a @ b


class _DecodeBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: tp.Any, f: Tensor, w_dec: Tensor, cuts: tp.Sequence[int], bf16: bool
    ) -> Tensor:
        ctx.save_for_backward(f, w_dec)
        ctx.ranges, ctx.bf16 = list(itertools.pairwise([0, *cuts])), bf16
        if len(ctx.ranges) == 1:
            return product(f, w_dec, bf16)
        out = f.new_empty(f.shape[0] * len(ctx.ranges), w_dec.shape[1])
        blocks = out.view(f.shape[0], len(ctx.ranges), w_dec.shape[1])
        for j, (a, b) in enumerate(ctx.ranges):
            blocks[:, j] = product(f[:, a:b], w_dec[a:b], bf16)
        return out

    @staticmethod
    def backward(ctx: tp.Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        f, w_dec = ctx.saved_tensors
        if len(ctx.ranges) == 1:
            grads = product(grad, w_dec.T, ctx.bf16), product(f.T, grad, ctx.bf16)
            return *grads, None, None
        grad = grad.view(f.shape[0], len(ctx.ranges), w_dec.shape[1])
        grad_f, grad_w = torch.empty_like(f), torch.empty_like(w_dec)
        for j, (a, b) in enumerate(ctx.ranges):
            grad_f[:, a:b] = product(grad[:, j], w_dec[a:b].T, ctx.bf16)
            grad_w[a:b] = product(f[:, a:b].T, grad[:, j], ctx.bf16)
        return grad_f, grad_w, None, None


def decode_blocks(
    f: Float[Tensor, "c s"], w_dec: Float[Tensor, "s d"], cuts: tp.Sequence[int], bf16: bool
) -> Float[Tensor, "c*p d"]:
    """f[:, a:b]·W_dec[a:b] of each token and block of latents. Differentiable in f and W_dec.

    Args:
        f: latents.
        w_dec: decoder.
        cuts: ends of the blocks, ascending; the last is d_sae.
        bf16: multiply in bfloat16.
    """
    return tp.cast(Tensor, _DecodeBlocks.apply(f, w_dec, cuts, bf16))


class Activated(tp.NamedTuple):
    """Dense latents, and sums over the tokens for each latent."""

    f: Float[Tensor, "c s"]
    """Values of the latents."""
    l0: Float[Tensor, " s"]
    """Tokens on which each latent is active."""
    l1: Float[Tensor, " s"]
    """Σ f of each latent."""


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: tp.Any, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # In place, because new memory of this size costs half as much as the product before it.
        ctx.mark_dirty(z)
        f = z.clamp_(min=0)
        l0 = f.sign().sum(0)
        ctx.save_for_backward(f)
        ctx.mark_non_differentiable(l0)
        return f, l0, f.sum(0)

    @staticmethod
    def backward(ctx: tp.Any, grad_f: Tensor, _: Tensor, grad_l1: Tensor) -> Tensor:
        (f,) = ctx.saved_tensors
        # In place, which is safe: decode_blocks computed grad_f for this function only.
        return where_positive_(grad_f.add_(grad_l1), f)


def relu(z: Float[Tensor, "c s"]) -> Activated:
    """f = max(0, z), in place. f and l1 are differentiable in z; f may be decoded once, by
    decode_blocks."""
    return Activated(*_Relu.apply(z))


class _JumpRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: tp.Any, z: Tensor, log_theta: Tensor, width: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # A copy, because the rounding of MKL's exp depends on the alignment in memory.
        theta = log_theta.clone().exp()
        # Numbers 0 and 1 instead of truth values, which would have to be converted for each sum.
        near = (z - theta).abs_().lt_(theta * (width / 2))  # activations.rectangle
        active = torch.gt(z, theta, out=torch.empty_like(z))
        ctx.mark_dirty(z)
        f = z.mul_(active)
        ctx.save_for_backward(f, theta, near)
        ctx.width = width
        l1 = f.sum(0)
        ctx.mark_non_differentiable(l1)
        return f, active.sum(0), l1

    @staticmethod
    def backward(
        ctx: tp.Any, grad_f: Tensor, grad_l0: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        f, theta, near = ctx.saved_tensors
        n_near = near.sum(0)
        # ∂/∂ln θ = θ·∂/∂θ, and this θ cancels with that in ε = width·θ.
        grad = theta * near.mul_(grad_f).sum(0) + grad_l0 * n_near
        return where_positive_(grad_f, f), grad / -ctx.width, None


def jump_relu(z: Float[Tensor, "c s"], log_theta: Float[Tensor, " s"], width: float) -> Activated:
    """f = z·[z > θ], in place. f and l0 are differentiable in z and ln θ, by the
    pseudo-derivatives of :mod:`saev.nn.activations`; f may be decoded once, by decode_blocks.

    Args:
        z: pre-activations.
        log_theta: ln θ.
        width: ε/θ of the kernel.
    """
    return Activated(*_JumpRelu.apply(z, log_theta, width))
