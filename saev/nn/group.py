"""Forward, losses and backward of a group of members of a bank on one batch."""

import functools
import typing as tp
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saev.config.sae import Activation, BatchTopK, JumpRelu, Objective, TopK
from saev.device import upload
from saev.nn import encode, sparse_step
from saev.nn.aux_k import Dead, How, aux_k
from saev.nn.kernels import dense
from saev.nn.kernels.errors import nested_errors, squared_norm, total
from saev.nn.kernels.sparse import Codes
from saev.nn.objectives import Prefixes, default_k_aux, reconstruction_loss
from saev.nn.ranks import Ranks
from saev.nn.sparse_step import Measured
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
    chunks = (
        _dense_chunks(group, x)
        if codes is None
        else _sparse_chunks(group, x, codes, bool(reviving))
    )
    measured, residuals = [], []
    for sums, residual in chunks:
        measured.append(sums)
        if reviving:
            assert residual is not None
            residuals.append(residual)
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


def _dense_chunks(group: Group, x: Tensor) -> Iterator[tuple[Measured, Tensor]]:
    """Forward, loss and backward of one ReLU or JumpReLU member, by autograd.

    Gives the sums and the residual of each chunk of rows.
    """
    weights = group.weights.leaves(group.grads)
    for x_c in x.split(group.chunk):
        with torch.enable_grad():
            act, penalty = _activated(group, weights, x_c)
            blocks = dense.decode_blocks(
                act.f, weights.W_dec[0], group.prefixes.cuts[0], group.bf16
            )
            errors, residual = nested_errors(
                blocks, weights.b_dec, x_c, group.prefixes.lengths.shape[1]
            )
            loss = reconstruction_loss(errors, group.prefixes, group.n_tokens, x.shape[1])
            loss = loss + penalty.sum() * (group.coeffs[0] / group.n_tokens)
        loss.backward()
        yield Measured(errors.detach(), act.l0.detach()[None], act.l1.detach()[None]), residual


def _activated(group: Group, weights: Weights, x_c: Tensor) -> tuple[dense.Activated, Tensor]:
    """f = activation(x·W_enc + b_enc), and the penalty of each latent without its coefficient: L0
    of JumpReLU, L1 of ReLU."""
    z, bias = dense.product(x_c, weights.W_enc[0].T, group.bf16), weights.b_enc[0]
    activation = group.activations[0]
    if isinstance(activation, JumpRelu):
        assert weights.log_threshold is not None
        act = dense.jump_relu(z, bias, weights.log_threshold[0], activation.kernel_width)
        return act, act.l0
    act = dense.relu(z, bias)
    return act, act.l1


def _sparse_chunks(
    group: Group, x: Tensor, codes: Codes, residual: bool
) -> Iterator[tuple[Measured, Tensor | None]]:
    """The same for members with sparse codes. The residual is given if it is wanted."""
    start = 0
    for x_c in x.split(group.chunk):
        # A group of more than one member has one chunk only.
        own = codes.rows(start, start + x_c.shape[0]) if len(group) == 1 else codes
        start += x_c.shape[0]
        yield sparse_step.chunk_gradients(
            group.weights,
            group.grads,
            group.prefixes,
            x_c,
            own,
            1 / (group.n_tokens * x.shape[1]),
            residual=residual,
            triton=group.triton,
            bf16=group.bf16,
        )


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
            Dead(dead.candidates[g], dead.mask[g]),
            objective.k_aux or default_k_aux(x.shape[1]),
            variance * objective.aux_coeff,
            How(group.chunk, group.bf16, group.triton),
        )
    return aux


def _codes(group: Group, x: Tensor) -> Codes | None:
    """Sparse codes of the batch, or None for activations that are computed densely."""
    match group.activations[0]:
        case TopK():
            top_k = [a.top_k for a in group.activations if isinstance(a, TopK)]
            return encode.top_k_codes(
                group.weights, x, top_k, group.chunk, group.bf16, triton=group.triton
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
