"""Gradients of a group of members of a bank on one batch: codes, reconstruction, AuxK."""

import typing as tp

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saev.config.sae import Activation, BatchTopK, JumpRelu, Objective, TopK
from saev.device import upload
from saev.nn import encode, gradients, sparse
from saev.nn.gradients import Weights
from saev.nn.objectives import Prefixes, default_k_aux
from saev.nn.ranks import Ranks


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
    """Add the gradients of a group's loss (:mod:`saev.nn.objectives`) to ``group.grads``.

    Args:
        group: the members.
        x: normalised activations.
        dead: the group's; None if none can be.
        variance: v of the AuxK term.
    """
    codes = _codes(group, x)
    reviving = _reviving(group, dead)
    sums: gradients.Totals | None = None
    residuals = []
    for start in range(0, max(1, x.shape[0]), group.chunk):
        x_c = x[start : start + group.chunk]
        if codes is None:
            part, residual = _dense_chunk(group, x_c, group.n_tokens)
        else:
            rows = codes.rows(start, start + x_c.shape[0]) if len(group) == 1 else codes
            part, residual = gradients.sparse_chunk(
                group.weights, group.grads, x_c, rows, group.prefixes, group.n_tokens
            )
        if reviving:
            residuals.append(residual)
        sums = part if sums is None else gradients.Totals(*map(torch.add, sums, part))
    assert sums is not None
    aux = torch.zeros(len(group), dtype=x.dtype, device=x.device)
    whole = [torch.cat([r[g] for r in residuals]) for g in reviving]
    energies = [gradients.total(gradients.squared_norm(residual)) for residual in whole]
    group.ranks.add_(*energies)
    for g, residual, energy in zip(reviving, whole, energies, strict=True):
        assert dead is not None
        aux[g] = gradients.aux_k(
            group.weights.member(g),
            group.grads.member(g),
            x,
            residual,
            energy,
            dead.candidates[g],
            dead.mask[g],
            group.objectives[g].k_aux or default_k_aux(x.shape[1]),
            variance * group.objectives[g].aux_coeff,
            group.chunk,
        )
    return GroupSums(
        mse=(sums.error * group.prefixes.weights).sum(-1),
        error=sums.error[:, -1],
        n_active=sums.n_active,
        l0=gradients.total(sums.n_active),
        l1=gradients.total(sums.value),
        aux=aux,
    )


def _dense_chunk(group: Group, x_c: Tensor, n_tokens: int) -> tuple[gradients.Totals, Tensor]:
    (activation,), (coeff,) = group.activations, group.coeffs
    width = activation.kernel_width if isinstance(activation, JumpRelu) else 1.0
    return gradients.dense_chunk(
        group.weights, group.grads, x_c, group.prefixes, n_tokens, coeff, width, group.bf16
    )


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
