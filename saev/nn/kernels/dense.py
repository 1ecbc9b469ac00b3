"""Dense latents: the decoder in blocks, and the two activations that have a penalty."""

import itertools
import typing as tp
from collections.abc import Iterator

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


_TILE_BYTES = 256 << 10
"""Size of a tile of a matrix that several operations pass over, on a CPU. Some tiles fit into its
cache, while every pass over all rows of a chunk reads and writes memory."""
_TILE_ROWS = 8
"""Fewest rows of a tile."""


def _tiles(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tiles of some matrices of one shape; the whole matrices on a GPU."""
    first = matrices[0]
    row_bytes = first.shape[1] * first.element_size()
    n_rows = first.shape[0] if first.is_cuda else _TILE_BYTES // row_bytes
    return zip(*(m.split(max(_TILE_ROWS, n_rows)) for m in matrices), strict=True)


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: tp.Any, z: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # In place, because new memory of this size costs half as much as the product before it.
        ctx.mark_dirty(z)
        l0, l1 = (torch.zeros_like(bias) for _ in range(2))
        for (f,) in _tiles(z):
            f.add_(bias).clamp_(min=0)
            l0 += f.sign().sum(0)
            l1 += f.sum(0)
        ctx.save_for_backward(z)
        ctx.mark_non_differentiable(l0)
        return z, l0, l1

    @staticmethod
    def backward(ctx: tp.Any, grad_f: Tensor, _: Tensor, grad_l1: Tensor) -> tuple[Tensor, Tensor]:
        grad_bias = torch.zeros_like(grad_l1)
        # In place, which is safe: decode_blocks computed grad_f for this function only.
        for grad, f in _tiles(grad_f, ctx.saved_tensors[0]):
            grad_bias += where_positive_(grad.add_(grad_l1), f).sum(0)
        return grad_f, grad_bias


def relu(z: Float[Tensor, "c s"], bias: Float[Tensor, " s"]) -> Activated:
    """f = max(0, z + bias), in place of z. f and l1 are differentiable in z and the bias; f may be
    decoded once, by decode_blocks."""
    return Activated(*_Relu.apply(z, bias))


class _JumpRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: tp.Any, z: Tensor, bias: Tensor, log_theta: Tensor, width: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.mark_dirty(z)
        # A copy, because the rounding of MKL's exp depends on the alignment in memory.
        theta = log_theta.clone().exp()
        half = theta * (width / 2)
        l0, l1, n_near = (torch.zeros_like(theta) for _ in range(3))
        # Numbers 0 and 1 instead of truth values, which would have to be converted for each sum.
        near = torch.empty_like(z)
        for f, near_t in _tiles(z, near):
            f += bias
            torch.sub(f, theta, out=near_t).abs_().lt_(half)  # activations.rectangle
            active = torch.gt(f, theta, out=torch.empty_like(f))
            f *= active
            for sums, values in ((l0, active), (l1, f), (n_near, near_t)):
                sums += values.sum(0)
        ctx.save_for_backward(z, theta, near, n_near)
        ctx.width = width
        ctx.mark_non_differentiable(l1)
        return z, l0, l1

    @staticmethod
    def backward(
        ctx: tp.Any, grad_f: Tensor, grad_l0: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        all_f, theta, all_near, n_near = ctx.saved_tensors
        grad_bias, of_near = (torch.zeros_like(theta) for _ in range(2))
        for grad, f, near in _tiles(grad_f, all_f, all_near):
            of_near += near.mul_(grad).sum(0)
            grad_bias += where_positive_(grad, f).sum(0)
        # ∂/∂ln θ = θ·∂/∂θ, and this θ cancels with that in ε = width·θ.
        grad_theta = theta * of_near + grad_l0 * n_near
        return grad_f, grad_bias, grad_theta / -ctx.width, None


def jump_relu(
    z: Float[Tensor, "c s"],
    bias: Float[Tensor, " s"],
    log_theta: Float[Tensor, " s"],
    width: float,
) -> Activated:
    """f = z'·[z' > θ] with z' = z + bias, in place of z. f and l0 are differentiable in z, the bias
    and ln θ, by the pseudo-derivatives of :mod:`saev.nn.activations`; f may be decoded once, by
    decode_blocks.

    Args:
        z: pre-activations without their bias.
        bias: of the encoder.
        log_theta: ln θ.
        width: ε/θ of the kernel.
    """
    return Activated(*_JumpRelu.apply(z, bias, log_theta, width))
