"""The inference stage: run one SAE over all activations, in one pass whose memory does not grow.

    plan      ranges of shards
    work      each shard's sums, best examples and sparse codes, as objects under parts/
    finish    merge them in shard order, write the results, metrics.json last

`saev.inference.results` reads what it wrote; it imports no torch.
"""

import typing as tp

from saev.config.inference import InferenceConfig
from saev.progress import Progress

if tp.TYPE_CHECKING:
    from saev.shards import Shards

__all__ = ["find", "finish", "n_pieces", "plan", "run", "work"]


def plan(cfg: InferenceConfig) -> list[dict[str, tp.Any]]:
    """Work items. See :func:`saev.inference.stage.plan`."""
    from saev.inference import stage

    return stage.plan(cfg)


def work(cfg: InferenceConfig, item: dict[str, tp.Any], progress: Progress | None = None) -> None:
    """Do one item. See :func:`saev.inference.stage.work`."""
    from saev.inference import stage

    stage.work(cfg, item, progress)


def finish(cfg: InferenceConfig, progress: Progress | None = None) -> str:
    """Merge and publish. See :func:`saev.inference.stage.finish`."""
    from saev.inference import stage

    return stage.finish(cfg, progress)


def find(cfg: InferenceConfig) -> str:
    """Complete results, if there are any. See :func:`saev.inference.stage.find`."""
    from saev.inference import stage

    return stage.find(cfg)


def run(cfg: InferenceConfig, progress: Progress | None = None) -> str:
    """The whole stage. See :func:`saev.inference.stage.run`."""
    from saev.inference import stage

    return stage.run(cfg, progress)


def n_pieces(shards: "Shards") -> int:
    """How finely a pass is worth being cut. See :func:`saev.inference.stage.n_pieces`."""
    from saev.inference import stage

    return stage.n_pieces(shards)
