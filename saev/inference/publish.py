"""Merges the parts and writes the results, metrics.json last."""

import logging
import typing as tp
from collections.abc import Callable

import numpy as np
import safetensors.numpy

from saev import storage
from saev.errors import CorruptDataError, IncompleteError
from saev.inference import concepts, files, npz, part, tabulate
from saev.inference.codes import CodesInfo, StoredCodes
from saev.inference.job import Pass
from saev.inference.labels import ImageLabels
from saev.inference.part import PartRecord, PartStats
from saev.inference.scores import Scores
from saev.inference.topk import Entries

logger = logging.getLogger(__name__)

LOG_FLOOR = 1e-10
"""As in SAELens, `sparsity` is log10(frequency + LOG_FLOOR)."""


def publish(
    job: Pass,
    ready: Callable[[], None] = lambda: None,
    seen: Callable[[int], None] = lambda n: None,
) -> None:
    """Verify all parts, merge them in shard order, and write everything.

    Args:
        job: the SAE and its parts.
        ready: called before the first object is written and before the last one. An exception of
            it ends the work.
        seen: called with 1 after the statistics of each shard are merged.

    Raises:
        IncompleteError: a shard is not done.
        CorruptDataError: a part is damaged.
    """
    ready()
    storage.clean_temporary(job.url)
    records = _read_records(job)
    stats = PartStats(job.sae.d_model, job.sae.d_sae, job.cfg.n_top)
    for record in records:
        stats.merge(part.read_stats(job, record))
        seen(1)
    metrics: dict[str, tp.Any] = stats.metrics.to_dict()
    listed = {files.CONFIG: _listed_config(job)}
    objects = {**_latents(stats), files.TOP_EXAMPLES: _top(job, stats.top.result())}

    place = storage.join(job.url, files.PARTS)
    dists = StoredCodes(place, _infos(records, "dists"))
    if dists.infos:
        dists.verify()
        latents = np.array(records[0].dist_latents, dtype="<i8")
        target = job.place(files.DISTRIBUTIONS)
        listed[files.DISTRIBUTIONS] = npz.write_codes(target, dists, {"latents": latents})
    codes = StoredCodes(place, _infos(records, "codes"))
    if codes.infos:
        codes.verify()
    labels, masks = ImageLabels.read(job), None
    if job.has_concepts:
        classes, masks = _concepts(job, codes, stats, first=len(labels.targets))
        if classes:
            metrics |= concepts.summarize(classes)
            objects[files.CONCEPTS] = storage.json_bytes([row.to_dict() for row in classes])
    for name, data in objects.items():
        storage.write_bytes(job.place(name), data)
        listed[name] = storage.Listed.of(data)
    acts = StoredCodes(place, _infos(records, "images"))
    acts.verify()
    listed |= tabulate.write(job, stats, acts, labels, masks, codes)
    ready()
    storage.write_json(job.place(files.METRICS), storage.seal(metrics | _identity(job), listed))


def remove_parts(job: Pass) -> None:
    """Delete the parts, which only an unfinished measurement needs."""
    place = storage.join(job.url, files.PARTS)
    if storage.exists(place):
        storage.clean_up(place, recursive=True)


def _read_records(job: Pass) -> list[PartRecord]:
    n_shards = len(job.shards.infos)
    found = [part.find_record(job, shard) for shard in range(n_shards)]
    missing = [shard for shard, record in enumerate(found) if record is None]
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        raise IncompleteError(
            f"{job.url}: {len(missing)} of {n_shards} shards are not done ({shown}). Run their "
            "parts, or the same command without --part."
        )
    records = [record for record in found if record is not None]
    for record in records:
        if record.dist_latents != records[0].dist_latents:
            raise CorruptDataError(
                f"{job.url}: shard {record.shard} kept other latents' values than shard 0. Delete "
                f"the folder {files.PARTS} in it and run the same command again."
            )
    return records


def _infos(
    records: list[PartRecord], kind: tp.Literal["codes", "dists", "images"]
) -> list[CodesInfo]:
    infos = [getattr(record, kind) for record in records]
    return [info for info in infos if info is not None]


def _listed_config(job: Pass) -> storage.Listed:
    """The entry of config.json in the list of files. It was written before all other objects."""
    job.recorded()  # raises if it is damaged
    return storage.Listed.of(storage.read_bytes(job.place(files.CONFIG)))


def _latents(stats: PartStats) -> dict[str, bytes]:
    frequency = stats.metrics.frequency().numpy()
    counts = stats.metrics.fired.numpy()
    sparsity = np.log10(frequency + LOG_FLOOR).astype(np.float32)
    means = {
        "mean_values": stats.sums.means(),
        "max_values": stats.sums.peaks(),
    }
    return {
        files.SPARSITY: safetensors.numpy.save(
            {"sparsity": sparsity, "frequency": frequency, "counts": counts}
        ),
        files.MEAN_VALUES: safetensors.numpy.save(means),
    }


def _top(job: Pass, top: Entries) -> bytes:
    counts = np.bincount(top.latent, minlength=job.sae.d_sae)
    return safetensors.numpy.save(
        {
            "indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            "example_idx": top.example_idx,
            "value": top.value,
            "token_indptr": np.concatenate([[0], np.cumsum(top.length)]).astype(np.int64),
            "token_idx": top.token_idx,
            "token_value": top.token_value,
        }
    )


def _concepts(
    job: Pass, codes: StoredCodes, stats: PartStats, first: int
) -> tuple[list[concepts.ClassAlignment], Scores]:
    side = job.sides(np.arange(job.shards.n_examples))
    found = concepts.align(codes, stats.sums.counts, side, first)
    if not found.classes:
        logger.warning("No content token is left to align latents with classes.")
    return found.classes, found.scores


def _identity(job: Pass) -> dict[str, tp.Any]:
    return {
        "d_model": job.sae.d_model,
        "d_sae": job.sae.d_sae,
        "layer": job.source.layer,
        "n_examples": len(job.source.examples),
        "content_tokens": job.shards.content_tokens,
        "shards_hash": job.shards.metadata.hash,
        "tokens": job.data.tokens,
        "source": job.shards.metadata.source(job.source.layer, job.data.tokens).to_dict(),
        "trained_on": job.trained_on and job.trained_on.to_dict(),
        **({"other_model": list(job.other_model)} if job.other_model else {}),
    }
