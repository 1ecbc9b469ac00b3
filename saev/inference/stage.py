"""The inference stage: run one SAE over all activations.

An item is one shard. It writes sums, best examples and sparse codes under parts/; publishing merges
them in shard order and writes metrics.json last.
"""

import functools
import math
import typing as tp
from collections.abc import Sequence

from saev import driver, known, storage
from saev.config.inference import InferenceConfig
from saev.inference import files, part, publish
from saev.inference.job import Pass
from saev.inference.results import Results
from saev.progress import Progress
from saev.shards import Shards
from saev.stage import Context, Item, Job, Result
from saev.stage import Part as Slice

_ITEM_TOKENS = 4_000_000
"""Tokens that are worth a pod, which has to load the SAE for them."""
_FIGURES = (
    "normalized_mse", "explained_variance", "l0", "l1", "n_dead", "n_almost_dead", "dense_share",
    "d_sae", "n_tokens", "mean_average_precision", "purity_at_16", "coverage_at_0.3", "probe_r",
)  # fmt: skip
"""Keys of metrics.json that are shown; the last four are there only where there are labels."""


def plan(cfg: InferenceConfig) -> list[dict[str, tp.Any]]:
    """Work items, ``{"shard": number}``; with ``cfg.part`` those of that part. Opens no SAE.

    Raises:
        ConfigError: the shards are unknown, or --part is no I/N.
        StorageError: the shards cannot be read.
    """
    return [item.spec for item in Slice.parse(cfg.part).slice(Measuring(cfg).items())]


def n_pieces(shards: Shards) -> int:
    """In how many pieces a pass over a shards folder is worth being cut, at least one."""
    n_shards = len(shards.infos)
    largest = max((info.n_examples for info in shards.infos), default=0)
    step = max(1, _ITEM_TOKENS // max(1, largest * shards.tokens_per_example))
    return max(1, math.ceil(n_shards / step))


def work(
    cfg: InferenceConfig, item: tp.Mapping[str, tp.Any], progress: Progress | None = None
) -> None:
    """Do one shard, unless it is done. Loads the SAE: see :func:`run` for many shards."""
    job = Measuring(cfg)
    driver.do(job, [job.items()[int(item["shard"])]], progress)


def finish(cfg: InferenceConfig, progress: Progress | None = None) -> str:
    """Merge all parts exactly and publish; does nothing if that was done.

    Returns:
        URL of the results' folder.

    Raises:
        IncompleteError: a shard is not done.
    """
    return driver.finish(Measuring(cfg), progress).urls[0]


def find(cfg: InferenceConfig) -> str:
    """URL of the results' folder if it is complete, else "".

    Raises:
        ConfigError: the SAE was trained on activations of another model.
    """
    job = Measuring(cfg)
    if job.published():
        return job.url
    job.refuse()
    return ""


def run(cfg: InferenceConfig, progress: Progress | None = None) -> str:
    """All items that are not done, then (without ``cfg.part``) `finish`.

    Returns:
        URL of the results' folder.
    """
    return driver.run(Measuring(cfg), cfg.part, progress).urls[0]


class Measuring(Pass, Job):
    """One SAE on one shards folder. See :class:`saev.inference.job.Pass`."""

    name = "inference"
    unit = "tok"

    @classmethod
    def pieces(cls, found: tp.Mapping[str, str]) -> int:
        with Shards.open(found["shards"]) as shards:
            return n_pieces(shards)

    @property
    def urls(self) -> tuple[str, ...]:
        return (self.url,)

    def published(self) -> bool:
        """Whether the results are complete.

        Raises:
            ConfigError: they are those of other inputs.
            CorruptDataError: metrics.json is damaged, or the config that it lists.
        """
        if not storage.exists(self.place(files.METRICS)):
            return False
        folder = storage.Folder.open(self.url, files.METRICS, files.REMEDY)
        if folder.files is not None:
            folder.read_bytes(files.CONFIG)
        self.recorded()  # compares the key that this config has
        return True

    def result(self) -> Result:
        metrics = Results.open(self.url).metrics
        figures = {k: metrics[k] for k in _FIGURES if isinstance(metrics.get(k), int | float)}
        return Result(self.urls, figures)

    def items(self) -> list[Item]:
        """One per shard."""
        return [
            Item(f"shard {shard}", self.source.shard_tokens(shard), {"shard": shard})
            for shard in range(len(self.shards.infos))
        ]

    def done(self, item: Item) -> bool:
        return part.find_record(self, item.spec["shard"]) is not None

    @functools.cached_property
    def _dist_latents(self) -> tuple[int, ...]:
        return self.claim()

    def begin(self, todo: Sequence[Item]) -> None:
        _ = self._dist_latents

    def work(self, item: Item, context: Context) -> None:
        if not storage.exists(self.place(files.METRICS)):  # another worker may have published
            part.compute(self, item.spec["shard"], self._dist_latents, context.bar)

    def refuse(self) -> None:
        """Raise ConfigError if the SAE was trained on activations of another model."""
        _ = self.key

    def publish(self, progress: Progress) -> None:
        self.refuse()
        with progress.task("merge", total=len(self.shards.infos), unit="part") as task:
            publish.publish(self, progress.publish_point, task.advance)

    def tidy(self, items: Sequence[Item]) -> None:
        if not self.published():
            return
        publish.remove_parts(self)  # an earlier process may have been killed just before this
        if self._known is None and self._question is not None:
            known.note(self.url, self._question, self.key)

    def close(self) -> None:
        self.__dict__.pop("sae", None)
        if "_opened" in self.__dict__:
            self.shards.close()
