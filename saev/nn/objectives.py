"""The loss of an SAE, per token and dimension, so that its terms do not grow with the width.

With p_1 < … < p_P = d_sae the prefix lengths (vanilla: P = 1), x̂_j the reconstruction from the
first p_j latents, and B tokens:

    mse       Σ_j Σ_b ‖x - x̂_j‖² / (P·B·d_model)
    sparsity  λ · Σ_b ‖f‖₁ / B   (ReLU)     λ · Σ_b ‖f‖₀ / B   (JumpReLU)     0   (TopK, BatchTopK)
    aux       α · min(n_dead/k_aux, 1) · v · Σ_b ‖e - ê‖² / Σ_b ‖e‖²   (0 if e is 0)

Matryoshka (Bussmann et al. 2025, arXiv:2503.17547) sums over prefixes. The mean used here differs
by the constant factor P. It keeps λ, α and the norm of the gradient comparable with vanilla.

AuxK (Gao et al. 2024, arXiv:2406.04093, appendix A.2): the k_aux largest pre-activations z_aux of
dead latents reconstruct the residual e = x - x̂, which counts as a constant, as ê = z_aux·W_dec
without b_dec. The paper writes L + α·‖e - ê‖². Its code divides L by the variance of x, and the
AuxK term by the variance of e. Here L is not divided. Instead the AuxK term is multiplied by
v = Σ_b ‖x - x̄‖² / (B·d_model), which gives the same trade-off (v = 1 for normalised input). The
pre-activations are not rectified, so a latent whose pre-activations are all negative still gets a
gradient.
"""

import typing as tp

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saev.config.sae import Matryoshka, Objective
from saev.device import upload
from saev.errors import ConfigError
from saev.nn.kernels.errors import squared_norm, total
from saev.nn.ranks import Ranks


class Prefixes(tp.NamedTuple):
    """Prefix lengths of a group, padded to the same number."""

    lengths: Int[Tensor, "g p"]
    """Lengths of the prefixes, ascending; padded with d_sae."""
    weights: Float[Tensor, "g p"]
    """1/P for the P prefixes, 0 for padding."""
    cuts: list[list[int]]
    """The lengths as Python numbers, so that reading them does not wait for a GPU."""

    def to(self, like: Tensor) -> "Prefixes":
        """Copy to another tensor's device, with weights of its dtype."""
        lengths = self.lengths.to(like.device, non_blocking=True)
        return Prefixes(lengths, upload(self.weights, like), self.cuts)


def reconstruction_loss(
    errors: Float[Tensor, "g p"], prefixes: Prefixes, n_tokens: int, d_model: int
) -> Float[Tensor, ""]:
    """The mse of some rows of a batch, summed over members.

    Args:
        errors: Σ ‖x - x̂_j‖² of each prefix over these rows.
        prefixes: prefixes of the members.
        n_tokens: B.
        d_model: width of the activations.
    """
    return (errors * prefixes.weights).sum() * (1 / (n_tokens * d_model))


def default_k_aux(d_model: int) -> int:
    """min(512, d_model/2 rounded down to a power of two)."""
    return min(512, 1 << (max(d_model // 2, 1).bit_length() - 1))


def prefix_probabilities(d_sae: int, alpha: float) -> Tensor:
    """P(length = l) for l = 1 … d_sae - 1: a Pareto variable of shape `alpha`, rounded down,

    P(length ≥ l) ∝ l^-alpha. Every length has a positive probability.
    """
    survival = torch.arange(1, d_sae + 1, dtype=torch.float64).pow(-alpha)
    probabilities = survival[:-1] - survival[1:]
    return probabilities / probabilities.sum()


def sample_prefixes(
    probabilities: Tensor, n_prefixes: int, generator: torch.Generator
) -> Int[Tensor, " n_prefixes"]:
    """Distinct prefix lengths in ascending order; the last one is always d_sae.

    Args:
        probabilities: probabilities of the lengths 1 … d_sae - 1 (:func:`prefix_probabilities`).
        n_prefixes: number of lengths, including d_sae.
        generator: random numbers (CPU).
    """
    d_sae = probabilities.shape[0] + 1
    drawn = torch.empty(0, dtype=torch.int64)
    if n_prefixes > 1:
        drawn = 1 + torch.multinomial(probabilities, n_prefixes - 1, generator=generator)
    return torch.cat([drawn.sort().values, torch.tensor([d_sae])])


def n_prefixes(objective: Objective, d_sae: int) -> int:
    """Prefixes per step. Raises ConfigError if there are more prefixes than latents."""
    if not isinstance(objective, Matryoshka):
        return 1
    if objective.n_prefixes > d_sae:
        raise ConfigError(
            f"objective.n_prefixes is {objective.n_prefixes}, but the SAE has only {d_sae} "
            "latents. Lower it or raise sae.d_sae."
        )
    return objective.n_prefixes


def draw_prefixes(
    objectives: tp.Sequence[Objective],
    generators: tp.Sequence[torch.Generator],
    probabilities: tp.Mapping[float, Tensor],
    d_sae: int,
) -> Prefixes:
    """This step's prefixes of some members.

    Args:
        objectives: one per member.
        generators: random numbers of each member.
        probabilities: :func:`prefix_probabilities` by `pareto_alpha`.
        d_sae: number of latents.
    """
    counts = [n_prefixes(o, d_sae) for o in objectives]
    lengths = torch.full((len(counts), max(counts)), d_sae)
    weights = torch.zeros(lengths.shape, dtype=torch.float64)
    for g, (objective, count) in enumerate(zip(objectives, counts, strict=True)):
        if isinstance(objective, Matryoshka):
            lengths[g, :count] = sample_prefixes(
                probabilities[objective.pareto_alpha], count, generators[g]
            )
        weights[g, :count] = 1 / count
    return Prefixes(lengths, weights, lengths.tolist())


def variation(x: Float[Tensor, "b d"], ranks: Ranks, n_tokens: int) -> Tensor:
    """Σ ‖x - x̄‖² over a batch of n_tokens, of which x is this rank's share."""
    if ranks.alone:
        return total(squared_norm(x - x.mean(0)))
    # Σ‖x‖² - B·‖x̄‖² needs only one sum over ranks. In float64 it is as exact as float32 data.
    wide = x.double()
    sums = torch.stack([wide.sum(0), wide.square().sum(0)])
    ranks.add_(sums)
    squares = (sums[1] - sums[0].square() / n_tokens).sum()
    return squares.clamp(min=0).to(x.dtype)
