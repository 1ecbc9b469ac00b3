"""One shard's share of the results: computed in one pass for all SAEs that read the same tokens,
stored for each of them, merged in shard order."""

import collections
import concurrent.futures
import contextlib
import typing as tp

import numpy as np
import pydantic
import safetensors.numpy
import torch
from torch import Tensor

from saev import storage
from saev.config.base import Config
from saev.errors import ConfigError, CorruptDataError
from saev.grouping import group_by
from saev.inference import files, sides
from saev.inference.codes import CodesInfo, CodesWriter, Columns, TokenRows
from saev.inference.images import ImageActs
from saev.inference.job import Pass
from saev.inference.sums import LatentSums
from saev.inference.topk import Entries, TopExamples, by_chance
from saev.limits import PIECE_ENTRIES, SPREAD_EXAMPLES
from saev.nn.codes import encode
from saev.nn.metrics import ReconstructionMetrics, Vectors
from saev.progress import Task
from saev.shards import finite

Alone = tp.Callable[[Pass], contextlib.AbstractContextManager[None]]

_PIECE_ENTRIES = PIECE_ENTRIES
_MAX_WAITING = 2


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
    images: CodesInfo | None = None
    """The largest and mean value of each latent on each image; None in a record of an earlier
    version, whose shard is done again."""


class ImageRows(tp.NamedTuple):
    """What is known of each image, whatever latents fire on it."""

    example_idx: np.ndarray
    """int64 [n_images], ascending."""
    n_tokens: np.ndarray
    """Selected tokens, int64 [n_images]."""
    n_active: np.ndarray
    """Active latents, summed over tokens, int64 [n_images]."""
    sq_error: np.ndarray
    """Σ‖x − x̂‖² over tokens, float64 [n_images]."""


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
        self.sums = LatentSums(d_sae)
        """Of all tokens."""
        self.held_out = LatentSums(d_sae)
        """Of tokens of held-out images."""
        self.top = TopExamples(d_sae, n_top)
        self.spread = TopExamples(d_sae, SPREAD_EXAMPLES, by_chance)
        """A sample of the examples on which each latent fires."""
        self._images: list[ImageRows] = []
        self._embeddings = [np.zeros((0, d_model), dtype=np.float32)]

    @property
    def images(self) -> ImageRows:
        """All images, in dataset order."""
        empty = ImageRows(*(np.zeros(0, kind) for kind in ("i8", "i8", "i8", "f8")))
        return ImageRows(*(np.concatenate(f) for f in zip(empty, *self._images, strict=True)))

    @property
    def embeddings(self) -> np.ndarray:
        """Of the images of :func:`saev.inference.embeddings.sample`, float32 [n, d_model]."""
        return np.concatenate(self._embeddings)

    def embed(self, vectors: np.ndarray) -> None:
        """Add the embeddings of the next images."""
        self._embeddings.append(vectors)

    def add_codes(
        self,
        columns: Columns,
        tokens: TokenRows,
        sq_errors: np.ndarray | None = None,
        held_out: np.ndarray | None = None,
    ) -> ImageActs:
        """Add the codes of some whole examples.

        Args:
            columns: codes.
            tokens: which tokens the rows are.
            sq_errors: ‖x − x̂‖² of each token, float64 [n_rows].
            held_out: whether each token is of a held-out image, bool [n_rows].

        Returns:
            The codes by image.
        """
        images = ImageActs.of(columns, tokens)
        self.sums.add(columns, images.columns.counts, len(tokens.label), len(images.example_idx))
        l1 = float(np.abs(columns.values).sum(dtype=np.float64))
        self.metrics.update_codes(torch.from_numpy(columns.counts), l1)
        self.top.add(columns, tokens, images)
        self.spread.add(columns, tokens, images)
        ends = np.cumsum(images.n_tokens)
        if held_out is not None and held_out.any():
            by_image = held_out[ends - 1]
            counts = images.columns.where(by_image).counts
            n_tokens, n_images = int(held_out.sum()), int(by_image.sum())
            self.held_out.add(columns.where(held_out), counts, n_tokens, n_images)
        if sq_errors is not None and len(ends):
            n_active = np.bincount(columns.rows, minlength=len(tokens.label))
            starts = ends - images.n_tokens
            sums = (np.add.reduceat(each, starts) for each in (n_active, sq_errors))
            self._images.append(ImageRows(images.example_idx, images.n_tokens, *sums))
        return images

    def merge(self, other: "PartStats") -> None:
        """Add a later part. Sums are added in the order of calls."""
        self.metrics.merge(other.metrics)
        self.sums.merge(other.sums)
        self.held_out.merge(other.held_out)
        self.top.merge(other.top.result())
        self.spread.merge(other.spread.result())
        self._images += other._images
        self._embeddings += other._embeddings

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        groups: dict[str, tp.Mapping[str, np.ndarray]] = {
            "metrics": {k: v.numpy() for k, v in self.metrics.tensors().items()},
            "sums": self.sums.tensors(),
            "held_out": self.held_out.tensors(),
            "top": self.top.result()._asdict(),
            "spread": self.spread.result()._asdict(),
            "images": self.images._asdict(),
            "sample": {"embeddings": self.embeddings},
        }
        tensors = {f"{g}.{k}": v for g, group in groups.items() for k, v in group.items()}
        return safetensors.numpy.save(tensors)

    @classmethod
    def from_bytes(cls, data: bytes, n_top: int, source: str) -> "PartStats":
        """Inverse of :meth:`to_bytes`. Raises CorruptDataError."""
        tensors = storage.parse_tensors(data, source, remedy="Delete the folder.")

        def group(name: str) -> dict[str, np.ndarray]:
            prefix = f"{name}."
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        with storage.parsed(source, "the statistics of a shard", remedy="Delete the folder."):
            metrics = ReconstructionMetrics.from_tensors(
                {k: torch.from_numpy(v) for k, v in group("metrics").items()}
            )
            self = cls(metrics.d_model, metrics.d_sae, n_top)
            self.sums = LatentSums.from_tensors(group("sums"))
            self.held_out = LatentSums.from_tensors(group("held_out"))
            self.top.merge(Entries(**group("top")))
            self.spread.merge(Entries(**group("spread")))
            self._images = [ImageRows(**group("images"))]
            self._embeddings = [tensors["sample.embeddings"]]
        self.metrics = metrics
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
    return record if record.key == job.key and record.images is not None else None


def read_stats(job: Pass, record: PartRecord) -> PartStats:
    """A shard's statistics. Raises CorruptDataError."""
    place = _place(job, record.shard, "safetensors")
    remedy = f"Delete {_place(job, record.shard, 'json')} and run the same command again."
    data = storage.read_verified(place, record.stats_checksum, remedy)
    return PartStats.from_bytes(data, job.cfg.n_top, place)


# --- Computing -----------------------------------------------------------------------------


def compute(members: tp.Sequence[Pass], shard: int, task: Task, alone: Alone) -> None:
    """Run SAEs over one shard and store the part of each, its record last.

    Every SAE sees the same steps, and so gives the same bytes, whoever else is measured with it.

    Args:
        members: of one group: they read the same tokens. Their config.json is there.
        shard: which one.
        task: is advanced by the tokens of the shard.
        alone: for an SAE, a block whose errors end the work for this SAE only.

    Raises:
        CorruptDataError: the shard is damaged, or something in it is not finite.
    """
    source, device = members[0].source, members[0].device
    vectors = Vectors(device)
    with contextlib.ExitStack() as stack:
        shares: dict[Pass, _Share] = {}
        for one in members:
            with alone(one):
                shares[one] = stack.enter_context(_Share(one, shard))
        if not shares:  # another worker was faster
            return
        with _Writing() as writing:
            by_size = group_by(shares, lambda one: one.examples_per_step)
            first = next(iter(by_size))
            embedder = members[0].embedder(shard)
            for size, chunk in source.chunks(source.shard_examples(shard), [*by_size], device):
                x, tokens = chunk
                if not bool(vectors.load(x).total.isfinite().all()):
                    row = tp.cast(int, finite.bad_row(x))
                    example = int(tokens.example_idx[row])
                    raise finite.error(members[0].shards, example, source.layer)
                for one in by_size[size]:
                    if shares[one].add(x, tokens, vectors):
                        writing.submit(shares[one].take())
                if size == first:
                    if embedder.is_read_anyway:
                        embedder.add(x, tokens)
                    n_bytes = x.numel() * members[0].shards.dtype.itemsize
                    task.advance(len(x), n_bytes=n_bytes)
            for share in shares.values():
                writing.submit(share.take())
            if not embedder.is_read_anyway:
                embedder.read(members[0].embedding_source)
        for one, share in shares.items():
            with alone(one):
                share.write(embedder.result())


class _Codes(tp.NamedTuple):
    """Codes of one step."""

    row_nnz: np.ndarray
    """Active latents per token, int64 [n]."""
    latents: np.ndarray
    """Active latents, token after token, int32 [nnz]."""
    values: np.ndarray
    """Their values, float32 [nnz]."""
    tokens: TokenRows
    """Which tokens they are."""
    sq_errors: np.ndarray
    """‖x − x̂‖² of each, float64 [n]."""


class _Share:
    """What one SAE gives for a shard. Files that :meth:`write` has not published are dropped.

    Args:
        job: the SAE.
        shard: which one.
    """

    def __init__(self, job: Pass, shard: int):
        self._job, self._shard = job, shard
        sae = job.sae
        self._stats = PartStats(sae.d_model, sae.d_sae, job.cfg.n_top, sae.W_enc.device)
        self._dist_latents = job.dist_latents
        self._codes: CodesWriter | None = None
        self._dists: CodesWriter | None = None
        self._images: CodesWriter
        self._files = contextlib.ExitStack()
        self._steps: list[_Codes] = []
        self._held = 0
        self._error: Exception | None = None

    def __enter__(self) -> tp.Self:
        with contextlib.ExitStack() as files_:
            self._images = self._open(files_, "images", self._job.sae.d_sae, by_image=True)
            if self._job.keeps_codes:
                self._codes = self._open(files_, "codes", self._job.sae.d_sae)
            if self._dist_latents:
                self._dists = self._open(files_, "dists", len(self._dist_latents))
            self._files = files_.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(_DroppedError), self._files:
            raise _DroppedError

    def _open(
        self, stack: contextlib.ExitStack, suffix: str, n_latents: int, *, by_image: bool = False
    ) -> CodesWriter:
        place = _place(self._job, self._shard, suffix)
        handle = stack.enter_context(storage.open_write(place))
        return CodesWriter(handle, storage.name(place), n_latents, by_image=by_image)

    def add(self, x: Tensor, tokens: TokenRows, vectors: Vectors) -> bool:
        """Do a step.

        Returns:
            Whether a piece is complete, which is then to be taken.
        """
        if self._error is not None:
            return False
        found = encode(self._job.sae, x)
        errors = self._stats.metrics.add(vectors, found.x_hat).cpu().numpy()
        row_nnz, latents, values = (side.cpu().numpy() for side in found[:3])
        self._steps.append(_Codes(row_nnz, latents, values, tokens, errors))
        self._held += len(values)
        return self._held >= _PIECE_ENTRIES

    def take(self) -> tp.Callable[[], None]:
        """Returns what keeps the codes of all steps since the last call, in another thread."""
        steps, self._steps, self._held = self._steps, [], 0
        return lambda: self._keep(steps)

    def _keep(self, steps: list[_Codes]) -> None:
        if not steps or self._error is not None:
            return
        try:
            self._add_codes(steps)
        except Exception as err:  # raised in write(), since only this SAE has failed
            self._error = err

    def _add_codes(self, steps: list[_Codes]) -> None:
        tokens = TokenRows.concatenate([step.tokens for step in steps])
        columns = Columns.from_rows(
            np.concatenate([step.row_nnz for step in steps]),
            np.concatenate([step.latents for step in steps]),
            np.concatenate([step.values for step in steps]),
            self._job.sae.d_sae,
        )
        errors = np.concatenate([step.sq_errors for step in steps])
        steps.clear()  # their memory is free from here on
        held_out = self._job.sides(tokens.example_idx) == sides.HELD_OUT
        images = self._stats.add_codes(columns, tokens, errors, held_out)
        self._images.append_images(images.columns, images.means, images.example_idx)
        if self._codes:
            self._codes.append(columns, tokens)
        if self._dists:
            self._dists.append(columns.select(np.array(self._dist_latents)), tokens)

    def write(self, embedded: np.ndarray) -> None:
        """Store the codes and the statistics, then the record.

        Args:
            embedded: embeddings of the shard's images.

        Raises:
            CorruptDataError: the weights are not finite.
            StorageError: something could not be written.
        """
        if self._error is not None:
            with self._files:  # which explain errors of the operating system
                raise self._error
        job, shard = self._job, self._shard
        error = float(self._stats.metrics.sq_error)
        if not np.isfinite(error):
            raise CorruptDataError(
                f"{storage.join(job.shards.url, job.shards.infos[shard].name)}: the reconstruction "
                f"error of the SAE at {job.run} is {error}, so its weights hold NaN or infinity. "
                "Leave it out, or restore its checkpoint."
            )
        self._files.close()
        self._stats.embed(embedded)
        data = self._stats.to_bytes()
        storage.write_bytes(_place(job, shard, "safetensors"), data)
        record = PartRecord(
            key=job.key,
            shard=shard,
            dist_latents=self._dist_latents,
            stats_checksum=storage.format_checksum(storage.crc32c(data)),
            codes=self._codes.info() if self._codes else None,
            dists=self._dists.info() if self._dists else None,
            images=self._images.info(),
        )
        storage.write_json(_place(job, shard, "json"), storage.seal(record.to_dict()))


class _DroppedError(Exception):
    """Ends files that are not to be published."""


class _Writing:
    """Does what it is given one after the other in a thread, so that pieces come in order.

    At most two pieces wait, so that memory does not grow with the number of SAEs.
    """

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "saev-codes")
        self._pending: collections.deque[concurrent.futures.Future[None]] = collections.deque()

    def submit(self, keep: tp.Callable[[], None]) -> None:
        """Do this, too. Raises what an earlier one raised."""
        while len(self._pending) >= _MAX_WAITING or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(keep))

    def __enter__(self) -> tp.Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
