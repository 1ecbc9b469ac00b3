"""Figures of latents that need the decoder only: norms, neighbours and a map of directions."""

import typing as tp

import numpy as np
import scipy.linalg
import torch

from saev.nn.sae import SparseAutoencoder

N_NEIGHBOURS = 10
_CHUNK = 512


class Directions(tp.NamedTuple):
    """Norm, neighbours and place on the map of every latent."""

    norms: np.ndarray
    """Norm of each decoder row, float32 [d_sae]."""
    neighbours: np.ndarray
    """The latents whose decoder rows have the highest cosine with each one's, best first, int32
    [d_sae, n]."""
    cosines: np.ndarray
    """These cosines, float32 [d_sae, n]."""
    layout: np.ndarray
    """Place on a map, float32 [d_sae, 2]."""


@torch.no_grad()
def directions(sae: SparseAutoencoder) -> Directions:
    """Compute norms, neighbours and map. This runs on the CPU, also for an SAE on a GPU.

    The map has the first two principal components of the normalised decoder rows. They are exact,
    quick for any width, and need no seed. All machines give the same ones, apart from rounding. A
    neighbour embedding such as UMAP has none of these properties.
    """
    norms, unit = _normalised(sae)
    which, cosines = _nearest(unit, N_NEIGHBOURS)
    return Directions(
        norms.numpy(),
        which,
        cosines,
        _principal(unit.double().numpy()),
    )


@torch.no_grad()
def neighbours(sae: SparseAutoencoder, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The latents whose decoder rows have the highest cosine with each one's, best first.

    Args:
        sae: any SAE.
        n: number of neighbours; fewer if the SAE has fewer other latents.

    Returns:
        The latents, int32 [d_sae, n], and the cosines, float32 [d_sae, n].
    """
    return _nearest(_normalised(sae)[1], n)


def _normalised(sae: SparseAutoencoder) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of each decoder row, and the rows divided by it, float32 on the CPU."""
    rows = sae.W_dec.detach().float().cpu()
    norms = rows.norm(dim=1)
    return norms, rows / norms.clamp_min(1e-30)[:, None]


def _nearest(unit: torch.Tensor, n: int) -> tuple[np.ndarray, np.ndarray]:
    k = min(n, len(unit) - 1)
    found, cosines = [], []
    for start in range(0, len(unit), _CHUNK):
        similar = unit[start : start + _CHUNK] @ unit.T
        own = torch.arange(len(similar))
        similar[own, own + start] = -2.0
        best, which = largest(similar, k)
        found.append(which)
        cosines.append(best.clamp(-1.0, 1.0))
    return torch.cat(found).int().numpy(), torch.cat(cosines).numpy()


def largest(similar: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest of each row and their indices, descending. Equal ones come by index."""
    values, index = similar.topk(k, dim=1)
    by_index = index.sort(dim=1)
    values = values.gather(1, by_index.indices)
    order = values.sort(dim=1, descending=True, stable=True)
    return order.values, by_index.values.gather(1, order.indices)


def _principal(unit: np.ndarray) -> np.ndarray:
    """The first two principal components of the rows, float32 [n, 2].

    An axis has the sign with which its entry of the largest magnitude is positive.
    """
    centred = unit - unit.mean(axis=0)
    n, width = min(2, unit.shape[1]), unit.shape[1]
    _, axes = scipy.linalg.eigh(centred.T @ centred, subset_by_index=[width - n, width - 1])
    found = np.zeros((len(unit), 2), dtype=np.float32)
    for column in range(n):
        axis = axes[:, -1 - column]
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        found[:, column] = centred @ axis
    return found
