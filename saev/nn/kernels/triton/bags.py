"""Weighted sums of rows, where one bag may have a thousand times more rows than another.

The gradient of a decoder's row is a sum over the tokens on which its latent is active. A latent
that is active on every second token would keep one program busy long after all others have ended.
So a bag is cut into pieces of fixed length, and the sums of the pieces are added in their order.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saev.nn.kernels.sparse import ByLatent, Sums
from saev.nn.kernels.triton.decode import n_warps

PIECE = 256
"""Entries of a piece."""
_ENTRIES = 8


@triton.jit
def _piece(
    table_ptr, order_ptr, source_ptr, weights_ptr, first, last, n_columns, per_row, n_rows,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    weights = tl.zeros([ENTRIES], dtype=tl.float32)
    positive = tl.zeros([ENTRIES], dtype=tl.int32)
    for start in range(first, last, ENTRIES):
        number = start + tl.arange(0, ENTRIES)
        inside = number < last
        entry = tl.load(order_ptr + number, mask=inside, other=0)
        weight = tl.load(weights_ptr + entry, mask=inside, other=0.0).to(tl.float32)
        row = tl.load(source_ptr + entry, mask=inside, other=0) // per_row % n_rows
        used = (weight != 0.0)[:, None] & (column < n_columns)[None, :]  # NaN is used
        place = row.to(tl.int64)[:, None] * n_columns + column[None, :]
        rows = tl.load(table_ptr + place, mask=used, other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * rows, 0)
        weights += weight
        positive += (weight > 0.0).to(tl.int32)
    return total, tl.sum(weights, 0), tl.sum(positive, 0).to(tl.float32)


@triton.jit
def _pieces(
    table_ptr, order_ptr, source_ptr, weights_ptr, ptr_ptr, slots_ptr, bag_ptr, out_ptr, sums_ptr,
    n_bags, n_columns, per_row, n_rows,
    PIECE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    bag = tl.load(bag_ptr + slot)
    if bag < n_bags:  # there are more programs than pieces
        first = tl.load(ptr_ptr + bag) + (slot.to(tl.int32) - tl.load(slots_ptr + bag)) * PIECE
        last = tl.minimum(first + PIECE, tl.load(ptr_ptr + bag + 1))
        total, weights, n_positive = _piece(
            table_ptr, order_ptr, source_ptr, weights_ptr, first, last, n_columns, per_row, n_rows,
            ENTRIES, BLOCK,
        )  # fmt: skip
        column = tl.arange(0, BLOCK)
        tl.store(out_ptr + slot * n_columns + column, total, mask=column < n_columns)
        tl.store(sums_ptr + 2 * slot, weights)
        tl.store(sums_ptr + 2 * slot + 1, n_positive)


@triton.jit
def _bags(
    table_ptr, order_ptr, source_ptr, weights_ptr, ptr_ptr, slots_ptr, pieces_ptr, piece_sums_ptr,
    out_ptr, out_weights_ptr, out_positive_ptr, n_columns, per_row, n_rows,
    PIECE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    first = tl.load(ptr_ptr + bag)
    last = tl.load(ptr_ptr + bag + 1)
    column = tl.arange(0, BLOCK)
    within = column < n_columns
    whole = tl.where(last - first > PIECE, first, last)  # up to here this program adds entries
    total, weights, n_positive = _piece(
        table_ptr, order_ptr, source_ptr, weights_ptr, first, whole, n_columns, per_row, n_rows,
        ENTRIES, BLOCK,
    )  # fmt: skip
    slot = tl.load(slots_ptr + bag)
    pieces_ptr += slot.to(tl.int64) * n_columns
    piece_sums_ptr += slot.to(tl.int64) * 2
    for _ in range(slot, tl.load(slots_ptr + bag + 1)):
        total += tl.load(pieces_ptr + column, mask=within, other=0.0)
        weights += tl.load(piece_sums_ptr)
        n_positive += tl.load(piece_sums_ptr + 1)
        pieces_ptr += n_columns
        piece_sums_ptr += 2
    if first < last:
        out = tl.load(out_ptr + bag * n_columns + column, mask=within, other=0.0)
        tl.store(out_ptr + bag * n_columns + column, out + total, mask=within)
    tl.store(out_weights_ptr + bag, weights)
    tl.store(out_positive_ptr + bag, n_positive)


def add_bags(
    out: Float[Tensor, "bags d"],
    table: Float[Tensor, "rows d"],
    grouped: ByLatent,
    source: Int[Tensor, " nnz"],
    weights: Float[Tensor, " nnz"],
    per_row: int | None = None,
) -> Sums:
    """:func:`saev.nn.kernels.sparse.add_bags` of a table in any float dtype, with sums in float32.

    An entry of weight 0 is left out, even if its row is not finite.
    """
    n_bags, n_columns = out.shape
    lengths = grouped.ptr.diff()
    n_pieces = torch.where(lengths > PIECE, (lengths + PIECE - 1) // PIECE, 0)
    slots = torch.zeros_like(grouped.ptr)
    torch.cumsum(n_pieces, 0, dtype=torch.int32, out=slots[1:])
    # A bag that is longer than a piece has fewer pieces than twice its length divided by PIECE. So
    # the number of slots is known without waiting for the device.
    n_slots = 2 * weights.shape[0] // PIECE + 1
    number = torch.arange(n_slots, device=out.device, dtype=torch.int32)
    bag = torch.searchsorted(slots, number, right=True, out_int32=True) - 1
    pieces = torch.empty(n_slots, n_columns, dtype=torch.float32, device=out.device)
    piece_sums = torch.empty(n_slots, 2, dtype=torch.float32, device=out.device)
    sums = Sums(*torch.empty(2, n_bags, dtype=torch.float32, device=out.device))
    block = triton.next_power_of_2(n_columns)
    common = (n_columns, per_row or 1, table.shape[0])
    shape = {"PIECE": PIECE, "ENTRIES": _ENTRIES, "BLOCK": block, "num_warps": n_warps(block)}
    inputs = (table, grouped.order, source, weights, grouped.ptr, slots)
    _pieces[(n_slots,)](*inputs, bag, pieces, piece_sums, n_bags, *common, **shape)
    _bags[(n_bags,)](*inputs, pieces, piece_sums, out, *sums, *common, **shape)
    return sums
