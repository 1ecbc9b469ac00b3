"""Reading a shards folder of either protocol."""

import collections
import contextlib
import dataclasses
import functools
import gc
import io
import os
import threading
import typing as tp
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import torch
from torch import Tensor

from saev import storage
from saev.config.base import Tokens, describe_validation_error
from saev.errors import ConfigError, CorruptDataError, IncompleteError, StorageError
from saev.shards import protocol
from saev.shards.columns import EXAMPLES_SCHEMA
from saev.shards.protocol import Layout, Metadata, ShardInfo

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_INFO, _INFOS = pydantic.TypeAdapter(ShardInfo), pydantic.TypeAdapter(list[ShardInfo])

DIRECT_IO = "SAEV_DIRECT_IO"
"""Environment variable: with 1, reading activations on local disks bypasses the page cache."""
_VERIFY_BYTES = 8 << 20
_MAX_EXAMPLES = 1 << 48
_MAX_OPEN_FILES = 64
"""Most open files per folder. The limit of a process (often 1024) may be less than the number of
shards."""


@dataclasses.dataclass(frozen=True)
class LayerStats:
    """Moments of the recorded vectors of one layer, over the whole folder."""

    mean: np.ndarray
    """Mean vector, float64 [d_model]."""
    mean_sq_norm: float
    """Mean of the squared L2 norms."""
    count: int
    """Number of vectors."""

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
        folder: storage.Folder | None = None,
    ):
        self.url = url
        self.metadata = metadata
        self.infos = infos
        self._found = found or {}
        self._folder = folder or storage.Folder.unlisted(url, protocol.FILES, protocol.REMEDY)
        counts = [info.n_examples for info in infos]
        layout_of = {n: Layout.of(metadata, n) for n in set(counts)}
        self.layouts = tuple(layout_of[n] for n in counts)
        self.shard_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._readers: collections.OrderedDict[int, storage.RangeReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, url: str) -> "Shards":
        """Open a folder. Checks that it is complete and that its files have the right sizes.

        Raises:
            StorageError: the folder does not exist, or is not a shards folder.
            IncompleteError: recording is not finished.
            CorruptDataError: a file is missing, too short or too long, or metadata is damaged.
        """
        with _many_objects():
            return cls._of_folder(storage.normalize(url))

    @classmethod
    def _of_folder(cls, url: str) -> "Shards":
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
        kind = storage.Folder.open if protocol.FILES in found else storage.Folder.unlisted
        folder = kind(url, protocol.FILES, protocol.REMEDY)
        metadata = Metadata.read(url, folder)
        if protocol.FILES not in found and metadata.network is not None:
            raise CorruptDataError(
                f"{storage.join(url, protocol.FILES)} is missing, the list of checksums. Only "
                f"folders of version 0.1.0 have none; {protocol.METADATA} is of a later one. "
                f"{protocol.REMEDY}"
            )
        if metadata.protocol == "3.0":
            folder.warn_if_unlisted()
        place = storage.join(url, protocol.SHARDS)
        infos = _parse_infos(folder.read_json(protocol.SHARDS), place)
        shards = cls(url, metadata, infos, found, folder)
        shards._check_files()
        return shards

    # --- Sizes -----------------------------------------------------------------------------

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
        """Position of a block among the recorded ones.

        Args:
            layer: number of the block. A negative one counts from the last recorded one, which is
                -1; None means the only one.

        Raises:
            ConfigError: it was not recorded, or None is ambiguous.
        """
        recorded = ", ".join(map(str, self.layers))
        if layer is None:
            if len(self.layers) == 1:
                return 0
            raise ConfigError(f"{self.url} has layers {recorded}; name one of them (--….layer).")
        if -len(self.layers) <= layer < 0:
            return len(self.layers) + layer
        if layer not in self.layers:
            raise ConfigError(f"Layer {layer} was not recorded in {self.url}; it has {recorded}.")
        return self.layers.index(layer)

    def locate(self, example_idx: int) -> tuple[int, int]:
        """Shard of an example, and the example's position in the shard."""
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
        """Read the vectors of consecutive examples of one layer.

        Args:
            shard: shard number.
            layer: block number as recorded.
            start: first example, counted inside the shard.
            stop: last example + 1.
            out: target: contiguous, on the CPU, in the stored dtype.
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
        """:meth:`read` into memory of exactly the right size.

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

        def fill(fresh: bool) -> memoryview:
            read = reader.reread if fresh else reader.readinto
            if layout.contiguous:
                read(layout.offset(index, start), raw)
            else:
                for i in range(stop - start):
                    row = raw[i * layout.row_bytes : (i + 1) * layout.row_bytes]
                    read(layout.offset(index, start + i), row)
            return raw

        if verify and self._checksums is not None:
            place = reader.url
            storage.confirmed(place, fill, lambda data: self._error(shard, index, start, data))
        else:
            fill(False)

    def read_vector(
        self, shard: int, layer: int | None, example: int, token: int, out: Tensor
    ) -> None:
        """Read one vector into ``out``, [d_model], contiguous, on the CPU, in the stored dtype.

        Unlike :meth:`read`, this checks no checksum, because checksums are of whole examples.

        Args:
            shard: shard number.
            layer: block number as recorded.
            example: number of the example in the shard.
            token: number of the recorded token; the class token, if there is one, is token 0.
            out: target.

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

    def _error(
        self, shard: int, index: int, start: int, raw: memoryview
    ) -> CorruptDataError | None:
        """The error if an example from ``start`` on is damaged; None if none is."""
        assert self._checksums is not None
        layout = self.layouts[shard]
        n = raw.nbytes // layout.row_bytes
        first = int(self.shard_starts[shard]) * layout.n_layers + index * layout.n_examples + start
        expected = self._checksums[first : first + n].tolist()
        # One call for all examples, because each call may lose the interpreter's lock.
        if storage.crc32c(raw) == storage.concatenate(expected, layout.row_bytes):
            return None
        for i, want in enumerate(expected):
            found = storage.crc32c(raw[i * layout.row_bytes : (i + 1) * layout.row_bytes])
            if found != want:
                return CorruptDataError(
                    f"{storage.join(self.url, self.infos[shard].name)} is damaged: "
                    f"layer {self.layers[index]}, example {start + i} of the shard has checksum "
                    f"{storage.format_checksum(found)}, expected "
                    f"{storage.format_checksum(want)}. {protocol.REMEDY}"
                )
        return None

    @functools.cached_property
    def _checksums(self) -> np.ndarray | None:
        """Checksums of all examples, uint32: for each shard [layer, example], concatenated."""
        if self.metadata.protocol != "3.0":
            return None
        data = self._folder.read_bytes(protocol.CHECKSUMS)
        expected = 4 * self.n_examples * len(self.layers)
        if len(data) != expected:
            raise CorruptDataError(
                f"{storage.join(self.url, protocol.CHECKSUMS)} has {len(data)} bytes, expected "
                f"{expected}. {protocol.REMEDY}"
            )
        return np.frombuffer(data, dtype="<u4")

    def verify(self) -> None:
        """Read all files and compare them with their checksums.

        Raises:
            CorruptDataError: names the first file that differs.
        """
        for name in self._folder.files or ():
            with self._folder.reader(name) as reader:
                for start in range(0, reader.size, _VERIFY_BYTES):
                    reader.read(start, min(_VERIFY_BYTES, reader.size - start))
        for info in self.infos:
            if info.checksum is not None:
                storage.verify(storage.join(self.url, info.name), info.checksum, protocol.REMEDY)

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
        """Release file descriptors. Descriptors in use are released when their reads end.

        The object may still be used; it opens files again.
        """
        with self._lock:
            self._readers.clear()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- Labels, statistics, examples ------------------------------------------------------

    @property
    def has_labels(self) -> bool:
        """Whether content tokens have labels."""
        if self.metadata.protocol == "3.0":
            return self.metadata.pixel_agg is not None
        return storage.exists(storage.join(self.url, protocol.LABELS))

    def labels(self) -> np.ndarray | None:
        """Labels of content tokens, uint8 [n_examples, content_tokens]; None without labels."""
        if not self.has_labels:
            return None
        values = np.empty((self.n_examples, self.content_tokens), dtype=np.uint8)
        with self._open_labels() as reader:
            reader.readinto(0, values)
        return values

    def _open_labels(self) -> storage.RangeReader | storage.CheckedReader:
        reader = self._folder.reader(protocol.LABELS)
        expected = self.n_examples * self.content_tokens
        if reader.size != expected:
            reader.close()
            raise CorruptDataError(
                f"{reader.url} has {reader.size} bytes, expected {expected}. {protocol.REMEDY}"
            )
        return reader

    def stats(self, layer: int | None, tokens: Tokens = "content") -> LayerStats | None:
        """Recorded moments of one layer; None if there are none (protocol 2.1)."""
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
        n = len(self.layers)
        shapes = {"mean": (n, self.d_model), "mean_sq_norm": (n,), "count": (1,)}
        expected = {
            f"{kind}.{name}": ("int64" if name == "count" else "float64", shape)
            for kind in ("content", "special")
            for name, shape in shapes.items()
        }
        data = self._folder.read_bytes(protocol.STATS)
        place = storage.join(self.url, protocol.STATS)
        return storage.parse_tensors(data, place, expected, remedy=protocol.REMEDY)

    def examples(self) -> pa.Table:
        """The table of examples: index (in the dataset), url, label, target, height, width and
        (unless version 0.1.0 wrote it) digest.

        Row i is example i of the loaders. For protocol 2.1, which has no such table, it has only
        the column index.
        """
        if self.metadata.protocol != "3.0":
            return pa.table({"index": np.arange(self.n_examples)})
        place = storage.join(self.url, protocol.EXAMPLES)
        data = self._folder.read_bytes(protocol.EXAMPLES)
        with storage.parsed(place, "a Parquet file", remedy=protocol.REMEDY):
            file = pq.ParquetFile(io.BytesIO(data))
            found, columns = file.metadata.num_rows, dict(_columns(file.schema_arrow))
        if found != self.n_examples:
            raise CorruptDataError(
                f"{place} has {found} rows, expected {self.n_examples}. {protocol.REMEDY}"
            )
        for name, kind in _columns(EXAMPLES_SCHEMA):
            if columns.get(name) != kind and (name, name in columns) != ("digest", False):
                raise CorruptDataError(
                    f"{place}: column {name} is {columns.get(name, 'missing')}, expected {kind}. "
                    f"{protocol.REMEDY}"
                )
        with storage.parsed(place, "a Parquet file", remedy=protocol.REMEDY):
            table = file.read()
            table.validate(full=True)
        return table

    # --- Checks ----------------------------------------------------------------------------

    def _check_files(self) -> None:
        """Compare the listing of the folder with its lists of files. Reads no file."""
        sizes = {name: entry.size for name, entry in self._found.items()}
        for name, listed in (self._folder.files or {}).items():
            if sizes.get(name) != listed.n_bytes:
                found = f"has {sizes[name]} bytes" if name in sizes else "is missing"
                raise CorruptDataError(
                    f"{storage.join(self.url, name)} {found}; {protocol.FILES} lists it with "
                    f"{listed.n_bytes}. {protocol.REMEDY}"
                )
        recorded = self.metadata.protocol == "3.0" and self.has_labels
        if recorded and protocol.LABELS not in sizes:
            raise CorruptDataError(
                f"{storage.join(self.url, protocol.LABELS)} is missing, but {protocol.METADATA} "
                f"says that masks were recorded. {protocol.REMEDY}"
            )
        for info, layout in zip(self.infos, self.layouts, strict=True):
            if not layout.row_bytes and info.n_examples:
                raise CorruptDataError(
                    f"{self.url} says that its examples have no vectors. {protocol.REMEDY}"
                )
            n_bytes = layout.n_bytes
            if info.n_bytes is not None and info.n_bytes != n_bytes:
                raise CorruptDataError(
                    f"{protocol.SHARDS} of {self.url} says that {info.name} has {info.n_bytes} "
                    f"bytes; {info.n_examples} examples make {n_bytes}. {protocol.REMEDY}"
                )
            found_bytes = sizes.get(info.name, -1)
            if found_bytes != n_bytes:
                self._wrong_size(info, layout, found_bytes)

    def _wrong_size(self, info: ShardInfo, layout: Layout, found: int) -> None:
        place = storage.join(self.url, info.name)
        if found < 0:
            if info.n_examples:
                raise CorruptDataError(
                    f"{place} is missing; shards.json lists it. {protocol.REMEDY}"
                )
            return
        # Protocol 2.1 pads its last file with zeros up to the full shard size.
        if self.metadata.protocol == "2.1" and found >= layout.n_bytes:
            return
        kind = "truncated" if found < layout.n_bytes else "too long"
        raise CorruptDataError(
            f"{place} is {kind}: it has {found} bytes, expected {layout.n_bytes}. {protocol.REMEDY}"
        )


@contextlib.contextmanager
def _many_objects() -> Iterator[None]:
    """Switch Python's garbage collector off for a block that makes very many lasting objects.

    The collector would look at all objects again and again as their number grows. For a folder of
    100,000 shards, this takes a third of the time to open it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _columns(schema: pa.Schema) -> list[tuple[str, str]]:
    return [(field.name, str(field.type)) for field in schema]


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _parse_infos(raw: tp.Any, place: str) -> tuple[ShardInfo, ...]:
    if not isinstance(raw, list):
        raise CorruptDataError(f"{place} holds a {type(raw).__name__}, expected a list of shards.")
    try:
        infos = tuple(_INFOS.validate_python(raw))
    except pydantic.ValidationError as err:
        raise CorruptDataError(_first_wrong(raw, place)) from err
    if len({info.name for info in infos}) < len(infos):
        raise CorruptDataError(f"{place} names a file twice. {protocol.REMEDY}")
    if sum(info.n_examples for info in infos) > _MAX_EXAMPLES:
        raise CorruptDataError(f"{place} counts too many examples. {protocol.REMEDY}")
    return infos


def _first_wrong(rows: list[tp.Any], place: str) -> str:
    """The error of the first invalid row. Only one is named, because there may be very many."""
    for i, row in enumerate(rows):
        try:
            _INFO.validate_python(row)
        except pydantic.ValidationError as err:
            return f"{describe_validation_error(err, f'{place} row {i}')}. {protocol.REMEDY}"
    return f"{place} is not a list of shards. {protocol.REMEDY}"
