"""The k largest values of each row, without sorting and without a transposed copy."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

MOST_LATENTS = 16_384
"""Of a row that one program keeps in registers. Twice as many spill."""
_LOW_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Bits of a float32 that are zero in every value of the narrower type."""


@triton.jit
def _keys(z, LOW: tl.constexpr):
    """Integers in the order of z. NaN is the largest, and -0 equals 0."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(z != z, 0x7FFFFFFF, keys) >> LOW


@triton.jit
def _kth_largest(keys, k, LOW: tl.constexpr):
    """The k-th largest key, bit by bit from the highest."""
    n_positive = tl.sum((keys >= 0).to(tl.int32), 0)
    found = tl.where(n_positive >= k, 0, -1 << (31 - LOW)).to(tl.int32)
    for bit in range(31 - LOW):
        candidate = found + (1 << (30 - LOW - bit))
        n_reaching = tl.sum((keys >= candidate).to(tl.int32), 0)
        found = tl.where(n_reaching >= k, candidate, found)
    return found


@triton.jit
def _top_k(
    z_ptr, k_ptr, values_ptr, latents_ptr, n_tokens, n_latents, stride_token, stride_member,
    K: tl.constexpr, LOW: tl.constexpr, SAME: tl.constexpr, RECTIFY: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    member = row // n_tokens
    z_ptr += (row % n_tokens) * stride_token + member * stride_member
    column = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + column, mask=column < n_latents, other=0.0).to(tl.float32)
    # Smaller than the key of any number, so padding is never selected.
    keys = tl.where(column < n_latents, _keys(z, LOW), -1 << (31 - LOW))
    kth = _kth_largest(keys, K, LOW)
    n_equal = K - tl.sum((keys > kth).to(tl.int32), 0)  # of the values equal to the k-th largest
    if not SAME:
        own_k = tl.load(k_ptr + member)
        own_kth = _kth_largest(keys, own_k, LOW)
        own_equal = own_k - tl.sum((keys > own_kth).to(tl.int32), 0)

    # The row is read again, because keys and places together do not fit into the registers.
    above_before = 0
    equal_before = 0
    own_before = 0
    for start in range(0, n_latents, TILE):
        latent = start + tl.arange(0, TILE)
        value = tl.load(z_ptr + latent, mask=latent < n_latents, other=0.0).to(tl.float32)
        key = tl.where(latent < n_latents, _keys(value, LOW), -1 << (31 - LOW))
        above = (key > kth).to(tl.int32)
        equal = (key == kth).to(tl.int32)
        # Both counts in one scan; a tile has fewer than 2^16 values.
        counts = tl.cumsum(above + (equal << 16), 0)
        n_above = above_before + (counts & 0xFFFF) - above
        n_same = equal_before + (counts >> 16) - equal
        chosen = (above > 0) | ((equal > 0) & (n_same < n_equal))
        place = n_above + tl.minimum(n_same, n_equal)
        kept = value
        if RECTIFY:
            kept = tl.where(value < 0.0, 0.0, value)  # not `maximum`, which may drop NaN
        if not SAME:
            own = (key == own_kth).to(tl.int32)
            own_same = own_before + tl.cumsum(own, 0) - own
            stays = (key > own_kth) | ((own > 0) & (own_same < own_equal))
            kept = tl.where(stays, kept, 0.0)
            own_before += tl.sum(own, 0)
        tl.store(values_ptr + row * K + place, kept, mask=chosen)
        global_latent = (member * n_latents + latent).to(tl.int32)
        tl.store(latents_ptr + row * K + place, global_latent, mask=chosen)
        above_before += tl.sum(above, 0)
        equal_before += tl.sum(equal, 0)


def supports(n_latents: int, k: int) -> bool:
    """Whether :func:`top_k` can be called for rows of this length."""
    n_pieces = _n_pieces(n_latents)
    return k <= n_latents // n_pieces <= MOST_LATENTS and n_pieces * k <= MOST_LATENTS


def _n_pieces(n_latents: int) -> int:
    """Equal pieces of a row, each of which one program can select from."""
    n = 1
    while n_latents > n * MOST_LATENTS and n_latents % (2 * n) == 0:
        n *= 2
    return n


def top_k(
    z: Float[Tensor, "c g s"],
    top_k: Int[Tensor, " g"],
    k: int,
    *,
    same: bool,
    rectify: bool = True,
) -> tuple[Float[Tensor, "g c k"], Int[Tensor, "g c k"]]:
    """The k largest of each row; of equal values the one with the lowest index.

    Args:
        z: pre-activations in float32, float16 or bfloat16, contiguous.
        top_k: int32, k of each member.
        k: the largest of these.
        same: whether all members have this k. Values that are not among a member's own k largest
            are 0.
        rectify: set negative values to 0.

    Returns:
        Values in float32 and table rows member·s + latent in int32, ascending in each row.
    """
    n_tokens, n_members, n_latents = z.shape
    n_pieces = _n_pieces(n_latents)
    if n_pieces == 1:
        return _select(z, top_k, k, same=same, rectify=rectify)
    # The k largest of a row are among the k largest of its pieces.
    cut = z.view(n_tokens, n_members * n_pieces, n_latents // n_pieces)
    parts = _select(cut, top_k, k, same=True, rectify=False)
    values, latents = (
        t.view(n_members, n_pieces, n_tokens, k).permute(2, 0, 1, 3).flatten(2) for t in parts
    )
    kept, place = _select(values.contiguous(), top_k, k, same=same, rectify=rectify)
    return kept, latents.transpose(0, 1).gather(-1, place.long() % (n_pieces * k))


def _select(
    z: Tensor, top_k: Tensor, k: int, *, same: bool, rectify: bool
) -> tuple[Tensor, Tensor]:
    n_tokens, n_members, n_latents = z.shape
    values = torch.empty(n_members, n_tokens, k, dtype=torch.float32, device=z.device)
    latents = torch.empty(n_members, n_tokens, k, dtype=torch.int32, device=z.device)
    block = triton.next_power_of_2(n_latents)
    warps = n_warps(block)
    if n_tokens:
        _top_k[(n_members * n_tokens,)](
            z, top_k, values, latents, n_tokens, n_latents, z.stride(0), z.stride(1),
            K=k, LOW=_LOW_BITS[z.dtype], SAME=same, RECTIFY=rectify, BLOCK=block,
            TILE=min(block, warps * 32), num_warps=warps,
        )  # fmt: skip
    return values, latents


def n_warps(block: int) -> int:
    """Warps of a program: 32 values per thread, or fewer."""
    return min(32, max(4, block // 1024))


def top_k_reference(
    z: Float[Tensor, "c g s"],
    top_k: Int[Tensor, " g"],
    k: int,
    *,
    same: bool,
    rectify: bool = True,
) -> tuple[Float[Tensor, "g c k"], Int[Tensor, "g c k"]]:
    """:func:`top_k` by a stable sort."""
    del same
    values, latents = z.transpose(0, 1).float().sort(dim=-1, descending=True, stable=True)
    kept = torch.arange(k, device=z.device) < top_k[:, None, None]
    values = values[..., :k]
    values = torch.where(kept, values.relu() if rectify else values, 0.0)
    ascending = latents[..., :k].sort(dim=-1)
    offset = torch.arange(z.shape[1], device=z.device)[:, None, None] * z.shape[2]
    return values.gather(-1, ascending.indices), (ascending.values + offset).to(torch.int32)
