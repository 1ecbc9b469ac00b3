"""Figures of latents that need the decoder only: norms, neighbours and a map of directions."""

import typing as tp

import numpy as np
import scipy.linalg
import torch

from saev.errors import ConfigError
from saev.nn.io.load import load_sae
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


class Matches(tp.NamedTuple):
    """The latents of another SAE that are nearest to each latent of an SAE."""

    latents: np.ndarray
    """Latents of the other SAE, best first, int32 [d_sae, n]."""
    cosines: np.ndarray
    """Cosines of their decoder rows with the latent's, float32 [d_sae, n]."""


@torch.no_grad()
def matches(
    run: str | SparseAutoencoder, other: str | SparseAutoencoder, n: int = N_NEIGHBOURS
) -> Matches:
    """The latents of another SAE whose decoder rows have the highest cosine with each one's.

    They say something where both SAEs read the same activations: the same layer of the same model.
    All pairs are compared, a few hundred latents at a time.

    Args:
        run: URL of a run or of an SAE, as `load_sae` takes it, or the SAE itself.
        other: the same of the other one.
        n: number of latents; fewer if the other SAE has fewer.

    Raises:
        ConfigError: the SAEs read activations of different widths, or ``n`` is below 1.
        StorageError: there is no such SAE.
    """
    if n < 1:
        raise ConfigError(f"n is {n}, expected at least 1 latent.")
    first, second = (load_sae(one) if isinstance(one, str) else one for one in (run, other))
    if first.d_model != second.d_model:
        names = (one if isinstance(one, str) else "the SAE" for one in (run, other))
        widths = " and ".join(
            f"{name} has {sae.d_model}" for name, sae in zip(names, (first, second), strict=True)
        )
        raise ConfigError(
            f"The latents of SAEs of different widths cannot be compared: {widths}. Choose SAEs "
            "that read the same activations."
        )
    return Matches(*_nearest(_normalised(first)[1], n, _normalised(second)[1]))


def _normalised(sae: SparseAutoencoder) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of each decoder row, and the rows divided by it, float32 on the CPU."""
    rows = sae.W_dec.detach().float().cpu()
    norms = rows.norm(dim=1)
    return norms, rows / norms.clamp_min(1e-30)[:, None]


def _nearest(
    unit: torch.Tensor, n: int, others: torch.Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of other rows, or of the same ones without the row itself."""
    among = unit if others is None else others
    k = min(n, len(among) - (others is None))
    found, cosines = [], []
    for start in range(0, len(unit), _CHUNK):
        similar = unit[start : start + _CHUNK] @ among.T
        if others is None:
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
