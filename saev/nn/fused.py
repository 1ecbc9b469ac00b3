"""Forward, losses and backward of TopK and BatchTopK members by the kernels for GPUs.

It is what :mod:`saev.nn.group` does by autograd, with four passes over the active rows of the
decoder and of the batch. Import it on a machine that has Triton only.
"""

import typing as tp

import torch
from jaxtyping import Float
from torch import Tensor

from saev.nn.kernels.errors import total
from saev.nn.kernels.sparse import Codes, group_by_latent
from saev.nn.kernels.triton.bags import add_bags
from saev.nn.kernels.triton.decode import decode
from saev.nn.objectives import Prefixes
from saev.nn.weights import Weights


class Measured(tp.NamedTuple):
    """Sums over the rows of a chunk, per member."""

    errors: Float[Tensor, "g p"]
    """Σ ‖x - x̂_j‖²."""
    n_active: Float[Tensor, "g s"]
    """Tokens on which each latent is active."""
    value: Float[Tensor, "g s"]
    """Σ f of each latent."""


def chunk_gradients(
    weights: Weights,
    grads: Weights,
    prefixes: Prefixes,
    x: Float[Tensor, "c d"],
    codes: Codes,
    scale: float,
    bf16: bool,
    residual: bool,
) -> tuple[Measured, Tensor | None]:
    """Add the gradients of scale·Σ_j weight_j·‖x - x̂_j‖² to ``grads``.

    Args:
        weights: of the members.
        grads: their gradients.
        prefixes: of the members.
        x: some rows of the batch.
        codes: of these rows, ordered by member.
        scale: of the loss.
        bf16: read decoders, batch and gradients of reconstructions in bfloat16; sums are float32.
        residual: whether the residual is wanted.

    Returns:
        Sums, and the residual [g, c, d].
    """
    n_members, d_sae, d_model = weights.W_dec.shape
    dtype = torch.bfloat16 if bf16 else torch.float32
    out = decode(
        codes,
        weights.W_dec.flatten(0, 1).to(dtype),
        weights.b_dec,
        x,
        prefixes.lengths,
        prefixes.weights * scale,
        dtype,
        residual=residual,
    )
    grouped = group_by_latent(codes.latents, n_members * d_sae)
    rows = out.grads.flatten(0, 1)
    used = add_bags(grads.W_dec.flatten(0, 1), rows, grouped, out.source, codes.values)
    per_token = out.grads[:, 0].view(n_members, x.shape[0], d_model)
    grads.b_dec.add_(per_token.sum(1, dtype=torch.float32))
    encoded = add_bags(
        grads.W_enc.flatten(0, 1),
        x.to(dtype),
        grouped,
        out.source,
        out.grad_values,
        per_row=prefixes.lengths.shape[1],
    )
    grads.b_enc.add_(encoded.weights.view_as(grads.b_enc))
    errors = out.errors.view(n_members, x.shape[0], -1).transpose(1, 2)
    measured = Measured(
        total(errors),
        used.n_positive.view(n_members, d_sae),
        used.weights.view(n_members, d_sae),
    )
    return measured, None if out.residual is None else out.residual.view(n_members, -1, d_model)
