"""Reading a shards folder of either protocol."""

import collections
import dataclasses
import functools
import io
import os
import threading
import typing as tp

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import torch
from safetensors.numpy import load as load_safetensors
from torch import Tensor

from saev import storage
from saev.config.base import Tokens
from saev.errors import ConfigError, CorruptDataError, IncompleteError, StorageError
from saev.shards import protocol
from saev.shards.protocol import Layout, Metadata, ShardInfo

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

DIRECT_IO = "SAEV_DIRECT_IO"
"""Environment variable: 1 reads activations on local disks past the page cache."""
_MAX_OPEN_FILES = 64
"""Per folder. A folder may have more shards than a process may have open files (often 1024)."""

_REMEDY = (
    "Restore it from a copy, or delete the folder and run the same `saev shards` command again."
)


@dataclasses.dataclass(frozen=True)
class LayerStats:
    """Moments of the recorded vectors of one layer, over the whole folder."""

    mean: np.ndarray
    """Mean vector, float64 [d_model]."""
    mean_sq_norm: float
    """Mean of the squared L2 norms."""
    count: int
    """Vectors."""

    @property
    def centred_sq_norm(self) -> float:
        """Mean squared distance from the mean: E‖x‖² − ‖E x‖²."""
        return max(0.0, self.mean_sq_norm - float(self.mean @ self.mean))


class Shards:
    """A complete shards folder, opened for reading. Safe to use from many threads.

    Use :meth:`open`.
    """

    def __init__(
        self,
        url: str,
        metadata: Metadata,
        infos: tuple[ShardInfo, ...],
        found: tp.Mapping[str, storage.Entry] | None = None,
    ):
        self.url = url
        self.metadata = metadata
        self.infos = infos
        self._found = found or {}
        self.layouts = tuple(Layout.of(metadata, info.n_examples) for info in infos)
        counts = [info.n_examples for info in infos]
        self.shard_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._readers: collections.OrderedDict[int, storage.RangeReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, url: str) -> "Shards":
        """Open a folder and check that it is complete and that its files have the right sizes.

        Raises:
            StorageError: there is no such folder, or it is no shards folder.
            IncompleteError: recording was never finished.
            CorruptDataError: a file is missing, too short or too long, or metadata is damaged.
        """
        url = storage.normalize(url)
        if not storage.is_dir(url):
            raise StorageError(f"No shards folder at {url}: it does not exist. Check the URL.")
        found = {entry.name: entry for entry in storage.list_dir(url) if not entry.is_dir}
        if protocol.METADATA not in found:
            raise StorageError(
                f"{url} is not a shards folder: it has no {protocol.METADATA}. "
                "Give the folder that `saev shards` printed."
            )
        if protocol.SHARDS not in found:
            raise IncompleteError(
                f"{url} is incomplete: {protocol.SHARDS} is missing, so recording did not finish. "
                "Run the same `saev shards` command again; it continues where it stopped."
            )
        metadata = Metadata.read(url)
        infos = _read_infos(storage.join(url, protocol.SHARDS))
        shards = cls(url, metadata, infos, found)
        shards._check_sizes({name: entry.size for name, entry in found.items()})
        return shards

    # --- What is in it ---------------------------------------------------------------------

    @property
    def n_examples(self) -> int:
        """Recorded examples."""
        return int(self.shard_starts[-1])

    @property
    def layers(self) -> tuple[int, ...]:
        """Recorded block numbers."""
        return self.metadata.layers

    @property
    def d_model(self) -> int:
        """Width of one vector."""
        return self.metadata.d_model

    @property
    def content_tokens(self) -> int:
        """Content tokens per example."""
        return self.metadata.content_tokens_per_example

    @property
    def tokens_per_example(self) -> int:
        """Recorded tokens per example."""
        return self.metadata.tokens_per_example

    @property
    def dtype(self) -> torch.dtype:
        """Stored precision."""
        return TORCH_DTYPES[self.metadata.dtype]

    def layer_index(self, layer: int | None) -> int:
        """Position of a block among the recorded ones; None means the only one.

        Raises:
            ConfigError: it was not recorded, or None is ambiguous.
        """
        recorded = ", ".join(map(str, self.layers))
        if layer is None:
            if len(self.layers) == 1:
                return 0
            raise ConfigError(f"{self.url} has layers {recorded}; say which one (--….layer).")
        if layer not in self.layers:
            raise ConfigError(f"Layer {layer} was not recorded in {self.url}; it has {recorded}.")
        return self.layers.index(layer)

    def locate(self, example_idx: int) -> tuple[int, int]:
        """Shard and position in it of an example."""
        if not 0 <= example_idx < self.n_examples:
            raise ConfigError(
                f"Example {example_idx} is not in {self.url}: it has {self.n_examples}."
            )
        shard = int(np.searchsorted(self.shard_starts, example_idx, side="right")) - 1
        return shard, example_idx - int(self.shard_starts[shard])

    # --- Activations -----------------------------------------------------------------------

    def read(
        self,
        shard: int,
        layer: int | None,
        start: int,
        stop: int,
        out: Tensor | None = None,
        *,
        verify: bool = True,
    ) -> Tensor:
        """Vectors of consecutive examples of one layer.

        Args:
            shard: shard number.
            layer: block number as recorded.
            start: first example, counted inside the shard.
            stop: last example + 1.
            out: where to put them: contiguous, on the CPU, in the stored dtype.
            verify: compare with the recorded checksums (protocol 3.0).

        Returns:
            [stop - start, tokens_per_example, d_model] in the stored dtype; ``out`` if given.

        Raises:
            CorruptDataError: the file ends early or a checksum differs.
        """
        layout = self.layouts[shard]
        shape = (max(0, stop - start), layout.tokens, layout.d_model)
        if out is None:
            out = torch.empty(shape, dtype=self.dtype)
        elif out.shape != shape or out.dtype != self.dtype or not out.is_contiguous():
            raise ConfigError(
                f"out is {tuple(out.shape)} {out.dtype}, expected {shape} {self.dtype}."
            )
        self.read_bytes(shard, layer, start, stop, raw_bytes(out), verify=verify)
        return out

    def read_bytes(
        self,
        shard: int,
        layer: int | None,
        start: int,
        stop: int,
        raw: memoryview,
        *,
        verify: bool = True,
    ) -> None:
        """:meth:`read` into plain memory of just the right size.

        Raises:
            ConfigError: there are no such examples, or the memory has another size.
            CorruptDataError: the file ends early or a checksum differs.
        """
        layout, index = self.layouts[shard], self.layer_index(layer)
        if not 0 <= start <= stop <= layout.n_examples:
            raise ConfigError(
                f"Examples {start}:{stop} are not in {self.infos[shard].name}: "
                f"it has {layout.n_examples}."
            )
        if raw.nbytes != (stop - start) * layout.row_bytes:
            raise ConfigError(
                f"Examples {start}:{stop} have {(stop - start) * layout.row_bytes} bytes, the "
                f"memory for them has {raw.nbytes}."
            )
        if not raw.nbytes:
            return
        reader = self._reader(shard)
        if layout.contiguous:
            reader.readinto(layout.offset(index, start), raw)
        else:
            for i in range(stop - start):
                row = raw[i * layout.row_bytes : (i + 1) * layout.row_bytes]
                reader.readinto(layout.offset(index, start + i), row)
        if verify and self._checksums is not None:
            self._verify(shard, index, start, stop, raw)

    def read_vector(
        self, shard: int, layer: int | None, example: int, token: int, out: Tensor
    ) -> None:
        """One vector into ``out``, [d_model], contiguous, on the CPU, in the stored dtype.

        Checksums are of whole examples, so this is not compared with one; :meth:`read` is.

        Args:
            shard: shard number.
            layer: block number as recorded.
            example: counted inside the shard.
            token: as recorded: the class token, if there is one, is token 0.
            out: where to put it.

        Raises:
            ConfigError: there is no such vector, or ``out`` does not fit.
            CorruptDataError: the file ends early.
        """
        layout, index = self.layouts[shard], self.layer_index(layer)
        if not (0 <= example < layout.n_examples and 0 <= token < layout.tokens):
            raise ConfigError(
                f"Example {example}, token {token} is not in {self.infos[shard].name}: it has "
                f"{layout.n_examples} examples of {layout.tokens} tokens."
            )
        if out.shape != (layout.d_model,) or out.dtype != self.dtype or not out.is_contiguous():
            raise ConfigError(
                f"out is {tuple(out.shape)} {out.dtype}, expected ({layout.d_model},) {self.dtype}."
            )
        self._reader(shard).readinto(layout.offset(index, example, token), raw_bytes(out))

    def _verify(self, shard: int, index: int, start: int, stop: int, raw: memoryview) -> None:
        assert self._checksums is not None
        layout = self.layouts[shard]
        first = int(self.shard_starts[shard]) * layout.n_layers + index * layout.n_examples
        expected = self._checksums[first + start : first + stop].tolist()
        # One call for all of them: between calls, threads hand the interpreter's lock around.
        if storage.crc32c(raw) == storage.concatenate(expected, layout.row_bytes):
            return
        for i, want in enumerate(expected):
            found = storage.crc32c(raw[i * layout.row_bytes : (i + 1) * layout.row_bytes])
            if found != want:
                raise CorruptDataError(
                    f"{storage.join(self.url, self.infos[shard].name)} is damaged: "
                    f"layer {self.layers[index]}, example {start + i} of the shard has checksum "
                    f"{storage.format_checksum(found)}, expected "
                    f"{storage.format_checksum(want)}. {_REMEDY}"
                )

    @functools.cached_property
    def _checksums(self) -> np.ndarray | None:
        """uint32, per shard [layer, example], shards one after another."""
        if self.metadata.protocol != "3.0":
            return None
        place = storage.join(self.url, protocol.CHECKSUMS)
        data = storage.read_bytes(place)
        expected = 4 * self.n_examples * len(self.layers)
        if len(data) != expected:
            raise CorruptDataError(f"{place} has {len(data)} bytes, expected {expected}. {_REMEDY}")
        return np.frombuffer(data, dtype="<u4")

    def verify(self) -> None:
        """Read every file whole and compare it with its checksum in shards.json.

        Raises:
            CorruptDataError: names the first file that differs.
        """
        for info in self.infos:
            if info.checksum is None:
                continue
            place = storage.join(self.url, info.name)
            found = storage.checksum(place)
            if found != info.checksum:
                raise CorruptDataError(
                    f"{place} is damaged: checksum {found}, expected {info.checksum}. {_REMEDY}"
                )

    def _reader(self, shard: int) -> storage.RangeReader:
        with self._lock:
            reader = self._readers.get(shard)
            if reader is None:
                reader = self._readers[shard] = self._open(self.infos[shard].name)
                if len(self._readers) > _MAX_OPEN_FILES:  # closed when its last reader is done
                    self._readers.popitem(last=False)
            self._readers.move_to_end(shard)
            return reader

    def _open(self, name: str) -> storage.RangeReader:
        entry = self._found.get(name)
        return storage.RangeReader(
            storage.join(self.url, name),
            size=None if entry is None else entry.size,
            etag="" if entry is None else entry.etag,
            cache=storage.node_cache(),
            direct=os.environ.get(DIRECT_IO, "") not in ("", "0"),
        )

    def close(self) -> None:
        """Release file descriptors, those in use when their reads end.

        The object may be used again; it reopens what it needs.
        """
        with self._lock:
            self._readers.clear()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- What goes with them ---------------------------------------------------------------

    @property
    def has_labels(self) -> bool:
        """Whether content tokens have labels."""
        return storage.exists(storage.join(self.url, protocol.LABELS))

    def labels(self) -> np.ndarray | None:
        """Labels of content tokens, uint8 [n_examples, content_tokens], or None."""
        if not self.has_labels:
            return None
        place = storage.join(self.url, protocol.LABELS)
        values = np.frombuffer(storage.read_bytes(place), dtype=np.uint8)
        expected = self.n_examples * self.content_tokens
        if values.size != expected:
            raise CorruptDataError(
                f"{place} has {values.size} bytes, expected {expected}. {_REMEDY}"
            )
        return values.reshape(self.n_examples, self.content_tokens)

    def stats(self, layer: int | None, tokens: Tokens = "content") -> LayerStats | None:
        """Recorded moments of one layer, or None if the writer recorded none (protocol 2.1)."""
        index = self.layer_index(layer)
        kinds = ("content", "special") if tokens == "all" else (tokens,)
        if self.metadata.protocol != "3.0":
            return None
        tensors = self._stats_tensors
        total, sq_total, count = np.zeros(self.d_model), 0.0, 0
        for kind in kinds:
            n = int(tensors[f"{kind}.count"][0])
            if n:
                total = total + tensors[f"{kind}.mean"][index] * n
                sq_total += float(tensors[f"{kind}.mean_sq_norm"][index]) * n
                count += n
        if not count:
            return None
        return LayerStats(total / count, sq_total / count, count)

    @functools.cached_property
    def _stats_tensors(self) -> dict[str, np.ndarray]:
        place = storage.join(self.url, protocol.STATS)
        try:
            return load_safetensors(storage.read_bytes(place))
        except safetensors.SafetensorError as err:
            raise CorruptDataError(f"{place} is damaged: {err}. {_REMEDY}") from err

    def examples(self) -> pa.Table:
        """Where each example came from: index (in the dataset), url, label, target, height, width.

        Row i is example i of the loaders. Protocol 2.1 has no such table; it gives indices alone.
        """
        place = storage.join(self.url, protocol.EXAMPLES)
        if self.metadata.protocol != "3.0":
            return pa.table({"index": np.arange(self.n_examples)})
        try:
            table = pq.read_table(io.BytesIO(storage.read_bytes(place)))
        except pa.ArrowException as err:
            raise CorruptDataError(f"{place} is damaged: {err}. {_REMEDY}") from err
        if table.num_rows != self.n_examples:
            raise CorruptDataError(
                f"{place} has {table.num_rows} rows, expected {self.n_examples}. {_REMEDY}"
            )
        return table

    # --- Checks ----------------------------------------------------------------------------

    def _check_sizes(self, sizes: tp.Mapping[str, int]) -> None:
        for info, layout in zip(self.infos, self.layouts, strict=True):
            place = storage.join(self.url, info.name)
            if info.name not in sizes:
                if not info.n_examples:
                    continue
                raise CorruptDataError(f"{place} is missing; shards.json lists it. {_REMEDY}")
            found = sizes[info.name]
            if info.n_bytes is not None and info.n_bytes != layout.n_bytes:
                raise CorruptDataError(
                    f"{protocol.SHARDS} of {self.url} says that {info.name} has {info.n_bytes} "
                    f"bytes; {info.n_examples} examples make {layout.n_bytes}. {_REMEDY}"
                )
            # Protocol 2.1 pads its last file with zeros up to the full shard size.
            padded = self.metadata.protocol == "2.1" and found >= layout.n_bytes
            if found != layout.n_bytes and not padded:
                kind = "truncated" if found < layout.n_bytes else "too long"
                raise CorruptDataError(
                    f"{place} is {kind}: it has {found} bytes, expected {layout.n_bytes}. {_REMEDY}"
                )


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _read_infos(place: str) -> tuple[ShardInfo, ...]:
    raw = storage.read_json(place)
    if not isinstance(raw, list):
        raise CorruptDataError(f"{place} holds a {type(raw).__name__}, expected a list of shards.")
    return tuple(ShardInfo.from_dict(row, source=f"{place} row {i}") for i, row in enumerate(raw))
