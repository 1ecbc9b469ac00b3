"""Folders of random activations, as `saev shards` would have written them."""

import typing as tp

import numpy as np
import torch

from saev import storage
from saev.shards import Metadata
from saev.shards.parts import ExampleRow, Part, publish, write_part
from saev.shards.protocol import shard_name
from saev.shards.reader import TORCH_DTYPES
from saev.shards.writer import ShardWriter

LAYER = 11
_BATCH = 64


class Folder(tp.NamedTuple):
    """What to write."""

    mb: float
    """Size of the one layer, in MB (10⁶ bytes)."""
    d_model: int = 384
    dtype: str = "float32"
    content_tokens: int = 256
    n_shards: int = 4
    n_labels: int = 0
    """Classes of the token labels; 0: none."""

    @property
    def n_examples(self) -> int:
        """Examples of that many bytes."""
        size = TORCH_DTYPES[self.dtype].itemsize
        return max(
            self.n_shards, int(self.mb * 1e6 / ((self.content_tokens + 1) * self.d_model * size))
        )

    @property
    def n_tokens(self) -> int:
        """Content tokens."""
        return self.n_examples * self.content_tokens


def write(root: str, folder: Folder) -> str:
    """Write a folder below ``root`` and return its URL. The same 64 examples repeat."""
    metadata = Metadata(
        family="benchmark",
        ckpt="random",
        layers=(LAYER,),
        content_tokens_per_example=folder.content_tokens,
        cls_token=True,
        d_model=folder.d_model,
        n_examples=folder.n_examples,
        max_tokens_per_shard=-(-folder.n_examples // folder.n_shards) * (folder.content_tokens + 1),
        data={},
        dtype=tp.cast(tp.Any, folder.dtype),
        pixel_agg="majority" if folder.n_labels else None,
    )
    url = storage.join(root, metadata.hash)
    storage.write_json(storage.join(url, "metadata.json"), metadata.to_dict())
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    shape = (1, _BATCH, folder.content_tokens + 1, folder.d_model)
    noise = torch.randn(shape, generator=generator).to(TORCH_DTYPES[folder.dtype])
    for shard in range(metadata.n_shards):
        first, last = metadata.shard_range(shard)
        with ShardWriter(storage.join(url, shard_name(shard)), metadata, last - first) as writer:
            for start in range(first, last, _BATCH):
                writer.write(noise[:, : min(_BATCH, last - start)])
        rows = [ExampleRow(i, f"{i}", "", 0, 224, 224) for i in range(first, last)]
        labels = None
        if folder.n_labels:
            size = (last - first, folder.content_tokens)
            labels = rng.integers(0, folder.n_labels, size).astype(np.uint8)
        write_part(url, shard, Part(writer.written, rows, [], labels))
    publish(url, metadata, metadata.n_shards)
    return url
