"""The loss of some members of a bank on a batch and its gradient, by hand.

Written out instead of left to autograd, so that nothing of size [B, d_sae] outlives a chunk of
rows, sparse codes get sparse gradients, and sums run in one order. Tests compare every term with
autograd.

Shapes: g members of the group, c rows (tokens) of a chunk, p prefixes, s = d_sae, d = d_model.
Encoders are stored transposed, [s, d] as decoders are.

With e_j = x̂_j - x and G_j = Σ_{i≥j} ∂mse/∂x̂_i = Σ_{i≥j} 2·e_i/(P·B·d), a latent of block j (the
latents from p_{j-1} up to p_j, which all reconstructions from the j-th on contain) has
∂mse/∂f = ⟨G_j, W_dec⟩.
"""

import itertools
import typing as tp

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saev.nn import sparse
from saev.nn.activations import rectangle
from saev.nn.objectives import Prefixes
from saev.nn.ranks import Ranks


class Weights(tp.NamedTuple):
    """Parameters of a group, or their gradients."""

    W_enc: Float[Tensor, "g s d"]
    """Encoders, transposed."""
    b_enc: Float[Tensor, "g s"]
    """Encoder biases."""
    W_dec: Float[Tensor, "g s d"]
    """Decoders."""
    b_dec: Float[Tensor, "g d"]
    """Decoder biases."""
    log_threshold: Float[Tensor, "g s"] | None = None
    """ln θ (JumpReLU)."""

    def member(self, g: int) -> "Weights":
        """Views of one member's."""
        return Weights(
            **{name: t[g : g + 1] for name, t in self._asdict().items() if t is not None}
        )


class Totals(tp.NamedTuple):
    """Sums over the rows of a batch."""

    error: Float[Tensor, "g p"]
    """Σ ‖x - x̂_j‖² of each prefix."""
    n_active: Float[Tensor, "g s"]
    """Tokens on which each latent is active."""
    value: Float[Tensor, "g s"]
    """Σ f of each latent."""


def total(values: Tensor) -> Tensor:
    """Sum over the last axis, in pieces, so that the bits do not depend on the number of threads:
    torch divides a long sum with a single result among them."""
    width = 1024
    tail = -values.shape[-1] % width
    return F.pad(values, (0, tail)).unflatten(-1, (-1, width)).sum(-1).sum(-1)


def squared_norm(rows: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows"]:
    """‖row‖² without a temporary of the size of the rows."""
    return torch.linalg.vector_norm(rows, dim=-1).square()


def variation(x: Float[Tensor, "b d"], ranks: Ranks, n_tokens: int) -> Tensor:
    """Σ ‖x - x̄‖² over a batch of n_tokens, of which x is this rank's share."""
    if ranks.alone:
        return total(squared_norm(x - x.mean(0)))
    # In float64, where Σ‖x‖² - B·‖x̄‖² loses nothing that float32 has; one sum serves for both.
    wide = x.double()
    sums = torch.stack([wide.sum(0), wide.square().sum(0)])
    ranks.add_(sums)
    squares = (sums[1] - sums[0].square() / n_tokens).sum()
    return squares.clamp(min=0).to(x.dtype)


def output_gradient(
    blocks: Float[Tensor, "g c p d"],
    x: Float[Tensor, "c d"],
    b_dec: Float[Tensor, "g d"],
    prefixes: Prefixes,
    n_tokens: int,
) -> tuple[Float[Tensor, "g c p d"], Float[Tensor, "g p"], Float[Tensor, "g c d"]]:
    """G_j, the squared error of each prefix, and the residual x - x̂ of the last one.

    Args:
        blocks: contribution of each block of latents; overwritten by G_j.
        x: input.
        b_dec: decoder biases.
        prefixes: for their weights.
        n_tokens: B, of which these rows are a part.
    """
    n_p, d_model = blocks.shape[2:]
    blocks[:, :, 0] += b_dec[:, None]
    blocks[:, :, 0] -= x
    for j in range(1, n_p):
        blocks[:, :, j] += blocks[:, :, j - 1]
    error = total(squared_norm(blocks).transpose(1, 2))
    residual = -blocks[:, :, -1]
    blocks *= (2 / (n_tokens * d_model)) * prefixes.weights[:, None, :, None]
    for j in range(n_p - 2, -1, -1):
        blocks[:, :, j] += blocks[:, :, j + 1]
    return blocks, error, residual


def sparse_chunk(
    weights: Weights,
    grads: Weights,
    x: Float[Tensor, "c d"],
    codes: sparse.Codes,
    prefixes: Prefixes,
    n_tokens: int,
) -> tuple[Totals, Float[Tensor, "g c d"]]:
    """Add the gradient of TopK-like members on some rows; returns their totals and residuals.

    Args:
        weights: of the group.
        grads: added to.
        x: rows of input, the same for all members.
        codes: of g·c rows, member by member; table rows are member·d_sae + latent.
        prefixes: of the group.
        n_tokens: B.
    """
    n_g, d_sae, d_model = weights.W_dec.shape
    n_c, n_p = x.shape[0], prefixes.lengths.shape[1]
    n_entries = codes.values.shape[0]
    bag_ptr = _block_ptr(codes, prefixes, n_c, d_sae)

    table = weights.W_dec.view(n_g * d_sae, d_model)
    blocks, pull_back = sparse.sum_bags_vjp(table, codes.latents, codes.values, bag_ptr)
    grad_out, error, residual = output_gradient(
        blocks.view(n_g, n_c, n_p, d_model), x, weights.b_dec, prefixes, n_tokens
    )
    grads.b_dec.add_(grad_out[:, :, 0].sum(1))
    grad_table = grad_out.view(-1, d_model)
    active = codes.values > 0
    grad_z = pull_back(grad_table) * active

    grouped = sparse.group_by_latent(codes.latents, n_g * d_sae)
    bags = sparse.bag_of_entry(bag_ptr, n_entries)[grouped.order]
    grads.W_dec.view(n_g * d_sae, d_model).add_(
        sparse.sum_bags(grad_table, bags, codes.values[grouped.order], grouped.ptr)
    )
    rows = bags.div(n_p, rounding_mode="floor").remainder(n_c)
    grads.W_enc.view(n_g * d_sae, d_model).add_(
        sparse.sum_bags(x, rows, grad_z[grouped.order], grouped.ptr)
    )
    grads.b_enc.view(-1).index_add_(0, codes.latents, grad_z)

    count = torch.zeros_like(weights.b_enc)
    count.view(-1).index_add_(0, codes.latents, active.to(count.dtype))
    value = torch.zeros_like(weights.b_enc)
    value.view(-1).index_add_(0, codes.latents, codes.values)
    return Totals(error, count, value), residual


def _block_ptr(
    codes: sparse.Codes, prefixes: Prefixes, n_rows: int, d_sae: int
) -> Int[Tensor, " bags_plus_1"]:
    """Where each row's blocks of latents begin: bags in order (member, row, block)."""
    n_g, n_p = prefixes.lengths.shape
    if n_p == 1:
        return codes.row_ptr
    device = codes.latents.device
    row = sparse.bag_of_entry(codes.row_ptr, codes.latents.shape[0])
    # Table rows begin at member·d_sae, so (row, latent) pairs are ascending in this key.
    key = row.to(torch.int64) * (n_g * d_sae) + codes.latents
    first = torch.arange(n_g * n_rows, device=device) * (n_g * d_sae)
    member = torch.arange(n_g, device=device).repeat_interleave(n_rows) * d_sae
    bounds = (first + member)[:, None] + prefixes.lengths.repeat_interleave(n_rows, dim=0)
    starts = torch.searchsorted(key, bounds[:, :-1].contiguous(), out_int32=True)
    starts = torch.cat([codes.row_ptr[:-1, None], starts], dim=1)
    return torch.cat([starts.flatten(), codes.row_ptr[-1:]])


def dense_chunk(
    weights: Weights,
    grads: Weights,
    x: Float[Tensor, "c d"],
    prefixes: Prefixes,
    n_tokens: int,
    sparsity_coeff: float | Tensor,
    kernel_width: float,
    bf16: bool,
) -> tuple[Totals, Float[Tensor, "1 c d"]]:
    """Add the gradient of one ReLU or JumpReLU member (a group of one) on some rows.

    Args:
        weights: of the member; with `log_threshold` it is a JumpReLU.
        grads: added to.
        x: rows of input.
        prefixes: of the member.
        n_tokens: B.
        sparsity_coeff: λ.
        kernel_width: ε/θ of JumpReLU's kernel.
        bf16: multiply matrices in bfloat16.
    """

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return (a.bfloat16() @ b.bfloat16()).to(a.dtype) if bf16 else a @ b

    w_enc, w_dec = weights.W_enc[0], weights.W_dec[0]
    z = mm(x, w_enc.T).add_(weights.b_enc[0])
    # A copy, because MKL's exp rounds differently for another alignment in memory.
    theta = None if weights.log_threshold is None else weights.log_threshold[0].clone().exp()
    active = z > (0 if theta is None else theta)
    f = z * active

    cuts = [0, *prefixes.cuts[0]]
    ranges = list(itertools.pairwise(cuts))
    blocks = torch.stack([mm(f[:, a:b], w_dec[a:b]) for a, b in ranges], dim=1)
    grad_out, error, residual = output_gradient(blocks[None], x, weights.b_dec, prefixes, n_tokens)
    grads.b_dec.add_(grad_out[:, :, 0].sum(1))

    grad_f = torch.empty_like(f)
    for j, (a, b) in enumerate(ranges):
        grad_f[:, a:b] = mm(grad_out[0, :, j], w_dec[a:b].T)
        grads.W_dec[0, a:b].add_(mm(f[:, a:b].T, grad_out[0, :, j]))

    penalty = sparsity_coeff / n_tokens
    if theta is None:
        grad_f += penalty
    else:
        assert grads.log_threshold is not None
        # ∂/∂ln θ = θ·∂/∂θ of mse and of λ·L0/B; the θ of ε = width·θ cancels.
        near = rectangle(z, theta, kernel_width).to(f.dtype)
        grad = theta * (grad_f * near).sum(0) + penalty * near.sum(0)
        grads.log_threshold[0].add_(grad / -kernel_width)
    grad_z = grad_f.mul_(active)
    grads.W_enc[0].add_(mm(grad_z.T, x))
    grads.b_enc[0].add_(grad_z.sum(0))
    return Totals(error, active.to(f.dtype).sum(0)[None], f.sum(0)[None]), residual


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
) -> Tensor:
    """Add the gradient of one member's AuxK term (see :mod:`saev.nn.objectives`); returns the term.

    Args:
        weights: of the member (a group of one).
        grads: added to.
        x: the batch (of several ranks, the rows of this one).
        residual: e = x - x̂ of these rows, a constant.
        energy: Σ ‖e‖² over the batch of all ranks.
        candidates: latents among which all dead ones are; at least one.
        dead: which latents are dead.
        k_aux: dead latents used per token.
        coeff: α·v.
        chunk: rows at a time.
    """
    w_enc, b_enc, w_dec = (t[0].index_select(0, candidates) for t in weights[:3])
    is_dead = dead.index_select(0, candidates)
    share = (is_dead.sum().to(coeff.dtype) / k_aux).clamp(max=1.0)
    # Where nothing is left over there is nothing to learn.
    factor = torch.where(energy == 0, 0.0, coeff * share / energy)
    error = torch.zeros((), dtype=x.dtype, device=x.device)
    sums = [torch.zeros_like(w_enc), torch.zeros_like(b_enc), torch.zeros_like(w_dec)]
    for x_c, e_c in zip(x.split(chunk), residual.split(chunk), strict=True):
        z = F.linear(x_c, w_enc, b_enc)
        kept = is_dead
        if candidates.shape[0] > k_aux:
            top = z.masked_fill(~is_dead, -torch.inf).topk(k_aux, dim=-1, sorted=False).indices
            kept = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, top, True) & is_dead
        z = torch.where(kept, z, 0.0)
        miss = z @ w_dec - e_c
        error += total(squared_norm(miss))
        grad_e = miss * (2 * factor)
        grad_z = torch.where(kept, grad_e @ w_dec.T, 0.0)
        sums[0] += grad_z.T @ x_c
        sums[1] += grad_z.sum(0)
        sums[2] += z.T @ grad_e
    for grad, part in zip((grads.W_enc, grads.b_enc, grads.W_dec), sums, strict=True):
        grad[0].index_add_(0, candidates, part)
    return factor * error
