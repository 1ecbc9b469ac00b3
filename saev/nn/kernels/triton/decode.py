"""The sparse decoder, its errors, and the gradients of codes and reconstructions, in one kernel.

With the prefixes p_1 < … < p_P and the errors e_j = x̂_j - x, where x̂_j is b_dec plus the rows of
the latents below p_j, the loss is Σ_j w_j·‖e_j‖². A row of the decoder that is part of all
reconstructions from the j-th on has the gradient Σ_{i≥j} 2·w_i·e_i. A program walks over the codes
of a token to get e_P, and back to get the other e_j again, so that no other error is kept.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saev.nn.kernels.sparse import Codes, Decoded


@triton.jit
def _decode(
    values_ptr, latents_ptr, row_ptr, table_ptr, bias_ptr, x_ptr, lengths_ptr, weights_ptr,
    errors_ptr, residual_ptr, grads_ptr, source_ptr, grad_values_ptr, n_tokens, n_latents, d_model,
    P: tl.constexpr, RESIDUAL: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    member = row // n_tokens
    column = tl.arange(0, BLOCK)
    within = column < d_model
    first = tl.load(row_ptr + row)
    last = tl.load(row_ptr + row + 1)
    base = (member * n_latents).to(tl.int32)
    error = tl.load(bias_ptr + member * d_model + column, mask=within, other=0.0).to(tl.float32)
    x_row = row % n_tokens
    error -= tl.load(x_ptr + x_row * d_model + column, mask=within, other=0.0).to(tl.float32)

    entry = first
    for block in range(P):
        end = base + tl.load(lengths_ptr + member * P + block).to(tl.int32)
        n_inside = first * 0 + ENTRIES
        while n_inside == ENTRIES:
            number = entry + tl.arange(0, ENTRIES)
            latent = tl.load(latents_ptr + number, mask=number < last, other=0)
            inside = (number < last) & (latent < end)
            value = tl.load(values_ptr + number, mask=inside, other=0.0).to(tl.float32)
            used = (value != 0.0)[:, None] & within[None, :]  # NaN is used
            place = latent.to(tl.int64)[:, None] * d_model + column[None, :]
            rows = tl.load(table_ptr + place, mask=used, other=0.0).to(tl.float32)
            error += tl.sum(value[:, None] * rows, 0)
            tl.store(source_ptr + number, (row * P + block).to(tl.int32), mask=inside)
            n_inside = tl.sum(inside.to(tl.int32), 0)
            entry += n_inside
        tl.store(errors_ptr + row * P + block, tl.sum(error * error, 0))
    if RESIDUAL:
        tl.store(residual_ptr + row * d_model + column, -error, mask=within)

    grad = tl.zeros([BLOCK], dtype=tl.float32)
    entry = last
    for back in range(P):
        block = P - 1 - back
        start = base
        if block > 0:
            start = base + tl.load(lengths_ptr + member * P + block - 1).to(tl.int32)
        grad += 2.0 * tl.load(weights_ptr + member * P + block) * error
        before = entry
        n_inside = first * 0 + ENTRIES
        while n_inside == ENTRIES:
            number = entry - 1 - tl.arange(0, ENTRIES)
            latent = tl.load(latents_ptr + number, mask=number >= first, other=0)
            inside = (number >= first) & (latent >= start)
            value = tl.load(values_ptr + number, mask=inside, other=0.0).to(tl.float32)
            used = (value != 0.0)[:, None] & within[None, :]
            place = latent.to(tl.int64)[:, None] * d_model + column[None, :]
            rows = tl.load(table_ptr + place, mask=used, other=0.0).to(tl.float32)
            tl.store(grad_values_ptr + number, tl.sum(rows * grad[None, :], 1), mask=inside)
            if P > 1:
                error -= tl.sum(value[:, None] * rows, 0)
            n_inside = tl.sum(inside.to(tl.int32), 0)
            entry -= n_inside
        if (block == 0) | (entry < before):
            place = (row * P + block) * d_model + column
            tl.store(grads_ptr + place, grad.to(grads_ptr.dtype.element_ty), mask=within)


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
    """:func:`saev.nn.kernels.sparse.decode`, with sums in float32.

    The decoders may be in any float dtype. The gradients of the blocks have the same.
    """
    n_members, n_p = lengths.shape
    n_tokens, d_model = x.shape
    n_rows = n_members * n_tokens

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    out = Decoded(
        errors=empty(n_rows, n_p),
        residual=empty(n_rows, d_model) if residual else None,
        grads=empty(n_rows, n_p, d_model, dtype=table.dtype),
        source=torch.empty_like(codes.latents),
        grad_values=empty(codes.values.shape[0]),
    )
    block = triton.next_power_of_2(d_model)
    if n_rows:
        _decode[(n_rows,)](
            codes.values, codes.latents, codes.row_ptr, table, b_dec, x, lengths, weights,
            out.errors, out.errors if out.residual is None else out.residual, out.grads,
            out.source, out.grad_values, n_tokens, table.shape[0] // n_members, d_model,
            P=n_p, RESIDUAL=residual, ENTRIES=8 if n_p == 1 else 4, BLOCK=block,
            num_warps=n_warps(block),
        )  # fmt: skip
    return out


def n_warps(block: int) -> int:
    """Warps of a program that adds rows of this length: 8 columns per thread."""
    return min(16, max(1, block // 256))
