"""Chooses the latents to mark and the images to store."""

import dataclasses
import logging
import typing as tp
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from saev.config import VisualsConfig
from saev.errors import ConfigError
from saev.inference.results import Results
from saev.inference.shown import strong_first

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Latents to show, in order: the explicit ones as given, then the drawn ones by number."""

    latents: tuple[int, ...]
    explicit: frozenset[int]


def choose(
    cfg: VisualsConfig,
    frequency: Float[np.ndarray, " d_sae"],
    mean_values: Float[np.ndarray, " d_sae"],
) -> Choice:
    """The latents that a config chooses. The same config always chooses the same ones.

    The range of log10(frequency) of the candidates is cut into `n_latents` bins of equal width;
    one latent is drawn from each, then one more from each that has any left, and so on. A plain
    draw would show the frequencies that most latents have and miss both ends.

    Args:
        cfg: what to choose.
        frequency: share of tokens on which each latent fires.
        mean_values: mean value of each latent where it fires.

    Raises:
        ConfigError: a latent that the SAE does not have, or an empty range.
    """
    d_sae = len(frequency)
    explicit = tuple(dict.fromkeys(cfg.latents))
    for latent in explicit:
        if not 0 <= latent < d_sae:
            raise ConfigError(
                f"Latent {latent} does not exist: the SAE has d_sae = {d_sae} latents, 0 to "
                f"{d_sae - 1}. Correct --latents."
            )
    for name, (low, high) in (
        ("log_freq_range", cfg.log_freq_range),
        ("log_value_range", cfg.log_value_range),
    ):
        if low > high:
            raise ConfigError(f"{name} is {low} to {high}: the first number must be the smaller.")

    with np.errstate(divide="ignore", invalid="ignore"):
        log_freq, log_value = np.log10(frequency), np.log10(mean_values)
    # NaN (a dead latent's mean) compares as False; -inf lies below every range.
    inside = (log_freq >= cfg.log_freq_range[0]) & (log_freq <= cfg.log_freq_range[1])
    inside &= (log_value >= cfg.log_value_range[0]) & (log_value <= cfg.log_value_range[1])
    candidates = np.flatnonzero(inside)
    remaining = candidates[~np.isin(candidates, explicit)]
    drawn = _spread_draw(remaining, log_freq, cfg.n_latents, cfg.seed)
    if len(drawn) < cfg.n_latents:
        alive = frequency > 0
        span = (
            f"from {log_freq[alive].min():.2f} to {log_freq[alive].max():.2f}"
            if alive.any()
            else "nowhere: every latent is dead"
        )
        logger.warning(
            "%d latents were asked for, %d are in the ranges (log10 frequency %g to %g, log10 "
            "value %g to %g). log10 frequency of the living latents runs %s; widen "
            "--log-freq-range or --log-value-range to see more.",
            cfg.n_latents, len(drawn), *cfg.log_freq_range, *cfg.log_value_range, span,
        )  # fmt: skip
    return Choice((*explicit, *drawn), frozenset(explicit))


def _spread_draw(
    candidates: np.ndarray, log_freq: np.ndarray, n: int, seed: int
) -> tuple[int, ...]:
    if len(candidates) <= n:
        return tuple(int(i) for i in candidates)
    if n == 0:
        return ()
    rng = np.random.default_rng(seed)
    edges = np.linspace(log_freq[candidates].min(), log_freq[candidates].max(), n + 1)
    bin_of = np.clip(np.searchsorted(edges, log_freq[candidates], side="right") - 1, 0, n - 1)
    piles = [rng.permutation(candidates[bin_of == b]) for b in range(n)]
    drawn: list[int] = []
    depth = 0
    while len(drawn) < n:
        layer = [int(pile[depth]) for pile in piles if len(pile) > depth]
        # The last round may have more latents than are wanted. Some of them are drawn at random.
        drawn += [int(i) for i in rng.permutation(layer)][: n - len(drawn)]
        depth += 1
    return tuple(sorted(drawn))


class Images(tp.NamedTuple):
    """Images to store."""

    examples: tuple[int, ...]
    """Rows of `Shards.examples()`, in the order in which they are stored."""
    n_named: int
    """Number of images that there would be without the limit."""


def images(cfg: VisualsConfig, results: Results, chosen: Sequence[int]) -> Images:
    """The images to store: first the strongest one of each latent, then all others, those of strong
    and rare latents first; up to a limit, and then those of chosen latents.

    Args:
        cfg: says how many.
        results: names images of each latent.
        chosen: numbers of latents.

    Raises:
        StorageError: an earlier version of saev wrote the results, without tables.
    """
    table = results.tables.read("examples", ["latent", "kind", "rank", "example"])
    latent, rank, example = (table[name].to_numpy() for name in ("latent", "rank", "example"))
    is_top = pc.equal(table["kind"], "top").to_numpy()
    wanted = ~is_top | (rank < cfg.n_top)
    latents = results.latents(["frequency", "mean", "n_images"])
    place = np.empty(results.d_sae, dtype=np.int64)
    place[strong_first(*map(_floats, latents.columns))] = np.arange(results.d_sae)
    order = np.lexsort((rank, ~is_top, place[latent], ~(is_top & (rank == 0))))
    order = order[wanted[order]]
    found, first = np.unique(example[order], return_index=True)
    found = found[np.argsort(first)]
    sure = np.unique(example[wanted & np.isin(latent, chosen)])
    kept = found[: cfg.max_pictures]
    rest = found[cfg.max_pictures :]
    return Images((*kept.tolist(), *rest[np.isin(rest, sure)].tolist()), len(found))


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return np.nan_to_num(column.to_pandas().to_numpy(dtype=np.float64, na_value=np.nan))
