"""Baselines for SAEs, with the same number of coefficients per token."""

import typing as tp

import torch
from jaxtyping import Float
from torch import Tensor


class Baselines(tp.NamedTuple):
    """Normalised mean squared errors with k coefficients."""

    k: int
    """Number of coefficients per token."""
    pca: float
    """Error of the projection onto the k leading principal components."""
    random: float
    """Error with the k best-matching of d_sae random unit vectors, with least-squares
    coefficients."""


def pca_basis(acts: Float[Tensor, "n d_model"]) -> tuple[Tensor, Tensor]:
    """Mean [d_model] and principal directions [d_model, d_model], largest variance first."""
    x = acts.double()
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
    return mean, vectors.flip(1)


def pca_nmse(acts: Float[Tensor, "n d_model"], mean: Tensor, basis: Tensor, k: int) -> float:
    """Error of the rank-k projection: Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the mean of ``acts``."""
    x = acts.double()
    centred = x - mean
    rest = centred - (centred @ basis[:, :k]) @ basis[:, :k].T
    return float(rest.square().sum() / (x - x.mean(0)).square().sum())


def random_nmse(acts: Float[Tensor, "n d_model"], mean: Tensor, k: int, d_sae: int) -> float:
    """Error of a random dictionary with k atoms per token.

    Atoms are normally distributed vectors, scaled to unit length. The k atoms with the largest
    |⟨x, atom⟩| get least-squares coefficients. A TopK SAE with these weights could not be better.
    """
    generator = torch.Generator().manual_seed(0)
    x = acts.double()
    atoms = torch.randn(d_sae, x.shape[1], generator=generator, dtype=torch.float64)
    atoms /= atoms.norm(dim=1, keepdim=True)
    error = 0.0
    for part in (x - mean).split(1024):
        chosen = atoms[(part @ atoms.T).abs().topk(k, dim=1).indices]  # [b, k, d_model]
        gram = chosen @ chosen.mT
        coefficients = torch.linalg.solve(gram, chosen @ part[:, :, None])
        error += float((part - (chosen.mT @ coefficients)[:, :, 0]).square().sum())
    return error / float((x - x.mean(0)).square().sum())
