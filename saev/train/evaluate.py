"""Measuring trained SAEs on held-out activations, in the form in which they are used."""

import typing as tp

import torch

from saev.config import TrainConfig
from saev.loaders import ShuffledLoader
from saev.loaders.selection import Selection
from saev.nn import SparseAutoencoder
from saev.nn.metrics import ReconstructionMetrics
from saev.progress import Progress
from saev.shards import Shards

Metrics = dict[str, float | int]

_LATENT_BYTES = 256 << 20
"""Most bytes of latents of one SAE at a time."""
_BATCH_TOKENS = 16_384
_VAL_SEED = 0


@torch.no_grad()
def evaluate(
    saes: tp.Sequence[SparseAutoencoder],
    config: TrainConfig,
    device: torch.device,
    progress: Progress,
) -> list[Metrics]:
    """Metrics of each SAE on at most ``config.n_val`` tokens of the validation side.

    If that side has more tokens, a random choice of them is taken, always the same one. Every SAE
    sees the same batches, and its numbers do not depend on the others. Without n_val, empty dicts.
    """
    if not config.n_val or not saes:
        return [{} for _ in saes]
    found = [ReconstructionMetrics(sae.d_model, sae.d_sae, device) for sae in saes]
    data = config.val_data.decided()
    with Shards.open(data.shards) as shards:
        n_tokens = min(config.n_val, Selection(shards, data).n_tokens)
        size = min(_BATCH_TOKENS, n_tokens)
        with (
            ShuffledLoader(shards, data, size, seed=_VAL_SEED, epochs=1, device=device) as loader,
            progress.task("evaluate", total=n_tokens, unit="tok") as bar,
        ):
            left = n_tokens
            for batch in loader:
                acts_bd = batch.act[:left]
                for sae, metrics in zip(saes, found, strict=True):
                    rows = max(1, _LATENT_BYTES // (4 * sae.d_sae))
                    for part in acts_bd.split(rows):
                        x_hat, f = sae(part)
                        metrics.update(part, x_hat, f)
                left -= len(acts_bd)
                bar.advance(len(acts_bd))
                if not left:
                    break
    return [metrics.to_dict() for metrics in found]
