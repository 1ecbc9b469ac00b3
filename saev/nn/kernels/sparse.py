"""Sparse codes: encoder and decoder use k rows of the weights per token instead of d_sae.

A batch of codes is stored as compressed sparse rows (CSR): the latents of row r, in ascending
order, are entries ``row_ptr[r]:row_ptr[r+1]``. All operations use ``embedding_bag``, a weighted sum
of table rows per bag. In the forward pass a bag is a token and the table is W_dec. For the gradient
of the decoder a bag is a latent and the table is the gradient of the reconstruction.

One thread sums a bag in the order of its entries, so on CPU the bits do not depend on the number of
threads. It is 7 times faster than a dense product for 32 of 1536 latents (benchmarks/training.py).

:func:`decode` and :func:`add_bags` are also in :mod:`saev.nn.kernels.triton`, for GPUs.
"""

import typing as tp

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saev.nn.kernels.errors import nested_errors_, nested_gradients_


class Codes(tp.NamedTuple):
    """Sparse latents of some rows (tokens)."""

    values: Float[Tensor, " nnz"]
    """Latent values."""
    latents: Int[Tensor, " nnz"]
    """Table row (latent) of each value, int32, ascending within a row."""
    row_ptr: Int[Tensor, " rows_plus_1"]
    """int32. The entries of row r are row_ptr[r] : row_ptr[r+1]."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.row_ptr.shape[0] - 1

    def rows(self, start: int, stop: int) -> "Codes":
        """The codes of rows start:stop."""
        if start == 0 and stop == self.n_rows:
            return self
        first, last = int(self.row_ptr[start]), int(self.row_ptr[stop])
        return Codes(
            self.values[first:last],
            self.latents[first:last],
            self.row_ptr[start : stop + 1] - first,
        )


class ByLatent(tp.NamedTuple):
    """Entries grouped by latent instead of by row."""

    order: Int[Tensor, " nnz"]
    """Numbers of the entries, sorted by latent."""
    latents: Int[Tensor, " nnz"]
    """Their latents, ascending."""
    ptr: Int[Tensor, " d_sae_plus_1"]
    """int32. The entries of latent s are order[ptr[s] : ptr[s+1]]."""


def group_by_latent(latents: Int[Tensor, " nnz"], n_latents: int) -> ByLatent:
    """Group entries by latent. The entries of a latent stay in the order of rows."""
    ordered, order = torch.sort(latents, stable=True)
    edges = torch.arange(n_latents + 1, device=latents.device, dtype=latents.dtype)
    return ByLatent(order, ordered, torch.searchsorted(ordered, edges, out_int32=True))


def bag_of_entry(ptr: Int[Tensor, " bags_plus_1"], n_entries: int) -> Int[Tensor, " nnz"]:
    """Number of the bag of each entry (int32)."""
    bags = torch.arange(ptr.shape[0] - 1, device=ptr.device, dtype=torch.int32)
    return bags.repeat_interleave(ptr.diff(), output_size=n_entries)


def sum_bags(
    table: Float[Tensor, "rows d"],
    entries: Int[Tensor, " nnz"],
    weights: Float[Tensor, " nnz"],
    ptr: Int[Tensor, " bags_plus_1"],
) -> Float[Tensor, "bags d"]:
    """Σ weights·table[entries] of each bag. Not differentiable."""
    with torch.no_grad():
        return F.embedding_bag(
            entries, table, ptr, mode="sum", per_sample_weights=weights, include_last_offset=True
        )


class Decoded(tp.NamedTuple):
    """What a chunk of tokens gives. The gradients are those of Σ_j w_j·‖e_j‖² over the rows."""

    errors: Float[Tensor, "rows p"]
    """‖e_j‖² of each row (member, token)."""
    residual: Float[Tensor, "rows d"] | None
    """x - x̂ of all latents; None if it is not wanted."""
    grads: Float[Tensor, "rows p d"]
    """Gradients of each block of latents. Only those that an entry's ``source`` names, and those of
    the first block, have a value."""
    source: Int[Tensor, " nnz"]
    """Which gradient belongs to each entry: row·P + block, int32."""
    grad_values: Float[Tensor, " nnz"]
    """Gradients of the codes; 0 where the value is 0."""


def decode(
    codes: Codes,
    table: Float[Tensor, "g*s d"],
    b_dec: Float[Tensor, "g d"],
    x: Float[Tensor, "c d"],
    lengths: Int[Tensor, "g p"],
    weights: Float[Tensor, "g p"],
    *,
    residual: bool,
) -> Decoded:
    """Reconstruct a chunk of tokens for g members: x̂_j = b_dec + the rows of the latents below p_j,
    and e_j = x̂_j - x.

    Args:
        codes: of g·c rows, ordered by member; table rows are member·s + latent, ascending in a row.
        table: decoders.
        b_dec: their biases.
        x: the target, the same for all members. A rank's share may have no rows.
        lengths: p_j of each member; the last is s.
        weights: w_j of each member.
        residual: whether the residual is wanted.
    """
    n_members, n_p = lengths.shape
    ptr = _block_ptr(codes, lengths, x.shape[0], table.shape[0] // n_members)
    source = bag_of_entry(ptr, codes.latents.shape[0])
    rows = sum_bags(table, codes.latents, codes.values, ptr)
    blocks = rows.view(n_members, x.shape[0], n_p, x.shape[1])
    errors = nested_errors_(blocks, b_dec, x)
    rest = -blocks[:, :, -1].flatten(0, 1) if residual else None
    nested_gradients_(blocks, 2 * weights)
    grad_values = _dot_rows(rows, table, codes.latents, ptr, source)
    return Decoded(
        errors=errors.flatten(0, 1),
        residual=rest,
        grads=blocks.flatten(0, 1),
        source=source,
        grad_values=grad_values.masked_fill_(codes.values == 0, 0),
    )


def _dot_rows(
    grads: Float[Tensor, "bags d"],
    table: Float[Tensor, "rows d"],
    entries: Int[Tensor, " nnz"],
    ptr: Int[Tensor, " bags_plus_1"],
    bags: Int[Tensor, " nnz"],
) -> Float[Tensor, " nnz"]:
    """Dot product of each entry's table row and its bag's gradient, as autograd computes it for the
    weights of :func:`sum_bags`."""
    if not entries.shape[0]:
        return grads.new_zeros(0)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grads, table, entries, ptr, bags, 0
    )


def _block_ptr(
    codes: Codes, lengths: Int[Tensor, "g p"], n_tokens: int, n_latents: int
) -> Int[Tensor, " bags_plus_1"]:
    """First entry of each block of latents of each row, ordered by (member, row, block)."""
    n_g, n_p = lengths.shape
    if n_p == 1:
        return codes.row_ptr
    device = codes.latents.device
    row = bag_of_entry(codes.row_ptr, codes.latents.shape[0])
    # Entries are in ascending order of this key, because table rows begin at member·n_latents.
    key = row.to(torch.int64) * (n_g * n_latents) + codes.latents
    first = torch.arange(n_g * n_tokens, device=device) * (n_g * n_latents)
    member = torch.arange(n_g, device=device).repeat_interleave(n_tokens) * n_latents
    bounds = (first + member)[:, None] + lengths.repeat_interleave(n_tokens, dim=0)
    starts = torch.searchsorted(key, bounds[:, :-1].contiguous(), out_int32=True)
    starts = torch.cat([codes.row_ptr[:-1, None], starts], dim=1)
    return torch.cat([starts.flatten(), codes.row_ptr[-1:]])


class Sums(tp.NamedTuple):
    """Of the weights of each bag."""

    weights: Float[Tensor, " bags"]
    """Σ of the weights."""
    n_positive: Float[Tensor, " bags"]
    """Number of weights above 0."""


def add_bags(
    out: Float[Tensor, "bags d"],
    table: Float[Tensor, "rows d"],
    grouped: ByLatent,
    source: Int[Tensor, " nnz"],
    weights: Float[Tensor, " nnz"],
    per_row: int | None = None,
) -> Sums:
    """Add Σ weight·row of each bag's entries to ``out``.

    Args:
        out: of the dtype of the table.
        table: rows.
        grouped: the entries of each bag.
        source: int32; the table's row of an entry, or a number from which it is computed.
        weights: of the entries.
        per_row: if given, the table's row of an entry is source // per_row % rows.
    """
    weight, row = weights[grouped.order], source[grouped.order]
    if per_row is not None:
        row = (row if per_row == 1 else row.div(per_row, rounding_mode="floor")) % len(table)
    out += sum_bags(table, row, weight, grouped.ptr)
    zero = weight.new_zeros(len(out))
    return Sums(
        zero.index_add(0, grouped.latents, weight),
        zero.index_add(0, grouped.latents, weight.sign().clamp_(min=0)),
    )
