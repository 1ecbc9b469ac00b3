"""Squared errors and their gradients, and sums whose bits do not depend on the threads."""

import typing as tp

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def total(values: Tensor) -> Tensor:
    """Sum over the last axis, whose bits do not depend on the number of threads.

    It adds in pieces of fixed length, because torch splits a long sum by the number of threads.
    """
    width = 1024
    tail = -values.shape[-1] % width
    return F.pad(values, (0, tail)).unflatten(-1, (-1, width)).sum(-1).sum(-1)


def squared_norm(rows: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows"]:
    """‖row‖² without a temporary of the size of the rows. Not differentiable."""
    return torch.linalg.vector_norm(rows, dim=-1).square()


def where_positive_(grad: Tensor, values: Tensor) -> Tensor:
    """grad·[values > 0], in place and in one pass."""
    return torch.ops.aten.threshold_backward.grad_input(grad, values, 0, grad_input=grad)


class NestedErrors(tp.NamedTuple):
    """Errors of nested reconstructions."""

    errors: Float[Tensor, "g p"]
    """Σ ‖x - x̂_j‖² over the rows."""
    residual: Float[Tensor, "g c d"]
    """x - x̂ of the last reconstruction, a constant."""


def nested_errors(
    blocks: Float[Tensor, "g*c*p d"],
    b_dec: Float[Tensor, "g d"],
    x: Float[Tensor, "c d"],
    n_blocks: int,
) -> NestedErrors:
    """Errors of x̂_j = b_dec + blocks_0 + … + blocks_j. Differentiable once in blocks and b_dec.

    With e_j = x̂_j - x, the gradient of block j is Σ_{i≥j} 2·e_i·grad_i, because a block is part of
    all reconstructions from the j-th on.

    Args:
        blocks: contribution of each block of latents, for g members, c tokens and p blocks. It is
            overwritten, so it must not be a view.
        b_dec: decoder biases.
        x: the target of the reconstruction. A rank's share may have no rows.
        n_blocks: p.
    """
    _, errors, residual = _NestedErrors.apply(blocks, b_dec, x, n_blocks)
    return NestedErrors(errors, residual)


def nested_errors_(
    blocks: Float[Tensor, "g c p d"], b_dec: Float[Tensor, "g d"], x: Float[Tensor, "c d"]
) -> Float[Tensor, "g c p"]:
    """‖e_j‖² of each row. The blocks become e_j = x̂_j - x. See :func:`nested_errors`."""
    blocks[:, :, 0] += b_dec[:, None]
    blocks[:, :, 0] -= x
    for j in range(1, blocks.shape[2]):
        blocks[:, :, j] += blocks[:, :, j - 1]
    return squared_norm(blocks)


def nested_gradients_(blocks: Float[Tensor, "g c p d"], factors: Float[Tensor, "g p"]) -> None:
    """e_j becomes Σ_{i≥j} factor_i·e_i."""
    blocks *= factors[:, None, :, None]
    for j in range(blocks.shape[2] - 2, -1, -1):
        blocks[:, :, j] += blocks[:, :, j + 1]


class _NestedErrors(torch.autograd.Function):
    """Works in place on ``blocks``, which is a large tensor."""

    @staticmethod
    def forward(
        ctx: tp.Any, memory: Tensor, b_dec: Tensor, x: Tensor, n_blocks: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.mark_dirty(memory)
        ctx.set_materialize_grads(False)  # else torch allocates zeros of the size of the blocks
        ctx.shape = (b_dec.shape[0], x.shape[0], n_blocks, x.shape[1])
        blocks = memory.view(ctx.shape)
        errors = total(nested_errors_(blocks, b_dec, x).transpose(1, 2))
        residual = -blocks[:, :, -1]
        ctx.mark_non_differentiable(residual)
        ctx.save_for_backward(memory)
        return memory, errors, residual

    @staticmethod
    def backward(
        ctx: tp.Any, _: Tensor, grad: Tensor, __: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        memory = ctx.saved_tensors[0].detach()
        blocks = memory.view(ctx.shape)
        nested_gradients_(blocks, 2 * grad)
        return memory, blocks[:, :, 0].sum(1), None, None


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: tp.Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return total(squared_norm(rows))

    @staticmethod
    def backward(ctx: tp.Any, grad: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return rows * (2 * grad)


def squared_error(rows: Float[Tensor, "c d"]) -> Float[Tensor, ""]:
    """Σ ‖row‖². Differentiable."""
    return tp.cast(Tensor, _SquaredError.apply(rows))
