"""The inference stage: run SAEs over all activations.

SAEs that read the same tokens are a group, which reads them once. An item is one shard and one
group. It writes sums, best examples and sparse codes of each SAE under its parts/; publishing
merges them in shard order and writes each SAE's metrics.json last. Results do not depend on the
group. An SAE that cannot be measured fails alone: its error is raised when the others are done.
"""

import contextlib
import functools
import math
import typing as tp
from collections.abc import Iterator, Sequence

from saev import driver, storage
from saev.config.inference import InferenceCommand, InferenceConfig
from saev.config.stages import Stages
from saev.config.train import TrainConfig
from saev.errors import IncompleteError, SaevError
from saev.failures import Failures
from saev.grouping import measured_together
from saev.inference import files, part, publish
from saev.inference.job import Opened, Pass, claim, memory_of
from saev.inference.results import Results
from saev.limits import ITEM_TOKENS
from saev.progress import Progress, Task
from saev.shards import Shards
from saev.stage import Context, Item, Job, Result, Share
from saev.stage import Part as Slice

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


def n_pieces(shards: Shards, n_saes: int = 1) -> int:
    """In how many pieces a pass over a shards folder is worth being cut, at least one.

    Args:
        shards: the folder.
        n_saes: number of SAEs that are measured together.
    """
    n_shards = len(shards.infos)
    largest = max((info.n_examples for info in shards.infos), default=0)
    step = max(1, ITEM_TOKENS // max(1, largest * shards.tokens_per_example * n_saes))
    return max(1, math.ceil(n_shards / step))


def work(
    cfg: InferenceConfig, item: tp.Mapping[str, tp.Any], progress: Progress | None = None
) -> None:
    """Do one shard, unless it is done. Loads the SAE: see :func:`run` for many shards."""
    job = Measuring(cfg)
    driver.do_items(job, [job.items()[int(item["shard"])]], progress)


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
        return job.urls[0]
    job.refuse()
    return ""


def run(cfg: InferenceConfig, progress: Progress | None = None) -> str:
    """All items that are not done, then (without ``cfg.part``) `finish`.

    Returns:
        URL of the results' folder.
    """
    return driver.run_job(Measuring(cfg), cfg.part, progress).urls[0]


def run_all(cfgs: Sequence[InferenceConfig], progress: Progress | None = None) -> list[str]:
    """Measure several SAEs; those that read the same tokens read them once, together.

    Args:
        cfgs: one for each SAE, without a ``part``. The results are those of :func:`run`.
        progress: where progress is shown.

    Returns:
        URLs of the results' folders, in the order of the configs.

    Raises:
        SaevError: an SAE cannot be measured. All others are.
    """
    return list(driver.run_job(Measuring(cfgs), progress=progress).urls) if cfgs else []


class Measuring(Job):
    """SAEs on shards folders.

    Args:
        cfg: of one SAE, or of each.
        failed: the errors of further SAEs, which have no config.
    """

    name = "inference"
    unit = "tok"

    def __init__(
        self,
        cfg: InferenceConfig | InferenceCommand | Sequence[InferenceConfig],
        failed: Sequence[SaevError] = (),
    ):
        cfgs = [cfg] if isinstance(cfg, InferenceConfig) else cfg
        cfgs = cfgs.configs() if isinstance(cfgs, InferenceCommand) else cfgs
        self._opened = Opened()
        unique: dict[InferenceConfig, Pass] = {}
        self._asked = tuple(unique.setdefault(one, Pass(one, self._opened)) for one in cfgs)
        self._members = tuple(unique.values())
        self._failures = Failures(self._members, "SAEs", failed)

    @classmethod
    def shares(
        cls,
        stages: Stages,
        found: tp.Mapping[str, str],
        runs: Sequence[TrainConfig],
        n_slots: int,
    ) -> list[Share]:
        """SAEs that read the same tokens, with the number of pieces that the shards allow.

        If there are fewer pieces than slots, groups are cut into smaller ones, as long as a piece
        is worth a pod.
        """
        n_top = InferenceConfig.from_dict({**stages.inference, "run": ""}).n_top
        with Shards.open(found["shards"]) as shards:
            groups = measured_together(
                range(len(runs)),
                lambda i: storage.content_hash(stages.measured(runs[i], shards.url).to_dict()),
                lambda i: memory_of(runs[i].sae, shards, n_top),
            )
            n_tokens = shards.n_examples * shards.tokens_per_example
            shares = []
            for group in groups:
                pieces = n_pieces(shards, len(group))
                wanted = math.ceil(n_slots * len(group) / len(runs) / pieces)
                worth = n_tokens * len(group) // (ITEM_TOKENS * pieces)
                n = max(1, min(len(group), wanted, worth))
                for number in range(1, n + 1):
                    few = tuple(Slice(number, n).slice(group))
                    shares.append(Share(few, n_pieces(shards, len(few))))
        return shares

    @property
    def title(self) -> str:
        n = len(self._members)
        return f"{self.name} of {n} SAEs" if n > 1 else self.name

    @functools.cached_property
    def _groups(self) -> list[list[Pass]]:
        """SAEs that read the same tokens and have room in memory together."""
        opened = []
        for one in self._members:
            with self._failures.of(one):
                _ = one.has_concepts, len(self._members) > 1 and one.memory
                opened.append(one)
        return measured_together(
            opened,
            lambda one: storage.content_hash([one.data.to_dict(), one.has_concepts]),
            lambda one: one.memory,
        )

    def _group(self, item: Item) -> list[Pass]:
        """The SAEs of an item. Frees the weights of all others."""
        wanted = self._groups[_number(item)]
        for group in self._groups:
            if group is not wanted:
                self._forget(group)
        return wanted

    def _forget(self, members: Sequence[Pass]) -> None:
        for one in members:
            one.forget()

    @functools.cached_property
    def key(self) -> str:
        keys = []
        for group in self._groups:
            for one in self._failures.left(group):
                with self._failures.of(one):
                    _ = one.url
                    keys.append(one.key)
            if len(self._groups) > 1:
                self._forget(group)
        return keys[0] if len(keys) == 1 else storage.content_hash(keys)

    @property
    def _sound(self) -> list[Pass]:
        """The SAEs that have not failed. Opens all of them."""
        _ = self.key
        return self._failures.left(self._members)

    @property
    def urls(self) -> tuple[str, ...]:
        sound = self._sound
        return tuple(one.url for one in self._asked if one in sound)

    def published(self) -> bool:
        found = self._published()
        return len(found) == len(self._sound)

    def there(self) -> tuple[str, ...]:
        found = self._published()
        return tuple(one.url for one in self._asked if one in found)

    def _published(self) -> list[Pass]:
        """The SAEs whose results are complete."""
        found = []
        for one in self._sound:
            with self._failures.of(one):
                if one.published():
                    found.append(one)
        return found

    def failure(self) -> SaevError | None:
        return self._failures.error()

    def result(self) -> Result:
        urls = self.urls
        if len(urls) > 1:
            return Result(urls)
        metrics = Results.open(urls[0]).metrics
        figures = {k: metrics[k] for k in _FIGURES if isinstance(metrics.get(k), int | float)}
        return Result(urls, figures)

    def items(self) -> list[Item]:
        """One per shard and group."""
        found = []
        for number, group in enumerate(self._groups):
            one = group[0]
            which = "" if len(self._groups) == 1 else f" of group {number + 1}"
            spec = {} if len(self._groups) == 1 else {"group": number}
            found += [
                Item(f"shard {shard}{which}", one.source.shard_tokens(shard),
                     {"shard": shard, **spec})
                for shard in range(len(one.shards.infos))
            ]  # fmt: skip
        return found

    def done(self, item: Item) -> bool:
        return not self._missing(item)

    def _missing(self, item: Item) -> list[Pass]:
        """The SAEs that an item is to be done for. Looks at storage."""
        shard = item.spec["shard"]
        missing = []
        for one in self._failures.left(self._groups[_number(item)]):
            with self._failures.of(one):
                if not self._is_done(one, shard):
                    missing.append(one)
        return missing

    def _is_done(self, one: Pass, shard: int) -> bool:
        return part.find_record(one, shard) is not None or self._has_metrics(one)

    def _has_metrics(self, one: Pass) -> bool:
        return storage.exists(one.place(files.METRICS))

    def begin(self, todo: Sequence[Item]) -> None:
        for item in {_number(item): item for item in todo}.values():
            members = self._failures.left(self._group(item))
            claim([one for one in members if not self._has_metrics(one)], self._failures)

    def work(self, item: Item, context: Context) -> None:
        self._group(item)
        if missing := self._missing(item):  # another worker may have published
            shard = item.spec["shard"]
            part.compute(
                missing, shard, context.bar, lambda one: self._alone(one, shard, context.progress)
            )

    @contextlib.contextmanager
    def _alone(self, one: Pass, shard: int, progress: Progress) -> Iterator[None]:
        """A block about one SAE, whose errors end the work for this SAE only."""
        said = f"Shard {shard} of {one.url} was done by another worker meanwhile"
        with (
            self._failures.of(one, progress.safe_point),
            driver.unless_done(lambda: self._is_done(one, shard), said),
        ):
            yield

    def refuse(self) -> None:
        """Raise ConfigError if an SAE was trained on activations of another model."""
        _ = self.key

    def publish(self, progress: Progress) -> None:
        self.refuse()
        n_parts = sum(len(one.shards.infos) for one in self._sound)
        with progress.task("merge", total=n_parts, unit="part") as task:
            for group in self._groups:
                for one in self._failures.left(group):
                    with self._failures.of(one, progress.safe_point, but=IncompleteError):
                        if not one.published():
                            self._publish(one, progress, task)
                if len(self._groups) > 1:
                    self._forget(group)

    def _publish(self, one: Pass, progress: Progress, task: Task) -> None:
        with driver.unless_done(one.published, f"Another worker has published {one.url} meanwhile"):
            publish.publish(one, progress.publish_point, task.advance)

    def tidy(self, items: Sequence[Item]) -> None:
        for one in self._published():
            publish.remove_parts(one)  # an earlier process may have been killed before this
            one.note()

    def close(self) -> None:
        self._forget(self._members)
        self._opened.close()


def _number(item: Item) -> int:
    """Of the item's group."""
    return int(item.spec.get("group", 0))
