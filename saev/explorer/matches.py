"""The same latent in several SAEs: the one with the most similar decoder row."""

import logging
import typing as tp
from collections.abc import Sequence

import numpy as np
import torch

from saev.errors import SaevError
from saev.nn.io.load import load_sae

logger = logging.getLogger(__name__)

_CHUNK = 512


class Match(tp.NamedTuple):
    """Of each latent of one SAE, the closest latent of another."""

    latents: np.ndarray
    """int64 [d_sae]."""
    cosines: np.ndarray
    """Cosine of the two decoder rows, float32 [d_sae]."""


def find(runs: Sequence[str]) -> dict[tuple[int, int], Match]:
    """The matches of all pairs of SAEs whose decoders write into spaces of the same size.

    Whether two spaces of the same size are the same one, callers know: cosines between rows of
    different layers or models mean nothing.

    Args:
        runs: URLs of run folders.

    Returns:
        By numbers of the SAE and of the other. SAEs whose weights are gone are left out, with a
        warning.
    """
    rows = {number: unit for number, run in enumerate(runs) if (unit := _unit(run)) is not None}
    return {
        (one, other): _closest(mine, theirs)
        for one, mine in rows.items()
        for other, theirs in rows.items()
        if one != other and mine.shape[1] == theirs.shape[1]
    }


@torch.no_grad()
def _unit(run: str) -> torch.Tensor | None:
    """Decoder rows at length 1."""
    try:
        rows = load_sae(run).W_dec.detach().float().cpu()
    except SaevError as err:
        logger.warning("The page has no matches with the latents of %s: %s", run, err)
        return None
    return rows / rows.norm(dim=1).clamp_min(1e-30)[:, None]


def _closest(mine: torch.Tensor, theirs: torch.Tensor) -> Match:
    best = [(mine[i : i + _CHUNK] @ theirs.T).max(dim=1) for i in range(0, len(mine), _CHUNK)]
    return Match(
        torch.cat([one.indices for one in best]).numpy(),
        torch.cat([one.values for one in best]).clamp(-1.0, 1.0).numpy(),
    )
