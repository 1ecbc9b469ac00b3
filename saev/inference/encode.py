"""One step: activations in, sparse codes and reconstruction out."""

import typing as tp

import numpy as np
import torch
from torch import Tensor

from saev.config.sae import TopK
from saev.nn.sae import SparseAutoencoder
from saev.nn.sparse import sum_bags

_SPARSE_BELOW = 1 / 32
"""Density below which adding up decoder rows beats a dense product."""


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
    k = _top_k(sae)
    if k is not None and k < _SPARSE_BELOW * sae.d_sae:
        row_nnz, latents, values = _top_codes(sae, x, k)
        acts = None
    else:
        acts = sae.encode(x).acts
        rows, latents = acts.nonzero(as_tuple=True)
        values = acts[rows, latents]
        row_nnz = torch.bincount(rows, minlength=len(x))
        latents = latents.int()
    if acts is None or len(values) < _SPARSE_BELOW * acts.numel():
        ptr = torch.zeros(len(x) + 1, dtype=torch.int32, device=x.device)
        torch.cumsum(row_nnz, 0, out=ptr[1:])
        x_hat = sum_bags(sae.W_dec, latents, values, ptr) + sae.b_dec
    else:
        x_hat = sae.decode(acts)
    return Encoded(row_nnz.cpu().numpy(), latents.cpu().numpy(), values.cpu().numpy(), x_hat)


def _top_k(sae: SparseAutoencoder) -> int | None:
    """Most latents that can be active on a token, if the activation function says so."""
    activation = sae.cfg.activation
    return activation.top_k if isinstance(activation, TopK) else None


def _top_codes(sae: SparseAutoencoder, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of `sae.encode`, without the dense matrix that `SparseAutoencoder` puts them into.

    Returns:
        Active latents per token [n], active latents [nnz] ascending in each token, their values.
    """
    z = x @ sae.W_enc + sae.b_enc
    top = z.topk(k, dim=-1, sorted=False)
    ascending = top.indices.int().sort(dim=-1)
    values = top.values.gather(-1, ascending.indices)
    assert isinstance(sae.cfg.activation, TopK)
    active = values > 0 if sae.cfg.activation.rectify else values != 0
    return active.sum(-1), ascending.values[active], values[active]


@torch.no_grad()
def count_fires(sae: SparseAutoencoder, x: Tensor) -> np.ndarray:
    """Tokens on which each latent fires, int64 [d_sae]."""
    return (sae.encode(x.to(sae.W_enc.device)).acts != 0).sum(0).cpu().numpy()
