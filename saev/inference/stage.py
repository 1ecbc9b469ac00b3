"""plan, work, finish, run of the inference stage."""

import logging
import re
import typing as tp

from saev import storage
from saev.config.inference import InferenceConfig
from saev.errors import ConfigError
from saev.inference import files, part, publish
from saev.inference.job import Job, open_shards
from saev.inference.provenance import read_run
from saev.nn.io.load import HUB_PREFIX
from saev.progress import Progress
from saev.shards import Shards
from saev.workers import unless_done

logger = logging.getLogger(__name__)

_ITEM_TOKENS = 4_000_000
"""Tokens that are worth a work item (a pod has to load the SAE for it)."""


def plan(cfg: InferenceConfig) -> list[dict[str, tp.Any]]:
    """Work items: ranges of shards, ``{"first": i, "last": j}`` for shards i to j - 1.

    With ``cfg.part`` there is one item, that part of the shards (none if there are fewer shards
    than parts).

    Raises:
        ConfigError: the shards are unknown, or --part is no I/N.
        StorageError: the shards cannot be read.
    """
    run = cfg.run if cfg.run.startswith(HUB_PREFIX) else storage.normalize(cfg.run)
    shards, _ = open_shards(cfg, read_run(run))
    n_shards = len(shards.infos)
    if cfg.part:
        i, n = parse_part(cfg.part)
        spans = [((i - 1) * n_shards // n, i * n_shards // n)]
    else:
        spans = _spans(shards)
    return [{"first": first, "last": last} for first, last in spans if first < last]


def n_pieces(shards: Shards) -> int:
    """In how many pieces a pass over a shards folder is worth being cut, at least one."""
    return max(1, len(_spans(shards)))


def _spans(shards: Shards) -> list[tuple[int, int]]:
    n_shards = len(shards.infos)
    largest = max((info.n_examples for info in shards.infos), default=0)
    step = max(1, _ITEM_TOKENS // max(1, largest * shards.tokens_per_example))
    return [(i, min(i + step, n_shards)) for i in range(0, n_shards, step)]


def parse_part(text: str) -> tuple[int, int]:
    """``I/N`` as two integers. Raises ConfigError unless 1 ≤ I ≤ N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    i, n = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= i <= n:
        raise ConfigError(f"--part is {text!r}, expected I/N with I from 1 to N, such as 2/8.")
    return i, n


def work(cfg: InferenceConfig, item: dict[str, tp.Any], progress: Progress | None = None) -> None:
    """Do the shards of one item that are not done. Writes only objects of these shards."""
    job = Job.open(cfg)
    if not _is_published(job):
        _work(job, [item], progress)


def finish(cfg: InferenceConfig, progress: Progress | None = None) -> str:
    """Merge all parts exactly and publish; does nothing if that was done.

    Returns:
        URL of the results' folder.

    Raises:
        IncompleteError: a shard is not done.
    """
    return _finish(Job.open(cfg), progress)


def find(cfg: InferenceConfig) -> str:
    """URL of the results' folder if it is complete, else ""."""
    job = Job.open(cfg)
    return job.url if _is_published(job) else ""


def run(cfg: InferenceConfig, progress: Progress | None = None) -> str:
    """All items that are not done, then (without ``cfg.part``) `finish`.

    Returns:
        URL of the results' folder.
    """
    items = plan(cfg)
    job = Job.open(cfg)
    if not _is_published(job):
        _work(job, items, progress)
    return job.url if cfg.part else _finish(job, progress)


def _is_published(job: Job) -> bool:
    """Whether the results are complete.

    Raises:
        ConfigError: they are those of other inputs.
        CorruptDataError: metrics.json is damaged, or the config that it lists.
    """
    if not storage.exists(job.place(files.METRICS)):
        return False
    folder = storage.Folder.open(job.url, files.METRICS, files.REMEDY)
    if folder.files is not None:
        folder.read_bytes(files.CONFIG)
    job.claim()  # compares the key that this config has
    return True


def _work(job: Job, items: list[dict[str, tp.Any]], progress: Progress | None) -> None:
    dist_latents = job.claim()
    progress = progress or Progress(quiet=True)
    shards = [shard for item in items for shard in range(int(item["first"]), int(item["last"]))]
    todo = [shard for shard in shards if part.find_record(job, shard) is None]
    total = sum(map(job.source.shard_tokens, shards))
    done = total - sum(map(job.source.shard_tokens, todo))
    with (
        progress.task("inference", total=total, unit="tok", done=done, is_main=True) as task,
        unless_done(logger, lambda: _is_published(job)),
    ):
        for shard in todo:
            part.compute(job, shard, dist_latents, task)


def _finish(job: Job, progress: Progress | None) -> str:
    progress = progress or Progress(quiet=True)
    if _is_published(job):
        publish.remove_parts(job)  # an earlier run may have been killed just before this
    else:
        n = len(job.shards.infos)
        with (
            unless_done(logger, lambda: _is_published(job)),
            progress.task("merge", total=n, unit="part") as task,
        ):
            publish.publish(job, progress.publish_point, task.advance)
    return job.url
