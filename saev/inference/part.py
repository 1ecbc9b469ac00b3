"""One shard's share of the result: computed in one pass, stored, merged in shard order."""

import concurrent.futures
import contextlib
import typing as tp

import numpy as np
import pydantic
import safetensors.numpy
import torch

from saev import storage
from saev.config.base import Config
from saev.errors import ConfigError, CorruptDataError
from saev.inference import files
from saev.inference.codes import CodesInfo, CodesWriter, Columns, TokenRows
from saev.inference.encode import Encoded, encode
from saev.inference.job import Pass
from saev.inference.topk import Entries, TopExamples
from saev.nn.metrics import ReconstructionMetrics
from saev.progress import Task
from saev.shards import finite

_PIECE_ENTRIES = 1 << 21
"""Entries that are gathered before they are turned into columns, added up and written."""


class PartRecord(Config):
    """Says that a shard is done. Written after the objects that it names."""

    key: str
    """Of the job."""
    shard: int = pydantic.Field(ge=0)
    dist_latents: tuple[int, ...]
    """Latents whose values are kept in full."""
    stats_checksum: str
    """Of the statistics."""
    codes: CodesInfo | None
    """All codes, if they are needed later."""
    dists: CodesInfo | None
    """Codes of `dist_latents`."""


class PartStats:
    """Sums over tokens, and best examples.

    Args:
        d_model: width of the activations.
        d_sae: number of latents.
        n_top: examples kept per latent.
        device: where reconstruction errors are added up.
    """

    def __init__(self, d_model: int, d_sae: int, n_top: int, device: str | torch.device = "cpu"):
        self.metrics = ReconstructionMetrics(d_model, d_sae, device)
        self.value_sums = np.zeros(d_sae)
        """Σ f per latent, float64."""
        self.max_values = np.full(d_sae, -np.inf, dtype=np.float32)
        """Largest value per latent; -inf if it never fires."""
        self.top = TopExamples(d_sae, n_top)

    def add_codes(self, columns: Columns, tokens: TokenRows) -> None:
        """Add the codes of some whole examples."""
        counts = columns.counts
        firing = np.flatnonzero(counts)
        if len(firing):
            starts = columns.indptr[firing]
            values = columns.values.astype(np.float64)
            self.value_sums[firing] += np.add.reduceat(values, starts)
            peaks = np.maximum.reduceat(columns.values, starts)
            self.max_values[firing] = np.maximum(self.max_values[firing], peaks)
        l1 = float(np.abs(columns.values).sum(dtype=np.float64))
        self.metrics.update_codes(torch.from_numpy(counts), l1)
        self.top.add(columns, tokens)

    def merge(self, other: "PartStats") -> None:
        """Add a later part. Sums are added in the order of calls."""
        self.metrics.merge(other.metrics)
        self.value_sums += other.value_sums
        np.maximum(self.max_values, other.max_values, out=self.max_values)
        self.top.merge(other.top.result())

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        metrics = {f"metrics.{k}": v.numpy() for k, v in self.metrics.tensors().items()}
        top = {f"top.{k}": v for k, v in self.top.result()._asdict().items()}
        own = {"value_sums": self.value_sums, "max_values": self.max_values}
        return safetensors.numpy.save(metrics | top | own)

    @classmethod
    def from_bytes(cls, data: bytes, n_top: int, source: str) -> "PartStats":
        """Inverse of :meth:`to_bytes`. Raises CorruptDataError."""
        tensors = storage.parse_tensors(data, source, remedy="Delete the folder.")
        with storage.parsed(source, "the statistics of a shard", remedy="Delete the folder."):
            fields = {k: tensors[f"top.{k}"] for k in Entries._fields}
            prefix = "metrics."
            sums = {
                k.removeprefix(prefix): torch.from_numpy(v)
                for k, v in tensors.items()
                if k.startswith(prefix)
            }
            metrics = ReconstructionMetrics.from_tensors(sums)
            self = cls(metrics.d_model, metrics.d_sae, n_top)
            self.value_sums, self.max_values = tensors["value_sums"], tensors["max_values"]
        self.metrics = metrics
        self.top.merge(Entries(**fields))
        return self


# --- Storing -------------------------------------------------------------------------------


def _place(job: Pass, shard: int, suffix: str) -> str:
    return storage.join(job.url, files.PARTS, f"{shard:06d}.{suffix}")


def find_record(job: Pass, shard: int) -> PartRecord | None:
    """A shard's record for these inputs; None if the shard is not done.

    Raises:
        CorruptDataError: the record is damaged.
    """
    place = _place(job, shard, "json")
    if not storage.exists(place):
        return None
    remedy = "Delete it and run the same command again."
    raw = storage.read_sealed(place, remedy=remedy).record
    try:
        record = PartRecord.from_dict(raw, source=place)
    except ConfigError as err:
        raise CorruptDataError(f"{err} {remedy}") from err
    return record if record.key == job.key else None


def read_stats(job: Pass, record: PartRecord) -> PartStats:
    """A shard's statistics. Raises CorruptDataError."""
    place = _place(job, record.shard, "safetensors")
    remedy = f"Delete {_place(job, record.shard, 'json')} and run the same command again."
    data = storage.read_verified(place, record.stats_checksum, remedy)
    return PartStats.from_bytes(data, job.cfg.n_top, place)


# --- Computing -----------------------------------------------------------------------------


def compute(job: Pass, shard: int, dist_latents: tuple[int, ...], task: Task) -> None:
    """Run the SAE over one shard and store its part, the record last.

    Raises:
        CorruptDataError: the shard is damaged, or something is not finite.
    """
    device = job.sae.W_enc.device
    stats = PartStats(job.sae.d_model, job.sae.d_sae, job.cfg.n_top, device)
    with contextlib.ExitStack() as stack:
        codes = dists = None
        if job.keeps_codes:
            codes = _open_codes(stack, job, shard, "codes", job.sae.d_sae)
        if dist_latents:
            dists = _open_codes(stack, job, shard, "dists", len(dist_latents))

        def keep(steps: list[_Step]) -> None:
            columns, tokens = _join(steps, job.sae.d_sae)
            stats.add_codes(columns, tokens)
            if codes:
                codes.append(columns, tokens)
            if dists:
                dists.append(columns.select(np.array(dist_latents)), tokens)

        # One thread, so that pieces come in order; one piece waits, so that memory is bounded.
        worker = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1, "saev-codes"))
        pending: concurrent.futures.Future[None] | None = None
        for steps in _pieces(job, shard, stats, task):
            if pending is not None:
                pending.result()
            pending = worker.submit(keep, steps)
        if pending is not None:
            pending.result()
    error = float(stats.metrics.sq_error)
    if not np.isfinite(error):
        raise CorruptDataError(
            f"{storage.join(job.shards.url, job.shards.infos[shard].name)}: the reconstruction "
            f"error is {error}, so its activations or the SAE's weights hold NaN or infinity."
        )
    data = stats.to_bytes()
    storage.write_bytes(_place(job, shard, "safetensors"), data)
    record = PartRecord(
        key=job.key,
        shard=shard,
        dist_latents=dist_latents,
        stats_checksum=storage.format_checksum(storage.crc32c(data)),
        codes=codes.info() if codes else None,
        dists=dists.info() if dists else None,
    )
    storage.write_json(_place(job, shard, "json"), storage.seal(record.to_dict()))


def _open_codes(
    stack: contextlib.ExitStack, job: Pass, shard: int, suffix: str, n_latents: int
) -> CodesWriter:
    place = _place(job, shard, suffix)
    handle = stack.enter_context(storage.open_write(place))
    return CodesWriter(handle, storage.name(place), n_latents)


_Step = tuple[Encoded, TokenRows]


def _pieces(job: Pass, shard: int, stats: PartStats, task: Task) -> tp.Iterator[list[_Step]]:
    """Codes of a shard in pieces; reconstruction errors go into ``stats`` meanwhile."""
    steps: list[_Step] = []
    held = 0
    for chunk in job.source.chunks(job.source.shard_examples(shard), job.examples_per_step):
        x = chunk.x.to(job.sae.W_enc.device)
        row = finite.bad_row(x)
        if row is not None:
            example = int(chunk.tokens.example_idx[row])
            raise finite.error(job.shards, example, job.source.layer)
        step = encode(job.sae, x)
        stats.metrics.update_reconstruction(x, step.x_hat)
        steps.append((step._replace(x_hat=step.x_hat[:0]), chunk.tokens))
        held += len(step.values)
        task.advance(len(x), n_bytes=chunk.x.numel() * job.shards.dtype.itemsize)
        if held >= _PIECE_ENTRIES:
            yield steps
            steps, held = [], 0
    if steps:
        yield steps


def _join(steps: list[_Step], d_sae: int) -> tuple[Columns, TokenRows]:
    row_nnz, latents, values = (
        np.concatenate([getattr(step, name) for step, _ in steps])
        for name in ("row_nnz", "latents", "values")
    )
    tokens = TokenRows.concatenate([tokens for _, tokens in steps])
    return Columns.from_rows(row_nnz, latents, values, d_sae), tokens
