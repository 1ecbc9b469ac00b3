"""Calibration: set the threshold of an SAE so that its L0 on unseen tokens is the wanted one.

An SAE that was trained on few images fires more often on other images: BatchTopK with k = 32 had
40.5 active latents there. So after training a level is chosen, one number per SAE, on tokens that
are used neither for training nor for the reported metrics. A latent is active above the level:

    activation   change of the SAE         the level is compared with
    BatchTopK    θ' = level                z
    JumpReLU     θ' = θ·level              z/θ; one level for all latents
    ReLU         b_enc' = b_enc - level    z

The level is chosen so that L0 · (number of tokens) of all (token, latent) pairs are above it. The
authors of BatchTopK estimate θ in the same way from training batches (Bussmann et al. 2024,
arXiv:2412.06410).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saev.errors import ConfigError
from saev.nn.sae import SparseAutoencoder

_BINS = 1 << 14
_FIRST_TOKENS = 4096
"""The range of the histogram is chosen from this number of tokens."""
_MARGIN = 4.0
"""In the histogram's range, L0 goes from this multiple of the wanted L0 down to 1/this of it."""


class Calibration:
    """Histogram of the levels of one SAE over any number of batches. Counts are exact, so the
    result does not depend on the sizes of the batches after the first.

    Args:
        sae: with activation relu, jump-relu or batch-top-k.
        l0: wanted mean number of active latents per token.
    """

    def __init__(self, sae: SparseAutoencoder, l0: float):
        self.l0 = l0
        self.n_tokens = 0
        self._sae = sae
        self._low, self._width = 0.0, 0.0
        self._counts = torch.zeros(_BINS + 1, dtype=torch.int64, device=sae.b_enc.device)
        self._n_active = torch.zeros((), dtype=torch.int64, device=sae.b_enc.device)

    @torch.no_grad()
    def update(self, x: Float[Tensor, "batch d_model"]) -> None:
        """Add a batch of recorded activations."""
        acts, z = self._sae.encode(x)
        self._n_active += (acts != 0).sum()
        levels = self._levels(z)
        if not self.n_tokens:
            self._choose_range(levels[:_FIRST_TOKENS])
        self.n_tokens += len(x)
        above = levels[levels > self._low]
        places = ((above - self._low) / self._width).clamp(max=_BINS).long()
        self._counts += torch.bincount(places, minlength=_BINS + 1)

    @property
    def l0_before(self) -> float:
        """Mean number of active latents per token, before the SAE is changed."""
        return int(self._n_active) / max(self.n_tokens, 1)

    def level(self) -> float:
        """The level above which `l0` latents per token are active on average.

        Raises:
            ConfigError: there were no tokens.
        """
        if not self.n_tokens:
            raise ConfigError("There are no tokens to calibrate on.")
        reaching = self._counts.flip(0).cumsum(0).flip(0)  # pairs from each bin on
        best = int((reaching - round(self.l0 * self.n_tokens)).abs().argmin())
        return self._low + best * self._width

    def _levels(self, z: Tensor) -> Tensor:
        if self._sae.cfg.activation.kind == "jump-relu":
            assert self._sae.threshold is not None
            return z / self._sae.threshold
        return z

    def _choose_range(self, levels: Tensor) -> None:
        wanted = self.l0 * len(levels)
        counts = [min(max(1, round(wanted * m)), levels.numel()) for m in (_MARGIN, 1 / _MARGIN)]
        top = levels.flatten().topk(counts[0], sorted=True).values
        low, high = float(top[-1]), float(top[counts[1] - 1])
        self._low = low
        self._width = max((high - low) / _BINS, 1e-6 * abs(high), 1e-12)


@torch.no_grad()
def set_level(sae: SparseAutoencoder, level: float) -> None:
    """Change an SAE so that its latents are active above this level."""
    match sae.cfg.activation.kind:
        case "batch-top-k":
            assert sae.threshold is not None
            sae.threshold.fill_(max(level, 0.0))
        case "jump-relu":
            assert sae.threshold is not None
            sae.threshold.mul_(max(level, 0.0))
        case "relu":
            sae.b_enc.sub_(level)
        case kind:
            raise ConfigError(f"{kind} has no level: it keeps the top_k largest of each token.")
