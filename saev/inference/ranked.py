"""The examples of each latent: its top images, and a sample over the range of its values."""

import typing as tp

import numpy as np
import pyarrow as pa

from saev.inference import sides
from saev.inference.alignment import descending_key
from saev.inference.blocks import Block
from saev.inference.part import PartStats
from saev.inference.topk import Entries


class Ranked:
    """The examples of each latent, and where each stands among all images on which it fires."""

    def __init__(self, stats: PartStats, d_sae: int):
        top, spread = stats.top.result(), stats.spread.result()
        spread = spread.take(np.lexsort((spread.example_idx, -spread.value, spread.latent)))
        every = Entries(*(np.concatenate(pair) for pair in zip(top, spread, strict=True)))
        is_spread = np.repeat([0, 1], [len(top.latent), len(spread.latent)])
        order = np.lexsort((is_spread, every.latent))
        self._entries, self._is_spread = every.take(order), is_spread[order]
        self._ptr = np.searchsorted(self._entries.latent, np.arange(d_sae + 1))
        self._quantile = np.full(len(order), np.nan, dtype=np.float32)

    @property
    def largest(self) -> float:
        """Magnitude of the largest value of a patch."""
        return float(np.abs(self._entries.token_value).max(initial=0.0))

    def add(self, block: Block) -> None:
        """Take all values of some latents."""
        counts = np.bincount(block.latents, minlength=block.stop - block.start)
        starts = np.cumsum(counts) - counts
        keys = np.sort(_keys(block.latents, block.values))
        mine = slice(self._ptr[block.start], self._ptr[block.stop])
        latents = self._entries.latent[mine] - block.start
        below = np.searchsorted(keys, _keys(latents, self._entries.value[mine]), side="right")
        self._quantile[mine] = (below - starts[latents]) / counts[latents]

    def rows(self, side: np.ndarray, value: pa.DataType) -> dict[str, tp.Any]:
        """Columns of `examples.parquet`, with values of patches of such a type."""
        found = self._entries
        group = found.latent * 2 + self._is_spread
        rank = np.arange(len(group)) - np.searchsorted(group, group)
        ptr = np.concatenate([[0], np.cumsum(found.length)]).astype(np.int32)
        values = pa.array(found.token_value.astype(value.to_pandas_dtype()))
        return {
            "latent": found.latent,
            "kind": pa.array(["top", "spread"]).take(pa.array(self._is_spread)),
            "rank": rank,
            "example": found.example_idx,
            "side": sides.names(side[found.example_idx]),
            "value": found.value,
            "quantile": self._quantile,
            "patches": pa.ListArray.from_arrays(ptr, pa.array(found.token_idx)),
            "patch_values": pa.ListArray.from_arrays(ptr, values),
        }


def _keys(latents: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Numbers in the order of latents, and within each of values, uint64 [n]."""
    keys = latents.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= ~descending_key(values)
    return keys
