"""Forward, losses and backward of TopK and BatchTopK members, without autograd.

There are four passes over the active rows: two in the decoder, for its errors and for the
gradients of the codes, and one each for the gradients of decoder and encoder. They are written in
torch and in Triton.
"""

import typing as tp

from jaxtyping import Float
from torch import Tensor

from saev.nn.kernels import sparse
from saev.nn.kernels.errors import total
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
    codes: sparse.Codes,
    scale: float | Tensor,
    *,
    target: Float[Tensor, "c d"] | None = None,
    residual: bool,
    triton: bool,
    bf16: bool,
) -> tuple[Measured, Tensor | None]:
    """Add the gradients of scale·Σ_j weight_j·‖target - x̂_j‖² to ``grads``.

    Args:
        weights: of the members.
        grads: their gradients.
        prefixes: of the members.
        x: some rows of the batch.
        codes: of these rows, ordered by member.
        scale: of the loss.
        target: what is reconstructed; x if it is not given.
        residual: whether the residual is wanted.
        triton: use Triton's kernels.
        bf16: with these, read decoders, batch and gradients of reconstructions in bfloat16; sums
            are float32.

    Returns:
        Sums, and the residual [g, c, d].
    """
    (n_members, d_sae, d_model), n_prefixes = weights.W_dec.shape, prefixes.lengths.shape[1]
    table, inputs = weights.W_dec.flatten(0, 1), x
    decode, add_bags = sparse.decode, sparse.add_bags
    if triton:
        from saev.nn.kernels.triton import bags
        from saev.nn.kernels.triton.decode import decode

        add_bags = bags.add_bags
        if bf16:
            table, inputs = table.bfloat16(), x.bfloat16()
    out = decode(
        codes,
        table,
        weights.b_dec,
        x if target is None else target,
        prefixes.lengths,
        prefixes.weights * scale,
        residual=residual,
    )
    grouped = sparse.group_by_latent(codes.latents, n_members * d_sae)
    used = add_bags(
        grads.W_dec.flatten(0, 1), out.grads.flatten(0, 1), grouped, out.source, codes.values
    )
    per_token = out.grads[:, 0].view(n_members, x.shape[0], d_model)
    grads.b_dec.add_(per_token.sum(1, dtype=grads.b_dec.dtype))
    encoded = add_bags(
        grads.W_enc.flatten(0, 1),
        inputs,
        grouped,
        out.source,
        out.grad_values,
        per_row=n_prefixes,
    )
    grads.b_enc.add_(encoded.weights.view_as(grads.b_enc))
    errors = out.errors.view(n_members, x.shape[0], n_prefixes).transpose(1, 2)
    measured = Measured(
        total(errors),
        used.n_positive.view(n_members, d_sae),
        used.weights.view(n_members, d_sae),
    )
    if out.residual is None:
        return measured, None
    return measured, out.residual.view(n_members, x.shape[0], d_model)
