"""One step: activations in, sparse codes and reconstruction out."""

import typing as tp

import numpy as np
import torch
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
    """What one step gives."""

    row_nnz: np.ndarray
    """Active latents per token, int64 [n]."""
    latents: np.ndarray
    """Active latents, token after token, int32 [nnz]."""
    values: np.ndarray
    """Their values, float32 [nnz]."""
    x_hat: Tensor
    """Reconstruction, [n, d_model], on the SAE's device."""


@torch.no_grad()
def encode(sae: SparseAutoencoder, x: Tensor) -> Encoded:
    """Encode and decode some tokens.

    Args:
        sae: the SAE.
        x: activations as recorded, [n, d_model], on the SAE's device.
    """
    rows = len(x) if x.is_cuda else max(64, _CHUNK_BYTES // sae.b_enc.nbytes)
    parts = [_encode_chunk(sae, x_c) for x_c in x.to(sae.W_enc.dtype).split(max(1, rows))]
    row_nnz, latents, values, x_hat = (torch.cat(side) for side in zip(*parts, strict=True))
    return Encoded(row_nnz.cpu().numpy(), latents.cpu().numpy(), values.cpu().numpy(), x_hat)


def _encode_chunk(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Active latents per token [n]; active latents [nnz], ascending in each token, and their
    values; the reconstruction [n, d_model]."""
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
            return row_nnz, latents, values, sae.decode(acts)
    ptr = torch.zeros(len(x) + 1, dtype=torch.int32, device=x.device)
    torch.cumsum(row_nnz, 0, out=ptr[1:])
    return row_nnz, latents, values, sum_bags(sae.W_dec, latents, values, ptr) + sae.b_dec


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


@torch.no_grad()
def count_fires(sae: SparseAutoencoder, x: Tensor) -> np.ndarray:
    """Tokens on which each latent fires, int64 [d_sae]."""
    return np.bincount(encode(sae, x.to(sae.W_enc.device)).latents, minlength=sae.d_sae)
