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
    """Their gradients, added to."""
    threshold: Float[Tensor, " g"]
    """Moving thresholds (BatchTopK), updated."""
    prefixes: Prefixes
    """Of this step."""
    chunk: int
    """Rows at a time; the whole batch if there is more than one member."""
    bf16: bool
    """Multiply with the matrices in bfloat16."""
    n_tokens: int
    """B, over all ranks."""
    ranks: Ranks
    """Who has the other rows of the batch."""

    def __len__(self) -> int:
        return len(self.activations)


class DeadLatents(tp.NamedTuple):
    """Which latents are dead."""

    mask: Bool[Tensor, "g d_sae"]
    """Exactly."""
    candidates: tp.Sequence[Int[Tensor, " c"]]
    """Per member, latents among which all dead ones are. How many they are is known without waiting
    for the device, which the mask does not say."""

    def of(self, members: slice) -> "DeadLatents":
        """Of some members."""
        return DeadLatents(self.mask[members], self.candidates[members])


class GroupSums(tp.NamedTuple):
    """What was measured on this rank's rows of the batch, per member."""

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
    """Forward, losses and backward of a group: adds the gradients of its loss
    (:mod:`saev.nn.objectives`) to ``group.grads``.

    Nothing of size [B, d_sae] outlives a chunk of rows: each chunk goes backward at once.

    Args:
        group: the members.
        x: normalised activations.
        dead: the group's; None if none can be.
        variance: v of the AuxK term.
    """
    weights = group.weights.leaves(group.grads)
    codes = _codes(group, x)
    reviving = _reviving(group, dead)
    measured, residuals = [], []
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
            errors, residual = nested_errors(
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
        if reviving:
            residuals.append(residual)
    if parts:
        _encoder_backward(weights, parts, torch.cat(grads_of_values))
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


def _part(group: Group, x_c: Tensor, codes: sparse.Codes, start: int) -> sparse.Part:
    rows = codes.rows(start, start + x_c.shape[0]) if len(group) == 1 else codes
    return sparse.Part.of(x_c, rows, group.weights.b_enc.numel())


def _leaf(part: sparse.Part) -> SparseLatents:
    """Codes whose gradient is kept until that of the encoder is computed for all chunks."""
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
    """AuxK terms; their gradients are added to ``group.grads``."""
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
        )
    return aux


def _codes(group: Group, x: Tensor) -> sparse.Codes | None:
    """Sparse codes of the batch, or None for activations that are computed densely."""
    match group.activations[0]:
        case TopK():
            top_k = [a.top_k for a in group.activations if isinstance(a, TopK)]
            return encode.top_k_codes(group.weights, x, top_k, group.chunk, group.bf16)
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
    """θ ← m·θ + (1 - m)·(smallest selected value); the first value is taken as it is."""
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
    rows = [t[0].index_select(0, candidates).requires_grad_() for t in weights[:3]]
    w_enc, b_enc, w_dec = rows
    is_dead = dead.index_select(0, candidates)
    share = (is_dead.sum().to(coeff.dtype) / k_aux).clamp(max=1.0)
    # Where nothing is left over there is nothing to learn.
    factor = torch.where(energy == 0, 0.0, coeff * share / energy)
    error = torch.zeros((), dtype=x.dtype, device=x.device)
    for x_c, e_c in zip(x.split(chunk), residual.split(chunk), strict=True):
        with torch.enable_grad():
            z = F.linear(x_c, w_enc, b_enc)
            kept = is_dead
            if candidates.shape[0] > k_aux:
                top = z.detach().masked_fill(~is_dead, -torch.inf).topk(k_aux, dim=-1, sorted=False)
                kept = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, top.indices, True)
                kept &= is_dead
            left_over = squared_error(torch.where(kept, z, 0.0) @ w_dec - e_c)
            loss = factor * left_over
        loss.backward()
        error += left_over.detach()
    for grad, row in zip((grads.W_enc, grads.b_enc, grads.W_dec), rows, strict=True):
        if row.grad is not None:  # a rank may have no rows
            grad[0].index_add_(0, candidates, row.grad)
    return factor * error
