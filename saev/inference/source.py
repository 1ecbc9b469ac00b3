"""The tokens of one shard in dataset order, a few whole examples at a time.

Whole examples, because a latent's score of an example is over all of its tokens; never across
shards, because a shard is the unit whose sums are added up, so that no way of cutting the work
changes a bit of the result.
"""

import concurrent.futures
import typing as tp
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from saev.config.loaders import NO_LABEL, DataConfig
from saev.inference.codes import TokenRows
from saev.loaders.selection import Selection
from saev.shards import Shards


class Chunk(tp.NamedTuple):
    """Consecutive tokens."""

    x: Tensor
    """Activations, float32 [n_rows, d_model]."""
    tokens: TokenRows
    """Which tokens they are."""


class TokenSource:
    """Reads the tokens that a config selects.

    Args:
        shards: the folder.
        data: which tokens; exactly one layer.
        labels: whether to give their labels.
    """

    def __init__(self, shards: Shards, data: DataConfig, *, labels: bool):
        self._shards = shards
        self._selection = Selection(shards, data, labels=labels)
        (self.layer,) = self._selection.layers
        self._labels = self._selection.labels if labels else None

    @property
    def n_tokens(self) -> int:
        """Selected tokens."""
        return self._selection.n_tokens

    @property
    def examples(self) -> np.ndarray:
        """Selected examples, int64, ascending."""
        return self._selection.examples

    def shard_examples(self, shard: int) -> np.ndarray:
        """Selected examples of a shard, int64, ascending."""
        first, last = self._selection.shard_bounds[shard : shard + 2]
        return self._selection.examples[first:last]

    def shard_tokens(self, shard: int) -> int:
        """Selected tokens of a shard."""
        first, last = self._selection.shard_bounds[shard : shard + 2]
        return int(self._selection.cum_rows[last] - self._selection.cum_rows[first])

    def chunks(self, examples: np.ndarray, n_examples: int) -> Iterator[Chunk]:
        """Tokens of these examples, so many examples at a time; the next chunk is read meanwhile.

        Raises:
            CorruptDataError: a shard is damaged.
        """
        spans = [examples[i : i + n_examples] for i in range(0, len(examples), n_examples)]
        with concurrent.futures.ThreadPoolExecutor(1, "saev-inference-read") as pool:
            following = pool.submit(self._read, spans[0]) if spans else None
            for i in range(len(spans)):
                assert following is not None
                chunk = following.result()
                if i + 1 < len(spans):
                    following = pool.submit(self._read, spans[i + 1])
                yield chunk

    def _read(self, examples: np.ndarray) -> Chunk:
        shards, selection = self._shards, self._selection
        shape = (len(examples), shards.tokens_per_example, shards.d_model)
        acts = torch.empty(shape, dtype=shards.dtype)
        of_shard = np.searchsorted(shards.shard_starts, examples, side="right") - 1
        breaks = np.flatnonzero((np.diff(examples) != 1) | (np.diff(of_shard) != 0)) + 1
        for first, last in zip([0, *breaks], [*breaks, len(examples)], strict=True):
            shard = int(of_shard[first])
            start = int(examples[first] - shards.shard_starts[shard])
            shards.read(shard, self.layer, start, start + int(last - first), out=acts[first:last])
        kept = selection.kept_tokens
        rows = selection.rows(examples)
        x = acts[:, :kept].reshape(-1, shards.d_model)
        if len(rows) < len(x):
            x = x.index_select(0, torch.from_numpy(rows))
        return Chunk(x.float(), self._describe(examples, rows))

    def _describe(self, examples: np.ndarray, rows: np.ndarray) -> TokenRows:
        selection = self._selection
        position, token = np.divmod(rows, selection.kept_tokens)
        token = token - int(selection.has_cls)  # the class token stands first and becomes -1
        label = np.full(len(rows), NO_LABEL, dtype=np.int16)
        if self._labels is not None:
            content = token >= 0
            label[content] = self._labels[examples[position[content]], token[content]]
        return TokenRows(examples[position], token.astype(np.int32), label)
