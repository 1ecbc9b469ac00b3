"""The work per row of the decoders beside the gradients, in two passes over all members.

First the part of each gradient that is parallel to its row is removed and the norm of the rest is
computed; then Adam updates the row, and the row is normalised. The two are apart because the norm
of the gradient is a metric of the first half of a step.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saev.nn.kernels.triton.decode import n_warps
from saev.nn.optim import BETA1, BETA2, EPS


@triton.jit
def _remove_parallel(
    rows_ptr, grads_ptr, removing_ptr, squares_ptr, n_latents, d_model, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    within = column < d_model
    place = row * d_model + column
    grad = tl.load(grads_ptr + place, mask=within, other=0.0)
    if tl.load(removing_ptr + row // n_latents) != 0.0:
        w = tl.load(rows_ptr + place, mask=within, other=0.0)
        along = tl.sum(grad * w, 0) / tl.maximum(tl.sum(w * w, 0), 1e-24)
        grad -= along * w
        tl.store(grads_ptr + place, grad, mask=within)
    tl.store(squares_ptr + row, tl.sum(grad * grad, 0))


def remove_parallel(
    rows: Float[Tensor, "g s d"], grads: Float[Tensor, "g s d"], removing: Float[Tensor, " g"]
) -> Float[Tensor, "g s"]:
    """Remove the part of each gradient that is parallel to its row, in place.

    Args:
        rows: decoders, float32 and contiguous.
        grads: their gradients.
        removing: 1 for members that want this, 0 for others.

    Returns:
        ‖gradient‖² of each row, after the removal.
    """
    n_members, n_latents, d_model = rows.shape
    squares = torch.empty(n_members, n_latents, dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(d_model)
    _remove_parallel[(n_members * n_latents,)](
        rows, grads, removing, squares, n_latents, d_model, BLOCK=block, num_warps=n_warps(block)
    )
    return squares


def remove_parallel_reference(
    rows: Float[Tensor, "g s d"], grads: Float[Tensor, "g s d"], removing: Float[Tensor, " g"]
) -> Float[Tensor, "g s"]:
    """:func:`remove_parallel` in torch."""
    along = (grads * rows).sum(-1) / rows.square().sum(-1).clamp(min=1e-24)
    grads.sub_((along * removing[:, None])[..., None] * rows)
    return grads.square().sum(-1)


@triton.jit
def _update(
    rows_ptr, grads_ptr, m_ptr, v_ptr, member_ptr, n_latents, d_model,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    member = row // n_latents
    step_size = tl.load(member_ptr + 3 * member)
    root_correction = tl.load(member_ptr + 3 * member + 1)
    normalise = tl.load(member_ptr + 3 * member + 2)
    column = tl.arange(0, BLOCK)
    within = column < d_model
    place = row * d_model + column
    grad = tl.load(grads_ptr + place, mask=within, other=0.0)
    m = tl.load(m_ptr + place, mask=within, other=0.0)
    v = tl.load(v_ptr + place, mask=within, other=0.0)
    w = tl.load(rows_ptr + place, mask=within, other=0.0)
    m += (1.0 - BETA1) * (grad - m)
    v = BETA2 * v + (1.0 - BETA2) * grad * grad
    w -= step_size * m / (tl.sqrt(v) / root_correction + EPS)
    if normalise != 0.0:
        w /= tl.maximum(tl.sqrt(tl.sum(tl.where(within, w * w, 0.0), 0)), 1e-12)
    tl.store(m_ptr + place, m, mask=within)
    tl.store(v_ptr + place, v, mask=within)
    tl.store(rows_ptr + place, w, mask=within)


def update(
    rows: Float[Tensor, "g s d"],
    grads: Float[Tensor, "g s d"],
    m: Float[Tensor, "g s d"],
    v: Float[Tensor, "g s d"],
    of_members: Float[Tensor, "g 3"],
) -> None:
    """Adam's step of decoders, and the norm of their rows, in place.

    Args:
        rows: decoders, float32 and contiguous.
        grads: their gradients.
        m: Adam's first moment.
        v: Adam's second moment.
        of_members: of each member, lr / (1 - β1^t), √(1 - β2^t), and 1 if its rows are normalised.
    """
    n_members, n_latents, d_model = rows.shape
    block = triton.next_power_of_2(d_model)
    _update[(n_members * n_latents,)](
        rows, grads, m, v, of_members, n_latents, d_model,
        BETA1=BETA1, BETA2=BETA2, EPS=EPS, BLOCK=block, num_warps=n_warps(block),
    )  # fmt: skip


def update_reference(
    rows: Float[Tensor, "g s d"],
    grads: Float[Tensor, "g s d"],
    m: Float[Tensor, "g s d"],
    v: Float[Tensor, "g s d"],
    of_members: Float[Tensor, "g 3"],
) -> None:
    """:func:`update` in torch."""
    step_size, root_correction, normalise = of_members[:, :, None, None].unbind(1)
    m.lerp_(grads, 1 - BETA1)
    v.mul_(BETA2).addcmul_(grads, grads, value=1 - BETA2)
    rows.sub_(step_size * m / (v.sqrt() / root_correction + EPS))
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1e-12)
    rows.div_(torch.where(normalise != 0, norm, 1.0))
