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
    rows = len(x) if x.is_cuda else max(64, _CHUNK_BYTES // sae.b_enc.nbytes)
    parts = [_encode_chunk(sae, x_c) for x_c in x.to(sae.W_enc.dtype).split(max(1, rows))]
    return parts[0] if len(parts) == 1 else Encoded(*map(torch.cat, zip(*parts, strict=True)))


def _encode_chunk(sae: SparseAutoencoder, x: Tensor) -> Encoded:
    z = torch.addmm(sae.b_enc, x, sae.W_enc)
    k = _top_k(sae)
    if k is not None and k < _SPARSE_BELOW * sae.d_sae:
        row_nnz, latents, values = _top_codes(sae, z, k)
    else:
        acts = sae.activate(z)
        rows, latents = acts.nonzero(as_tuple=True)
        values = acts[rows, latents]
        row_nnz = torch.bincount(rows, minlength=len(x))
        latents = latents.int()
        if len(values) >= _SPARSE_BELOW * acts.numel():
            return Encoded(row_nnz, latents, values, sae.decode(acts))
    ptr = torch.zeros(len(x) + 1, dtype=torch.int32, device=x.device)
    torch.cumsum(row_nnz, 0, out=ptr[1:])
    x_hat = sum_bags(sae.W_dec, latents, values, ptr).add_(sae.b_dec)
    return Encoded(row_nnz, latents, values, x_hat)


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
    return active.sum(-1), ascending.values[active], values[active]
