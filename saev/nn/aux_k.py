"""The AuxK term of one member, which moves dead latents towards the residual."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saev.nn.kernels.dense import product
from saev.nn.kernels.errors import squared_error
from saev.nn.weights import Weights


def aux_k(
    weights: Weights,
    grads: Weights,
    x: Float[Tensor, "b d"],
    residual: Float[Tensor, "b d"],
    energy: Tensor,
    candidates: Int[Tensor, " c"],
    dead: Bool[Tensor, " s"],
    k_aux: int,
    coeff: Tensor,
    chunk: int,
    bf16: bool = False,
) -> Tensor:
    """Add the gradient of one member's AuxK term (see :mod:`saev.nn.objectives`); returns the term.

    Args:
        weights: of the member (a group of one).
        grads: gradients, to which those of the term are added.
        x: the batch (with several ranks, the rows of this rank).
        residual: e = x - x̂ of these rows, a constant.
        energy: Σ ‖e‖² over the batch of all ranks.
        candidates: indices of latents that include all dead ones; at least one.
        dead: mask of the dead latents.
        k_aux: dead latents used per token.
        coeff: α·v.
        chunk: rows per chunk.
        bf16: multiply in bfloat16.
    """
    rows = [t[0].index_select(0, candidates).requires_grad_() for t in weights[:3]]
    w_enc, b_enc, w_dec = rows
    is_dead = dead.index_select(0, candidates)
    share = (is_dead.sum().to(coeff.dtype) / k_aux).clamp(max=1.0)
    # Without a residual there is nothing to learn, and the division would give NaN.
    factor = torch.where(energy == 0, 0.0, coeff * share / energy)
    error = torch.zeros((), dtype=x.dtype, device=x.device)
    for x_c, e_c in zip(x.split(chunk), residual.split(chunk), strict=True):
        with torch.enable_grad():
            # In float32, these products are the largest part of a step with many dead latents.
            z = product(x_c, w_enc.T, bf16) + b_enc if bf16 else F.linear(x_c, w_enc, b_enc)
            kept = is_dead
            if candidates.shape[0] > k_aux:
                top = z.detach().masked_fill(~is_dead, -torch.inf).topk(k_aux, dim=-1, sorted=False)
                kept = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, top.indices, True)
                kept &= is_dead
            left_over = squared_error(product(torch.where(kept, z, 0.0), w_dec, bf16) - e_c)
            loss = factor * left_over
        loss.backward()
        error += left_over.detach()
    for grad, row in zip((grads.W_enc, grads.b_enc, grads.W_dec), rows, strict=True):
        if row.grad is not None:  # a rank may have no rows
            grad[0].index_add_(0, candidates, row.grad)
    return factor * error
