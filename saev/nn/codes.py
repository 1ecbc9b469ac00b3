"""Sparse codes and reconstructions of one SAE: what training's evaluation and inference measure.

`SparseAutoencoder.forward` gives the same values with dense latents.
"""

import typing as tp

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saev.config.sae import TopK
from saev.nn.encode import largest
from saev.nn.kernels.sparse import sum_bags
from saev.nn.sae import SparseAutoencoder

_SPARSE_BELOW = 1 / 32
"""Density below which adding up decoder rows beats a dense product."""
_CHUNK_BYTES = 16 << 20
"""Size of the pre-activations that exist at a time, on the CPU: memory of that size is used again,
larger pieces come from the kernel page by page, which took a third of the product's time."""


class Encoded(tp.NamedTuple):
    """What an SAE makes of some tokens."""

    row_nnz: Int[Tensor, " n"]
    """Active latents per token, int64."""
    latents: Int[Tensor, " nnz"]
    """Active latents, token after token, ascending in each, int32."""
    values: Float[Tensor, " nnz"]
    """Their values."""
    x_hat: Float[Tensor, "n d_model"]
    """Reconstruction."""


@torch.no_grad()
def encode(sae: SparseAutoencoder, x: Float[Tensor, "n d_model"]) -> Encoded:
    """Encode and decode some tokens.

    The result depends on the SAE and on all of ``x``: the same tokens among others may be rounded
    differently.

    Args:
        sae: the SAE.
        x: activations as recorded, on the SAE's device.
    """
    x = x.to(sae.W_enc.dtype)
    x_hat = torch.empty_like(x)
    rows = len(x) if x.is_cuda else chunk_rows(sae)
    parts = [
        _encode_chunk(sae, *pair) for pair in zip(x.split(rows), x_hat.split(rows), strict=True)
    ]
    row_nnz, latents, values = (torch.cat(side) for side in zip(*parts, strict=True))
    return Encoded(row_nnz, latents, values, x_hat)


def chunk_rows(sae: SparseAutoencoder) -> int:
    """Tokens that are encoded at a time on the CPU."""
    return max(64, _CHUNK_BYTES // sae.b_enc.nbytes)


def select(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The codes of a chunk of tokens.

    Returns:
        Active latents per token int64 [n], active latents int32 [nnz], ascending in each token,
        their values, and the dense latents [n, d_sae] if they had to be made.
    """
    z = torch.addmm(sae.b_enc, x, sae.W_enc)
    k = _top_k(sae)
    if k is not None and k < _SPARSE_BELOW * sae.d_sae:
        return *_top_codes(sae, z, k), None
    acts = sae.activate(z)
    rows, latents = acts.nonzero(as_tuple=True)
    return torch.bincount(rows, minlength=len(x)), latents.int(), acts[rows, latents], acts


def _encode_chunk(
    sae: SparseAutoencoder, x: Tensor, x_hat: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of a chunk of tokens, as :func:`select`; writes their reconstruction."""
    row_nnz, latents, values, acts = select(sae, x)
    if acts is not None and len(values) >= _SPARSE_BELOW * acts.numel():
        x_hat.copy_(sae.decode(acts))
    else:
        ptr = torch.zeros(len(x) + 1, dtype=torch.int32, device=x.device)
        torch.cumsum(row_nnz, 0, out=ptr[1:])
        torch.add(sum_bags(sae.W_dec, latents, values, ptr), sae.b_dec, out=x_hat)
    return row_nnz, latents, values


def _top_k(sae: SparseAutoencoder) -> int | None:
    """Most latents that can be active on a token, if the activation function says so."""
    activation = sae.cfg.activation
    return activation.top_k if isinstance(activation, TopK) else None


def _top_codes(sae: SparseAutoencoder, z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of `sae.activate(z)`, without the dense matrix that it puts them into.

    Returns:
        Active latents per token [n], active latents [nnz] ascending in each token, their values.
    """
    top_values, top_latents = largest(z, k, ordered=False)
    ascending = top_latents.int().sort(dim=-1)
    values = top_values.gather(-1, ascending.indices)
    assert isinstance(sae.cfg.activation, TopK)
    # Asked this way round, NaN is kept, and the shard reported.
    active = ~(values <= 0) if sae.cfg.activation.rectify else values != 0
    if not values.is_cuda and bool(active.all()):
        return active.sum(-1), ascending.values.flatten(), values.flatten()
    return active.sum(-1), ascending.values[active], values[active]
