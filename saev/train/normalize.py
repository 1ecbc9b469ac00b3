"""What training does to activations before an SAE sees them: (x − mean) · scale.

Mean and scale are folded into the saved weights, so a trained SAE takes activations as recorded.
"""

import logging
import math
import typing as tp

import numpy as np
import torch
from torch import Tensor

from saev.config import DataConfig
from saev.errors import ConfigError, CorruptDataError
from saev.shards import Shards, finite
from saev.shards.reader import LayerStats

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 1 << 18
"""Most tokens that are read for the statistics of a folder that has none (protocol 2.1)."""


class Normalization(tp.NamedTuple):
    """Centre and scale of one layer."""

    mean: Tensor
    """Subtracted, float32 [d_model]; zeros without scale_mean."""
    scale: float
    """Multiplied; 1 without scale_norm."""

    @classmethod
    def of(cls, stats: LayerStats, *, scale_mean: bool, scale_norm: bool) -> "Normalization":
        """Compute it from a layer's moments.

        With ``scale_norm``, the root mean square norm becomes √d_model. With ``scale_mean`` too,
        that is the norm after the mean is subtracted.

        Raises:
            ConfigError: the activations do not vary, or are all zero.
        """
        d_model = len(stats.mean)
        mean = stats.mean if scale_mean else np.zeros(d_model)
        scale = 1.0
        if scale_norm:
            sq_norm = stats.centred_sq_norm if scale_mean else stats.mean_sq_norm
            if not sq_norm > 1e-12 * stats.mean_sq_norm:
                raise ConfigError(
                    "All recorded activations of this layer are the same vector, so they cannot be "
                    "scaled. Record real images, or give --no-scale-norm."
                )
            scale = math.sqrt(d_model / sq_norm)
        return cls(torch.from_numpy(mean).float(), scale)

    def apply_(self, acts_bd: Tensor) -> Tensor:
        """Normalise a float32 batch [batch, d_model] in place."""
        return acts_bd.sub_(self.mean.to(acts_bd.device)).mul_(self.scale)


def layer_stats(shards: Shards, data: DataConfig) -> LayerStats:
    """Moments of the tokens that ``data`` selects: the recorded ones if there are any.

    If there are none, they are computed from evenly spaced examples, at most SAMPLE_TOKENS tokens,
    always the same ones. Both kinds of moments include examples of every label and split.
    """
    layer = shards.layers[shards.layer_index(None if data.layer == "all" else data.layer)]
    recorded = shards.stats(layer, data.tokens)
    if recorded is not None:
        if not (np.isfinite(recorded.mean).all() and math.isfinite(recorded.mean_sq_norm)):
            raise finite.find(shards, layer) or CorruptDataError(
                f"The statistics of layer {layer} in {shards.url} hold NaN or infinity, but its "
                "activations do not. Record the shards again."
            )
        return recorded
    n_cls = int(shards.metadata.cls_token)
    rows = {"content": slice(n_cls, None), "special": slice(0, n_cls), "all": slice(None)}
    keep = rows[data.tokens]
    per_example = len(range(shards.tokens_per_example)[keep])
    if not per_example or not shards.n_examples:
        raise ConfigError(f"{shards.url} has no {data.tokens} tokens.")
    n_sampled = max(1, min(shards.n_examples, SAMPLE_TOKENS // per_example))
    logger.info("%s has no statistics; measuring them on %d examples.", shards.url, n_sampled)
    total, sq_total, count = np.zeros(shards.d_model), 0.0, 0
    for i in range(n_sampled):
        index = i * shards.n_examples // n_sampled
        shard, start = shards.locate(index)
        read = shards.read(shard, layer, start, start + 1)[0, keep]
        finite.check(read, torch.full((len(read),), index), shards, layer)
        x = read.double().numpy()
        total += x.sum(0)
        sq_total += float(np.square(x).sum())
        count += len(x)
    return LayerStats(total / count, sq_total / count, count)
