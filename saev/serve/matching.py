"""The same latent in the other SAEs of a root: the one whose decoder row is nearest."""

import logging
import typing as tp

import numpy as np

from saev.errors import SaevError
from saev.serve.cache import ByteCache
from saev.serve.catalogue import Entry
from saev.serve.measured import Measured

logger = logging.getLogger(__name__)

MAX_OTHERS = 8
"""Most other SAEs that are looked at."""


class _Nearest(tp.NamedTuple):
    """Of each latent, the nearest one of another SAE."""

    latents: np.ndarray
    cosines: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.latents.nbytes + self.cosines.nbytes


def others(measured: Measured, entries: tp.Iterable[Entry]) -> list[Entry]:
    """The SAEs that were measured on the same activations: the same shards folder and layer."""
    mine = measured.entry.figures
    same = ("shards", "layer", "d_model")
    found = [
        one for one in entries
        if one.results and one.figures["run"] != mine["run"]
        and all(one.figures[key] == mine[key] for key in same)
    ]  # fmt: skip
    return found[:MAX_OTHERS]


def of_latent(
    measured: Measured, latent: int, entries: tp.Sequence[Entry], cache: ByteCache
) -> dict[str, tp.Any]:
    """The nearest latent of each other SAE, best first.

    Args:
        measured: the SAE.
        latent: of which one.
        entries: the other SAEs.
        cache: where the nearest latents of two SAEs are kept.

    Raises:
        Problem: there is no such latent.
    """
    measured.check_latent(latent)
    rows = []
    for other in entries:
        found = _nearest(measured, other, cache)
        if found is not None:
            rows.append({
                "run": other.key, "name": other.figures["name"],
                "latent": int(found.latents[latent]), "cosine": float(found.cosines[latent]),
            })  # fmt: skip
    rows.sort(key=lambda row: -row["cosine"])
    return {"run": measured.key, "latent": latent, "matches": rows}


def _nearest(measured: Measured, other: Entry, cache: ByteCache) -> _Nearest | None:
    """None if the weights of one of the two are gone."""
    from saev.inference import decoder  # needs torch

    run, another = measured.entry.figures["run"], other.figures["run"]

    def made() -> _Nearest:
        found = decoder.matches(run, another, n=1)
        return _Nearest(found.latents[:, 0], found.cosines[:, 0])

    try:
        return cache.get(("matches", run, another), made, dear=True)
    except SaevError as err:
        logger.warning("There are no matches of latents: %s", err)
        return None
