"""The AuxK term of one member, which moves dead latents towards the residual.

Of many dead latents each token uses k_aux. Then these are sparse codes, whose steps are those of
TopK with the residual as the target. Of few dead latents, dense products are faster.
"""

import typing as tp

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saev.nn import encode, sparse_step
from saev.nn.kernels.dense import product
from saev.nn.kernels.errors import squared_error
from saev.nn.objectives import Prefixes
from saev.nn.weights import Weights

_SPARSE_ABOVE = {"cpu": 8, "cuda": 64}
"""Dead latents per used one, above which codes are sparse. Measured on a CPU: both take the same
time at 8, and sparse codes a third at 96. For a GPU it is an estimate from its rates of products
and of reads."""


class Dead(tp.NamedTuple):
    """The dead latents of a member."""

    candidates: Int[Tensor, " c"]
    """Indices of latents that include all dead ones; at least one."""
    mask: Bool[Tensor, " s"]
    """True for dead latents."""


class How(tp.NamedTuple):
    """How it is computed."""

    chunk: int
    """Rows per chunk."""
    bf16: bool
    """Multiply in bfloat16."""
    triton: bool
    """Use Triton's kernels for sparse codes."""


def aux_k(
    weights: Weights,
    grads: Weights,
    x: Float[Tensor, "b d"],
    residual: Float[Tensor, "b d"],
    energy: Tensor,
    dead: Dead,
    k_aux: int,
    coeff: Tensor,
    how: How,
) -> Tensor:
    """Add the gradient of one member's AuxK term (see :mod:`saev.nn.objectives`); returns the term.

    Args:
        weights: of the member (a group of one).
        grads: gradients, to which those of the term are added.
        x: the batch (with several ranks, the rows of this rank).
        residual: e = x - x̂ of these rows, a constant.
        energy: Σ ‖e‖² over the batch of all ranks.
        dead: dead latents.
        k_aux: dead latents used per token.
        coeff: α·v.
        how: how it is computed.
    """
    w_enc, b_enc, w_dec = (t.index_select(1, dead.candidates) for t in weights[:3])
    chosen = Weights(w_enc, b_enc, w_dec, weights.b_dec)
    w_enc, b_enc, w_dec, b_dec = (torch.zeros_like(t) for t in chosen[:4])
    own_grads = Weights(w_enc, b_enc, w_dec, b_dec)
    is_dead = dead.mask.index_select(0, dead.candidates)
    share = (is_dead.sum().to(coeff.dtype) / k_aux).clamp(max=1.0)
    # Without a residual there is nothing to learn, and the division would give NaN.
    factor = torch.where(energy == 0, 0.0, coeff * share / energy)
    n_candidates = dead.candidates.shape[0]
    sparsely = n_candidates > k_aux * max(1, _SPARSE_ABOVE[x.device.type])
    add = _add_sparse if sparsely else _add_dense
    error = torch.zeros((), dtype=x.dtype, device=x.device)
    for x_c, e_c in zip(x.split(how.chunk), residual.split(how.chunk), strict=True):
        error += add(chosen, own_grads, x_c, e_c, is_dead, k_aux, factor, how)
    for grad, own in zip(grads[:3], own_grads[:3], strict=True):
        grad.index_add_(1, dead.candidates, own)
    return factor * error


def _add_dense(
    weights: Weights,
    grads: Weights,
    x: Float[Tensor, "c d"],
    residual: Float[Tensor, "c d"],
    is_dead: Bool[Tensor, " s"],
    k_aux: int,
    factor: Tensor,
    how: How,
) -> Tensor:
    """Add the gradients of factor·Σ ‖e - ê‖² over some rows; returns the sum."""
    with torch.enable_grad():
        w_enc, b_enc, w_dec = (t[0] for t in weights.leaves(grads)[:3])
        # In float32, these products are the largest part of a step with many dead latents.
        z = product(x, w_enc.T, how.bf16) + b_enc if how.bf16 else F.linear(x, w_enc, b_enc)
        kept = is_dead
        if z.shape[1] > k_aux:
            top = z.detach().masked_fill(~is_dead, -torch.inf).topk(k_aux, dim=-1, sorted=False)
            kept = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, top.indices, True)
            kept &= is_dead
        left_over = squared_error(product(torch.where(kept, z, 0.0), w_dec, how.bf16) - residual)
        loss = factor * left_over
    loss.backward()
    return left_over.detach()


def _add_sparse(
    weights: Weights,
    grads: Weights,
    x: Float[Tensor, "c d"],
    residual: Float[Tensor, "c d"],
    is_dead: Bool[Tensor, " s"],
    k_aux: int,
    factor: Tensor,
    how: How,
) -> Tensor:
    """:func:`_add_dense` for sparse codes."""
    biases = torch.where(is_dead, weights.b_enc, -torch.inf)  # others are selected last
    codes = encode.top_k_codes(
        weights._replace(b_enc=biases),
        x,
        [k_aux],
        how.chunk,
        how.bf16,
        triton=how.triton,
        rectify=False,
    )
    codes = codes._replace(values=codes.values.masked_fill(codes.values == -torch.inf, 0.0))
    lengths = torch.full((1, 1), is_dead.shape[0], device=x.device)
    whole = Prefixes(lengths, torch.ones_like(lengths, dtype=x.dtype), [[is_dead.shape[0]]])
    measured, _ = sparse_step.chunk_gradients(
        weights._replace(b_dec=torch.zeros_like(weights.b_dec)),
        grads,
        whole,
        x,
        codes,
        factor,
        target=residual,
        residual=False,
        triton=how.triton,
        bf16=how.bf16,
    )
    return measured.errors[0, 0]
