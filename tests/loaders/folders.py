"""Shards folders written directly by the format, in which every vector says where it belongs."""

import dataclasses
import threading

import numpy as np
import torch
from described import list_files

from saev import storage
from saev.shards import Metadata, Shards
from saev.shards.protocol import CHECKSUMS, LABELS, METADATA, SHARDS, Layout, shard_name

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder and what it holds."""

    url: str
    acts: torch.Tensor
    """[layer, example, token as recorded, d_model], stored dtype."""
    labels: np.ndarray | None
    metadata: Metadata

    def open(self) -> Shards:
        return Shards.open(self.url)

    def vectors(self, batch) -> torch.Tensor:
        """What the vectors of a batch have to be, by its index columns."""
        layer = torch.tensor(
            [self.metadata.layers.index(x) for x in batch.layer.tolist()], dtype=torch.int64
        )
        token = batch.token_idx + int(self.metadata.cls_token)
        return self.acts[layer, batch.example_idx, token]


def write_shards(
    url: str,
    *,
    n_examples: int = 23,
    layers: tuple[int, ...] = (3,),
    content_tokens: int = 6,
    cls_token: bool = True,
    d_model: int = 8,
    dtype: str = "float32",
    protocol: str = "3.0",
    examples_per_shard: int = 7,
    labels: bool = False,
    n_labels: int = 4,
    seed: int = 0,
) -> Folder:
    """Write a folder of protocol 3.0 or 2.1 (padded, as the published writer does)."""
    tokens = content_tokens + int(cls_token)
    metadata = Metadata(
        protocol=protocol,
        family="fake",
        ckpt="none",
        layers=layers,
        content_tokens_per_example=content_tokens,
        cls_token=cls_token,
        d_model=d_model,
        n_examples=n_examples,
        max_tokens_per_shard=max(1, examples_per_shard * tokens * len(layers)),
        data={} if protocol == "3.0" else "not a pickle to open",
        pixel_agg="majority" if labels else None,
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(len(layers), n_examples, tokens, d_model, generator=generator)
    acts = acts.to(DTYPES[dtype])
    infos, checksums = [], []
    for shard in range(metadata.n_shards):
        start, stop = metadata.shard_range(shard)
        part = acts[:, start:stop].contiguous()
        crcs = [storage.crc32c(_bytes(example)) for layer in part for example in layer]
        checksums.append(np.array(crcs, dtype="<u4"))
        if protocol == "2.1":
            part = part.transpose(0, 1).contiguous()
        data = _bytes(part).tobytes()
        info = {"name": shard_name(shard), "n_examples": stop - start}
        if protocol == "3.0":
            info |= {
                "n_bytes": len(data),
                "checksum": storage.format_checksum(storage.crc32c(data)),
            }
        else:
            data = data.ljust(Layout.of(metadata, metadata.examples_per_shard).n_bytes, b"\0")
        storage.write_bytes(storage.join(url, shard_name(shard)), data)
        infos.append(info)
    values = None
    if labels:
        rng = np.random.default_rng(seed)
        values = rng.integers(0, n_labels, (n_examples, content_tokens)).astype(np.uint8)
        storage.write_bytes(storage.join(url, LABELS), values.tobytes())
    if protocol == "3.0":
        crcs = np.concatenate(checksums) if checksums else np.zeros(0, "<u4")
        storage.write_bytes(storage.join(url, CHECKSUMS), crcs.tobytes())
    storage.write_json(storage.join(url, METADATA), metadata.to_dict())
    storage.write_json(storage.join(url, SHARDS), infos)
    if protocol == "3.0":
        list_files(url)
    return Folder(url, acts, values, metadata)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def readers() -> set[threading.Thread]:
    """Reader threads that are alive."""
    return {t for t in threading.enumerate() if t.name.startswith("saev-reader")}


def keys(batches) -> list[tuple[int, int, int]]:
    """(layer, example, token) of all rows."""
    return [
        key
        for b in batches
        for key in zip(b.layer.tolist(), b.example_idx.tolist(), b.token_idx.tolist(), strict=True)
    ]
