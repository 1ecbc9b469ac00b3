"""Sparse codes: decoding k rows of the decoder instead of d_sae, forward and backward.

A batch of codes is compressed by rows (CSR): the latents of row r, in ascending order, are entries
``row_ptr[r]:row_ptr[r+1]``. Everything is built of ``embedding_bag``, a weighted sum of table rows
per bag: forward, a bag is a token and the table is W_dec; for the gradient of the decoder, a bag is
a latent and the table is the gradient of the reconstruction. Each bag is summed by one thread in
the order of its entries, so on CPU the bits do not depend on the number of threads; and it is 7
times faster than a dense product for 32 of 1536 latents (benchmarks/training.py).
"""

import typing as tp

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class Codes(tp.NamedTuple):
    """Sparse latents of some rows (tokens)."""

    values: Float[Tensor, " nnz"]
    """Latent values."""
    latents: Int[Tensor, " nnz"]
    """int32 table row (latent) of each value, ascending within a row."""
    row_ptr: Int[Tensor, " rows_plus_1"]
    """int32 entries of row r are row_ptr[r] : row_ptr[r+1]."""

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
    """Which entry stands at each place."""
    ptr: Int[Tensor, " d_sae_plus_1"]
    """int32 entries of latent s are at ptr[s] : ptr[s+1]."""


def group_by_latent(latents: Int[Tensor, " nnz"], n_latents: int) -> ByLatent:
    """Stable grouping, so that within a latent entries stay in row order."""
    ordered, order = torch.sort(latents, stable=True)
    edges = torch.arange(n_latents + 1, device=latents.device, dtype=latents.dtype)
    return ByLatent(order, torch.searchsorted(ordered, edges, out_int32=True))


def bag_of_entry(ptr: Int[Tensor, " bags_plus_1"], n_entries: int) -> Int[Tensor, " nnz"]:
    """Which bag each entry is in (int32)."""
    bags = torch.arange(ptr.shape[0] - 1, device=ptr.device, dtype=torch.int32)
    return bags.repeat_interleave(ptr.diff(), output_size=n_entries)


def sum_bags(
    table: Float[Tensor, "rows d"],
    entries: Int[Tensor, " nnz"],
    weights: Float[Tensor, " nnz"],
    ptr: Int[Tensor, " bags_plus_1"],
) -> Float[Tensor, "bags d"]:
    """Per bag, Σ weights·table[entries]. Not differentiable; see :func:`sum_bags_vjp`."""
    with torch.no_grad():
        return F.embedding_bag(
            entries, table, ptr, mode="sum", per_sample_weights=weights, include_last_offset=True
        )


def sum_bags_vjp(
    table: Float[Tensor, "rows d"],
    entries: Int[Tensor, " nnz"],
    weights: Float[Tensor, " nnz"],
    ptr: Int[Tensor, " bags_plus_1"],
) -> tuple[Tensor, tp.Callable[[Tensor], Tensor]]:
    """:func:`sum_bags`, and the function that turns its gradient into that of the weights:
    the dot product of each entry's table row with its bag's gradient."""
    with torch.enable_grad():
        leaf = weights.detach().requires_grad_()
        out = F.embedding_bag(
            entries,
            table.detach(),
            ptr,
            mode="sum",
            per_sample_weights=leaf,
            include_last_offset=True,
        )

    def pull_back(grad: Tensor) -> Tensor:
        if not leaf.numel():
            return torch.zeros_like(leaf)
        return torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]

    return out.detach(), pull_back


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: tp.Any, values: Tensor, w_dec: Tensor, latents: Tensor, row_ptr: Tensor
    ) -> Tensor:
        out, ctx.pull_back = sum_bags_vjp(w_dec, latents, values, row_ptr)
        ctx.save_for_backward(values, latents, row_ptr)
        ctx.n_latents = w_dec.shape[0]
        return out

    @staticmethod
    def backward(ctx: tp.Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        values, latents, row_ptr = ctx.saved_tensors
        grad = grad.contiguous()
        grad_w = None
        if ctx.needs_input_grad[1]:
            grouped = group_by_latent(latents, ctx.n_latents)
            rows = bag_of_entry(row_ptr, latents.shape[0])[grouped.order]
            grad_w = sum_bags(grad, rows, values[grouped.order], grouped.ptr)
        return ctx.pull_back(grad), grad_w, None, None


def decode(codes: Codes, w_dec: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, "rows d_model"]:
    """f·W_dec for sparse f; differentiable in the values and in W_dec, both sparsely."""
    return tp.cast(Tensor, _Decode.apply(codes.values, w_dec, codes.latents, codes.row_ptr))
