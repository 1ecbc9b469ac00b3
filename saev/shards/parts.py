"""The record of each finished shard, and the merging of all records into the folder's files.

A record is a small object that is written after the file of its shard. If it exists, the shard is
done. It holds the shard's share of the folder's files (labels, examples, moments, checksums), so
that publishing need not read activations.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import math
import struct
import typing as tp
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from jaxtyping import UInt8

from saev import storage
from saev.errors import CorruptDataError, ImageError, IncompleteError, ModelError
from saev.shards import protocol
from saev.shards.columns import EXAMPLES_SCHEMA
from saev.shards.protocol import Layout, Metadata, ShardInfo, shard_name
from saev.shards.writer import Moments, Written, file_checksum

_READ_AHEAD = 16
_CRC = struct.Struct("<I")
_ROW_GROUP = 65_536


class ExampleRow(tp.NamedTuple):
    """One row of examples.parquet."""

    dataset_index: int
    url: str
    label: str
    target: int
    height: int
    width: int
    digest: int | None = None


class Skipped(tp.NamedTuple):
    """One row of skipped.json: an image that could not be decoded."""

    dataset_index: int
    url: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The record of one finished shard."""

    written: Written
    examples: list[ExampleRow]
    """One per recorded example."""
    skipped: list[Skipped]
    labels: UInt8[np.ndarray, "n_examples content_tokens"] | None
    """Labels of content tokens, for segmentation datasets."""
    weights: str | None = None
    """Checksum of the model's weights; None in records of version 0.1.0."""

    def to_bytes(self) -> bytes:
        """A safetensors file and its CRC-32C."""
        rows = {"examples": self.examples, "skipped": self.skipped, "weights": self.weights}
        text = np.frombuffer(json.dumps(rows).encode(), np.uint8)
        tensors = {"rows": text, "checksums": self.written.checksums}
        for kind in ("content", "special"):
            moments: Moments = getattr(self.written, kind)
            tensors[f"{kind}.total"] = moments.total
            tensors[f"{kind}.sq_total"] = moments.sq_total
            tensors[f"{kind}.count"] = np.array([moments.count], np.int64)
        if self.labels is not None:
            tensors["labels"] = self.labels
        data = safetensors.numpy.save(tensors)
        return data + _CRC.pack(storage.crc32c(data))

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> "Part":
        """Inverse of :meth:`to_bytes`.

        Raises:
            CorruptDataError: it is truncated or damaged.
        """
        body, remedy = data[: -_CRC.size], "Delete it and run the same `saev shards` command again."
        if len(data) < _CRC.size or _CRC.unpack(data[-_CRC.size :]) != (storage.crc32c(body),):
            raise CorruptDataError(
                f"{source} is damaged: {len(data)} bytes whose checksum does not fit. {remedy}"
            )
        with storage.parsed(source, "a record of this version of saev", remedy=remedy):
            tensors = safetensors.numpy.load(body)
            rows = json.loads(tensors["rows"].tobytes())
            moments = {
                kind: Moments(
                    tensors[f"{kind}.total"],
                    tensors[f"{kind}.sq_total"],
                    int(tensors[f"{kind}.count"][0]),
                )
                for kind in ("content", "special")
            }
            examples = [ExampleRow(*row) for row in rows["examples"]]
            skipped = [Skipped(*row) for row in rows["skipped"]]
            written = Written(
                len(examples), tensors["checksums"], moments["content"], moments["special"]
            )
        return cls(written, examples, skipped, tensors.get("labels"), rows.get("weights"))


def part_url(url: str, shard: int) -> str:
    """URL of the record of a shard of the folder ``url``."""
    return storage.join(url, protocol.PARTS, f"{shard_name(shard)}.part")


def write_part(url: str, shard: int, part: Part) -> None:
    """Write the record of a finished shard."""
    storage.write_bytes(part_url(url, shard), part.to_bytes())


def read_part(url: str, shard: int, metadata: Metadata, weights: str | None = None) -> Part:
    """Read the record of a finished shard, and compare it with the metadata and the file's size.

    Args:
        url: the shards folder.
        shard: number of the shard.
        metadata: the folder's metadata.
        weights: checksum of the weights that the record must have; None accepts any.

    Raises:
        ModelError: it was recorded with other weights.
        IncompleteError: there is no record, so the shard is not done.
        CorruptDataError: it is damaged, does not fit the metadata, or the shard's file is missing
            or has another size than when it was written.
    """
    place = part_url(url, shard)
    if not storage.exists(place):
        raise IncompleteError(
            f"{shard_name(shard)} of {url} is not recorded yet. Run the same `saev shards` command "
            "without --part; it does what is missing."
        )
    part = storage.read_parsed(place, lambda data: Part.from_bytes(data, place))
    _check(part, metadata, shard, place)
    if None not in (weights, part.weights) and weights != part.weights:
        raise ModelError(
            f"{place} was recorded with weights {part.weights}, but {metadata.family} "
            f"{metadata.ckpt} now has {weights}. A folder cannot hold both. Restore the former "
            "weights, or delete the folder to record all of it again."
        )
    file = storage.join(url, shard_name(shard))
    expected = Layout.of(metadata, part.written.n_examples).n_bytes
    found = storage.size(file) if storage.exists(file) else None
    if found != expected:
        what = "is missing" if found is None else f"has {found} bytes"
        raise CorruptDataError(
            f"{file} {what}, expected {expected} bytes. Delete {place} and run the same "
            "`saev shards` command again."
        )
    return part


def _check(part: Part, metadata: Metadata, shard: int, place: str) -> None:
    start, stop = metadata.shard_range(shard)
    n, n_layers = len(part.examples), len(metadata.layers)
    indices = sorted(
        [r.dataset_index for r in part.examples] + [r.dataset_index for r in part.skipped]
    )
    labels = None if metadata.pixel_agg is None else (n, metadata.content_tokens_per_example)
    fits = (
        indices == list(range(start, stop))
        and part.written.checksums.shape == (n_layers, n)
        and part.written.content.total.shape == (n_layers, metadata.d_model)
        and (part.labels.shape if part.labels is not None else None) == labels
    )
    if not fits:
        raise CorruptDataError(
            f"{place} does not describe images {start} to {stop} of this dataset. "
            "Delete it and run the same `saev shards` command again."
        )


def publish(
    url: str,
    metadata: Metadata,
    n_shards: int,
    weights: str | None = None,
    *,
    ready: Callable[[], None] = lambda: None,
    seen: Callable[[int], None] = lambda n: None,
) -> None:
    """Merge the records of all shards, in order, into the folder's files.

    files.json, which lists all files, is written before shards.json, which is the last object.
    Memory grows with the number of examples (a table row and some checksums each), but not with
    labels or activations.

    Args:
        url: the shards folder.
        metadata: the folder's metadata.
        n_shards: number of shards.
        weights: checksum of the weights that all records must have; None accepts any.
        ready: called before the first object is written and before the last ones. An error of it
            ends the work.
        seen: called with 1 for each verified shard.

    Raises:
        ModelError: a shard was recorded with other weights.
        IncompleteError: a shard is not recorded yet.
        CorruptDataError: a record or a shard's file is damaged.
        ImageError: not a single image could be decoded.
    """
    ready()
    n_layers = len(metadata.layers)
    content = special = Moments.zero(n_layers, metadata.d_model)
    infos: list[ShardInfo] = []
    checksums: list[bytes] = []
    tables: list[pa.Table] = []
    skipped: list[Skipped] = []
    labels: storage.ChecksumWriter | None = None
    with contextlib.ExitStack() as stack:
        if metadata.pixel_agg is not None:
            place = storage.join(url, protocol.LABELS)
            labels = storage.ChecksumWriter(stack.enter_context(storage.open_write(place)))
        for shard, part in enumerate(_read_parts(url, metadata, n_shards, weights)):
            layout = Layout.of(metadata, part.written.n_examples)
            infos.append(
                ShardInfo(
                    name=shard_name(shard),
                    n_examples=layout.n_examples,
                    n_bytes=layout.n_bytes,
                    checksum=file_checksum(layout, part.written.checksums),
                )
            )
            checksums.append(part.written.checksums.astype("<u4").tobytes())
            content, special = content + part.written.content, special + part.written.special
            tables.append(_table(part.examples))
            skipped.extend(part.skipped)
            if labels is not None and part.labels is not None:
                labels.write(np.ascontiguousarray(part.labels).data)
            seen(1)
        if not sum(map(len, tables)):
            raise ImageError(
                f"None of the {len(skipped)} images could be decoded; the first: "
                f"{skipped[0].reason if skipped else 'there is none'}"
            )
    objects = {
        protocol.CHECKSUMS: b"".join(checksums),
        protocol.EXAMPLES: _parquet(tables),
        protocol.STATS: _stats(content, special),
    }
    if skipped:
        entries = [{"index": i, "url": image, "reason": reason} for i, image, reason in skipped]
        objects[protocol.SKIPPED] = storage.json_bytes(entries)
    for name, data in objects.items():
        storage.write_bytes(storage.join(url, name), data)
    objects[protocol.SHARDS] = storage.json_bytes([info.to_dict() for info in infos])
    objects[protocol.METADATA] = _metadata_bytes(url, metadata)
    files = {name: storage.Listed.of(data) for name, data in objects.items()}
    if labels is not None:
        files[protocol.LABELS] = storage.Listed.written(labels)
    ready()
    storage.write_json(storage.join(url, protocol.FILES), storage.seal({}, files))
    storage.write_bytes(storage.join(url, protocol.SHARDS), objects[protocol.SHARDS])


def _metadata_bytes(url: str, metadata: Metadata) -> bytes:
    """The stored bytes of metadata.json, which must be of this recording."""
    place = storage.join(url, protocol.METADATA)

    def checked(data: bytes) -> bytes:
        found = Metadata.from_dict(storage.parse_json(data, place), source=place)
        if found.hash != metadata.hash:
            raise CorruptDataError(
                f"{place} describes recording {found.hash}, expected {metadata.hash}: it was "
                "changed. Delete it and run the same `saev shards` command again."
            )
        return data

    return storage.read_parsed(place, checked)


def _read_parts(url: str, metadata: Metadata, n_shards: int, weights: str | None) -> Iterator[Part]:
    """All records in order, with read-ahead."""
    with concurrent.futures.ThreadPoolExecutor(_READ_AHEAD) as pool:
        try:
            for start in range(0, n_shards, _READ_AHEAD):
                window = range(start, min(start + _READ_AHEAD, n_shards))
                yield from pool.map(lambda i: read_part(url, i, metadata, weights), window)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _table(rows: Sequence[ExampleRow]) -> pa.Table:
    columns = [
        pa.array([row[i] for row in rows], type=field.type)
        for i, field in enumerate(EXAMPLES_SCHEMA)
    ]
    return pa.Table.from_arrays(columns, schema=EXAMPLES_SCHEMA)


def _parquet(tables: Sequence[pa.Table]) -> bytes:
    """Concatenate tables and write them as Parquet. Equal rows give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(
        pa.concat_tables(tables).combine_chunks(),
        sink,
        version="2.6",
        compression="zstd",
        row_group_size=_ROW_GROUP,
        store_schema=False,
    )
    return sink.getvalue()


def _stats(content: Moments, special: Moments) -> bytes:
    tensors = {}
    for kind, moments in (("content", content), ("special", special)):
        n = max(1, moments.count)
        # fsum, because numpy does not guarantee its order of addition.
        squares = [math.fsum(layer) for layer in moments.sq_total]
        tensors[f"{kind}.mean"] = moments.total / n
        tensors[f"{kind}.mean_sq_norm"] = np.array(squares, np.float64) / n
        tensors[f"{kind}.count"] = np.array([moments.count], np.int64)
    return safetensors.numpy.save(tensors)
