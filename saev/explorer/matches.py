"""The same latent in several SAEs: the one with the most similar decoder row."""

import logging
from collections.abc import Sequence

import numpy as np

from saev.errors import SaevError
from saev.inference import decoder
from saev.nn.io.load import load_sae
from saev.nn.sae import SparseAutoencoder

logger = logging.getLogger(__name__)


def find(runs: Sequence[str]) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """The matches of all pairs of SAEs whose decoders write into spaces of the same size.

    Whether two spaces of the same size are the same one, callers know: cosines between rows of
    different layers or models mean nothing.

    Args:
        runs: URLs of run folders.

    Returns:
        By numbers of the SAE and of the other: of each latent the closest one, int32 [d_sae], and
        the cosine of the two decoder rows, float32 [d_sae]. SAEs whose weights are gone are left
        out, with a warning.
    """
    saes = {number: sae for number, run in enumerate(runs) if (sae := _load(run)) is not None}
    found = {}
    for one, mine in saes.items():
        for other, theirs in saes.items():
            if one != other and mine.d_model == theirs.d_model:
                latents, cosines = decoder.matches(mine, theirs, n=1)
                found[one, other] = latents[:, 0], cosines[:, 0]
    return found


def _load(run: str) -> SparseAutoencoder | None:
    try:
        return load_sae(run)
    except SaevError as err:
        logger.warning("The page has no matches with the latents of %s: %s", run, err)
        return None
