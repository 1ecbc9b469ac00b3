"""Writing a shard: a file in layer-first order, with its checksums and moments.

Batches come as ``[layer, example, ...]`` in the order of examples. The file holds all examples of
the first layer, then all of the second layer, and so on. So each layer is written at its own
offset. One thread per layer writes, and computes checksums and moments, while the model computes
the next batch.
"""

import concurrent.futures
import contextlib
import dataclasses
import types
import typing as tp

import numpy as np
from jaxtyping import Float, Float64, UInt32
from torch import Tensor

from saev import storage
from saev.errors import ConfigError, ModelError
from saev.shards.protocol import Layout, Metadata
from saev.shards.reader import TORCH_DTYPES

_MAX_THREADS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the stored vectors. The order of addition does not depend on the batch size."""

    total: Float64[np.ndarray, "n_layers d_model"]
    """Sum of the vectors."""
    sq_total: Float64[np.ndarray, "n_layers d_model"]
    """Sum of their squares, per dimension."""
    count: int
    """Vectors per layer."""

    @classmethod
    def zero(cls, n_layers: int, d_model: int) -> "Moments":
        """The moments of no vectors."""
        return cls(np.zeros((n_layers, d_model)), np.zeros((n_layers, d_model)), 0)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.total + other.total, self.sq_total + other.sq_total, self.count + other.count
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """Facts about a written shard."""

    n_examples: int
    """Examples in the file."""
    checksums: UInt32[np.ndarray, "n_layers n_examples"]
    """CRC-32C of every example in every layer."""
    content: Moments
    """Moments of the content tokens."""
    special: Moments
    """Moments of the class token."""


def file_checksum(layout: Layout, checksums: UInt32[np.ndarray, "n_layers n_examples"]) -> str:
    """Checksum of a shard file, computed from the checksums of its examples."""
    return storage.format_checksum(
        storage.concatenate(map(int, checksums.ravel()), layout.row_bytes)
    )


class ShardWriter:
    """Writes one shard file. It is published when the block ends without an error.

    Args:
        url: the file.
        metadata: metadata of the recording.
        capacity: most examples. The file is shortened if there are fewer.

    Raises:
        StorageError: the file cannot be written.
        ModelError: an activation is not finite.
    """

    def __init__(self, url: str, metadata: Metadata, capacity: int):
        self.url = storage.normalize(url)
        self._metadata = metadata
        self._capacity = capacity
        self._layout = Layout.of(metadata, capacity)
        self._n = 0
        shape = (len(metadata.layers), capacity)
        self._checksums = np.zeros(shape, dtype=np.uint32)
        self._content = Moments.zero(len(metadata.layers), metadata.d_model)
        self._special = Moments.zero(len(metadata.layers), metadata.d_model)
        self._busy: list[concurrent.futures.Future[None]] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> tp.Self:
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(storage.open_write_at(self.url))
            n_threads = max(1, min(len(self._metadata.layers), _MAX_THREADS))
            self._pool = concurrent.futures.ThreadPoolExecutor(
                n_threads, thread_name_prefix="saev-write"
            )
            # Threads end before the file is closed, also after an error.
            stack.callback(self._pool.shutdown, wait=True, cancel_futures=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._wait()
            self._close_gaps()

    def write(self, acts: Float[Tensor, "n_layers batch tokens d_model"]) -> None:
        """Append examples. Returns before they are written, so the tensor must not change later.

        Raises:
            ConfigError: shape or dtype do not fit the metadata, or there are too many examples.
            StorageError, ModelError: writing an earlier batch failed.
        """
        meta = self._metadata
        n = acts.shape[1] if acts.ndim == 4 else 0
        expected = (len(meta.layers), n, meta.tokens_per_example, meta.d_model)
        if (
            acts.ndim != 4
            or tuple(acts.shape) != expected
            or acts.dtype != TORCH_DTYPES[meta.dtype]
        ):
            raise ConfigError(
                f"A batch for {self.url} is {tuple(acts.shape)} {acts.dtype}, expected {expected} "
                f"{TORCH_DTYPES[meta.dtype]}."
            )
        if self._n + n > self._capacity:
            raise ConfigError(
                f"{self.url} has room for {self._capacity} examples, {self._n + n} were written."
            )
        self._wait()  # batches of one layer must be written in order
        start, self._n = self._n, self._n + n
        for index in range(len(meta.layers)):
            self._busy.append(self._pool.submit(self._write_layer, index, start, acts[index]))

    @property
    def written(self) -> Written:
        """Facts about the shard. Valid after the block has ended."""
        meta = self._metadata
        return Written(
            self._n,
            self._checksums[:, : self._n].copy(),
            dataclasses.replace(self._content, count=self._n * meta.content_tokens_per_example),
            dataclasses.replace(self._special, count=self._n * int(meta.cls_token)),
        )

    def _wait(self) -> None:
        busy, self._busy = self._busy, []
        for future in busy:
            future.result()

    def _write_layer(self, index: int, start: int, acts: Tensor) -> None:
        rows = _as_numpy(acts)
        if not rows.nbytes:
            return
        self._file.write(self._layout.offset(index, start), rows)
        n_special = int(self._metadata.cls_token)
        for i, row in enumerate(rows, start):
            self._checksums[index, i] = storage.crc32c(row)
            values = _as_float64(row, self._metadata.dtype)
            finite = _add(self._special, index, values[:n_special])
            if not (_add(self._content, index, values[n_special:]) and finite):
                raise self._not_finite(index, i)

    def _not_finite(self, index: int, example: int) -> ModelError:
        dtype = self._metadata.dtype
        remedy = (
            "float16 ends at 65504; record with --dtype bfloat16 or float32."
            if dtype == "float16"
            else "Check the checkpoint and the image; with --amp, try without."
        )
        return ModelError(
            f"Layer {self._metadata.layers[index]} of {self._metadata.family} "
            f"{self._metadata.ckpt} is NaN or infinite for example {example} of "
            f"{storage.name(self.url)}, as {dtype}. {remedy}"
        )

    def _close_gaps(self) -> None:
        """Move the layers together if there are fewer examples than the capacity."""
        layout = Layout.of(self._metadata, self._n)
        for index in range(1, layout.n_layers if self._n < self._capacity else 0):
            length = layout.n_examples * layout.row_bytes
            self._file.move(self._layout.offset(index, 0), layout.offset(index, 0), length)
        self._file.truncate(layout.n_bytes)


def _as_numpy(acts: Tensor) -> np.ndarray:
    """The values as an array; for bfloat16, which numpy lacks, their bits as uint16."""
    acts = acts.contiguous()
    if acts.dtype == TORCH_DTYPES["bfloat16"]:
        return acts.view(TORCH_DTYPES["float16"]).numpy().view(np.uint16)
    return acts.numpy()


def _as_float64(row: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":  # the upper half of a float32
        row = (row.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return row.astype(np.float64)


def _add(moments: Moments, index: int, values: Float64[np.ndarray, "tokens d_model"]) -> bool:
    """Add an example's vectors to the sums (not the count) of a layer. Overwrites ``values``.

    Sums are over the first axis of a row-major array. There numpy adds row by row, so the bits do
    not depend on the batch size or the processor.

    Returns:
        Whether all values are finite.
    """
    if not len(values):
        return True
    moments.total[index] += values.sum(axis=0)
    np.square(values, out=values)
    squares = values.sum(axis=0)
    moments.sq_total[index] += squares
    return bool(np.isfinite(squares).all())
