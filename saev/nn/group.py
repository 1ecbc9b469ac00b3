"""Forward, losses and backward of a group of members of a bank on one batch."""

import functools
import typing as tp

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saev.config.sae import Activation, BatchTopK, Objective, TopK
from saev.device import upload
from saev.nn import encode
from saev.nn.kernels import sparse
from saev.nn.kernels.dense import product
from saev.nn.kernels.errors import nested_errors, squared_error, squared_norm, total
from saev.nn.latents import Latents, SparseLatents, dense_latents
from saev.nn.objectives import Prefixes, default_k_aux, reconstruction_loss
from saev.nn.ranks import Ranks
from saev.nn.weights import Weights


class Group(tp.NamedTuple):
    """Consecutive members of a bank, with views of its tensors."""

    activations: tp.Sequence[Activation]
    """All of one kind."""
    objectives: tp.Sequence[Objective]
    """One per member."""
    coeffs: tp.Sequence[float | Tensor]
    """Sparsity coefficients of this step; tensors where a target chooses them."""
    weights: Weights
    """Parameters."""
    grads: Weights
    """Gradients, which are accumulated."""
    threshold: Float[Tensor, " g"]
    """Moving thresholds (BatchTopK), which are updated."""
    prefixes: Prefixes
    """Prefixes of this step."""
    chunk: int
    """Rows per chunk; the whole batch if there is more than one member."""
    bf16: bool
    """Multiply with the matrices in bfloat16."""
    n_tokens: int
    """B, the tokens of the batch over all ranks."""
    ranks: Ranks
    """The ranks that hold the other rows of the batch."""
    triton: bool = False
    """Use Triton's kernels where codes are sparse."""

    def __len__(self) -> int:
        return len(self.activations)


class DeadLatents(tp.NamedTuple):
    """The dead latents of a group."""

    mask: Bool[Tensor, "g d_sae"]
    """True for dead latents."""
    candidates: tp.Sequence[Int[Tensor, " c"]]
    """Indices of latents per member that include all dead ones. Unlike the number of dead latents,
    the number of candidates is known without waiting for the device."""

    def of(self, members: slice) -> "DeadLatents":
        """The dead latents of some members."""
        return DeadLatents(self.mask[members], self.candidates[members])


class GroupSums(tp.NamedTuple):
    """Sums over this rank's rows of the batch, per member."""

    mse: Float[Tensor, " g"]
    """Σ_j ‖x - x̂_j‖² / P, summed over tokens."""
    error: Float[Tensor, " g"]
    """‖x - x̂‖² of the whole dictionary, summed over tokens."""
    n_active: Float[Tensor, "g d_sae"]
    """Tokens on which each latent is active."""
    l0: Float[Tensor, " g"]
    """Number of active latents, summed over tokens."""
    l1: Float[Tensor, " g"]
    """Sum of latents, summed over tokens."""
    aux: Float[Tensor, " g"]
    """AuxK term of the loss."""


def group_gradients(
    group: Group,
    x: Float[Tensor, "batch d_model"],
    dead: DeadLatents | None,
    variance: Tensor,
) -> GroupSums:
    """Forward, losses and backward of a group. Adds the gradients of its loss
    (:mod:`saev.nn.objectives`) to ``group.grads``.

    No tensor of size [B, d_sae] is kept, because the backward pass of each chunk of rows follows
    its forward pass.

    Args:
        group: the members.
        x: normalised activations.
        dead: dead latents of the group; None if there cannot be any.
        variance: v of the AuxK term.
    """
    codes = _codes(group, x)
    reviving = _reviving(group, dead)
    if group.triton and codes is not None:
        measured, residuals = _by_kernels(group, x, codes, bool(reviving))
    else:
        measured, residuals = _by_autograd(group, x, codes, bool(reviving))
    error, n_active, value = (
        functools.reduce(torch.add, sums) for sums in zip(*measured, strict=True)
    )
    return GroupSums(
        mse=(error * group.prefixes.weights).sum(-1),
        error=error[:, -1],
        n_active=n_active,
        l0=total(n_active),
        l1=total(value),
        aux=_aux_k(group, x, dead, reviving, residuals, variance),
    )


Measured = list[tuple[Tensor, Tensor, Tensor]]
"""Of each chunk of rows: Σ ‖x - x̂_j‖², and per latent the tokens on which it is active, and Σ f."""


def _by_autograd(
    group: Group, x: Tensor, codes: sparse.Codes | None, residual: bool
) -> tuple[Measured, list[Tensor]]:
    """Forward, loss and backward, chunk by chunk. Returns residuals if they are wanted."""
    weights = group.weights.leaves(group.grads)
    measured: Measured = []
    residuals: list[Tensor] = []
    parts: list[sparse.Part] = []
    grads_of_values: list[Tensor] = []
    for start in range(0, max(1, x.shape[0]), group.chunk):
        x_c = x[start : start + group.chunk]
        with torch.enable_grad():
            if codes is None:
                f: Latents = dense_latents(weights, x_c, group.activations[0], group.bf16)
            else:
                parts.append(_part(group, x_c, codes, start))
                f = _leaf(parts[-1])
            blocks = f.decode(weights.W_dec, group.prefixes)
            errors, residual_c = nested_errors(
                blocks, weights.b_dec, x_c, group.prefixes.lengths.shape[1]
            )
            loss = reconstruction_loss(errors, group.prefixes, group.n_tokens, x.shape[1])
            if f.penalty is not None:
                loss = loss + f.penalty.sum() * (group.coeffs[0] / group.n_tokens)
        loss.backward()
        measured.append((errors.detach(), *f.per_latent(group.weights.b_enc)))
        if isinstance(f, SparseLatents):
            assert f.codes.values.grad is not None
            grads_of_values.append(f.codes.values.grad)
        if residual:
            residuals.append(residual_c)
    if parts:
        _encoder_backward(weights, parts, torch.cat(grads_of_values))
    return measured, residuals


def _by_kernels(
    group: Group, x: Tensor, codes: sparse.Codes, residual: bool
) -> tuple[Measured, list[Tensor]]:
    """The same for sparse codes, by Triton's kernels."""
    from saev.nn import fused

    measured: Measured = []
    residuals: list[Tensor] = []
    for start in range(0, max(1, x.shape[0]), group.chunk):
        x_c = x[start : start + group.chunk]
        sums, residual_c = fused.chunk_gradients(
            group.weights,
            group.grads,
            group.prefixes,
            x_c,
            _codes_of(group, x_c, codes, start),
            1 / (group.n_tokens * x.shape[1]),
            group.bf16,
            residual,
        )
        measured.append(sums)
        if residual_c is not None:
            residuals.append(residual_c)
    return measured, residuals


def _codes_of(group: Group, x_c: Tensor, codes: sparse.Codes, start: int) -> sparse.Codes:
    """The codes of a chunk of rows. A group of more than one member has one chunk only."""
    return codes.rows(start, start + x_c.shape[0]) if len(group) == 1 else codes


def _part(group: Group, x_c: Tensor, codes: sparse.Codes, start: int) -> sparse.Part:
    rows = _codes_of(group, x_c, codes, start)
    return sparse.Part.of(x_c, rows, group.weights.b_enc.numel())


def _leaf(part: sparse.Part) -> SparseLatents:
    """Codes as a leaf of autograd. The encoder's backward pass runs later, for all chunks at once,
    and starts from the gradient of this leaf."""
    values = part.codes.values.detach().requires_grad_()
    return SparseLatents(part.codes._replace(values=values), part.grouped, part.x.shape[0])


def _encoder_backward(weights: Weights, parts: list[sparse.Part], grad_values: Tensor) -> None:
    with torch.enable_grad():
        w_enc, b_enc = weights.W_enc.flatten(0, 1), weights.b_enc.flatten()
        values = sparse.encode(w_enc, b_enc, parts)
    values.backward(grad_values)


def _aux_k(
    group: Group,
    x: Tensor,
    dead: DeadLatents | None,
    reviving: list[int],
    residuals: list[Tensor],
    variance: Tensor,
) -> Float[Tensor, " g"]:
    """The AuxK terms. Their gradients are added to ``group.grads``."""
    aux = torch.zeros(len(group), dtype=x.dtype, device=x.device)
    whole = [torch.cat([r[g] for r in residuals]) for g in reviving]
    energies = [total(squared_norm(residual)) for residual in whole]
    group.ranks.add_(*energies)
    for g, residual, energy in zip(reviving, whole, energies, strict=True):
        assert dead is not None
        objective = group.objectives[g]
        aux[g] = aux_k(
            group.weights.member(g),
            group.grads.member(g),
            x,
            residual,
            energy,
            dead.candidates[g],
            dead.mask[g],
            objective.k_aux or default_k_aux(x.shape[1]),
            variance * objective.aux_coeff,
            group.chunk,
            group.bf16,
        )
    return aux


def _codes(group: Group, x: Tensor) -> sparse.Codes | None:
    """Sparse codes of the batch, or None for activations that are computed densely."""
    match group.activations[0]:
        case TopK():
            top_k = [a.top_k for a in group.activations if isinstance(a, TopK)]
            return encode.top_k_codes(
                group.weights, x, top_k, group.chunk, group.bf16, group.triton
            )
        case BatchTopK():
            batch_top_k = [a for a in group.activations if isinstance(a, BatchTopK)]
            codes, smallest = encode.batch_top_k_codes(
                group.weights,
                x,
                [a.top_k for a in batch_top_k],
                group.threshold,
                group.chunk,
                group.bf16,
                group.n_tokens,
                group.ranks,
            )
            _move_threshold(group.threshold, smallest, [a.threshold_momentum for a in batch_top_k])
            return codes
        case _:
            return None


def _move_threshold(
    threshold: Float[Tensor, " g"], smallest: Float[Tensor, " g"], momentum: tp.Sequence[float]
) -> None:
    """θ ← m·θ + (1 - m)·(smallest selected value). The first value replaces θ."""
    m = upload(momentum, threshold)
    moved = torch.where(threshold == 0, smallest, threshold * m + smallest * (1 - m))
    threshold.copy_(torch.where(smallest.isnan(), threshold, moved))


def _reviving(group: Group, dead: DeadLatents | None) -> list[int]:
    """Members that may have dead latents and have an AuxK term."""
    if dead is None:
        return []
    some = zip(dead.candidates, group.objectives, strict=True)
    return [g for g, (index, o) in enumerate(some) if len(index) and o.aux_coeff > 0]


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
