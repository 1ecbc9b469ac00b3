"""Reads the tokens of one shard in dataset order, a few whole examples at a time.

Examples are not cut, because a latent's value on an image needs all of its tokens. Chunks do not
cross shards: sums are kept for each shard and then added up in shard order, so that results have
the same bits however the work was divided.
"""

import typing as tp
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from saev.config.loaders import NO_LABEL, DataConfig
from saev.inference.codes import TokenRows
from saev.loaders import OrderedLoader
from saev.loaders.selection import Selection
from saev.shards import Shards

_WINDOW_MB = 64
"""Memory for reading ahead."""


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
        labels: whether the tokens' labels are read, too.
    """

    def __init__(self, shards: Shards, data: DataConfig, *, labels: bool):
        self._shards, self._data = shards, data
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

    def chunks(
        self, examples: np.ndarray, sizes: Sequence[int], device: str | torch.device = "cpu"
    ) -> Iterator[tuple[int, Chunk]]:
        """Tokens of some examples, read once, in chunks of several sizes.

        Args:
            examples: selected ones, int64, ascending.
            sizes: sizes of chunks, in examples. For each size, the chunks hold all of the
                examples; the last chunk may be smaller.
            device: where the activations are put.

        Yields:
            A chunk, and the size that it belongs to. Chunks of one size come in order.

        Raises:
            CorruptDataError: a shard is damaged.
        """
        selection = self._selection.only(examples)
        cuts = {size: _Cuts(selection, size) for size in dict.fromkeys(sizes)}
        # A batch is at least as large as each chunk, so a chunk lies in at most two batches.
        batch_size = max((rows for cut in cuts.values() for rows in cut.rows), default=0)
        if not batch_size:
            return
        device = torch.device(device)
        with OrderedLoader(
            self._shards,
            self._data,
            batch_size,
            selection=selection,
            device=device if device.type == "cuda" else "cpu",
            buffer_mb=_WINDOW_MB,
        ) as loader:
            before: Tensor | None = None
            start = 0
            for batch in loader:
                x = batch.act
                for size, cut in cuts.items():
                    while (span := cut.span(start + len(x))) is not None:
                        first, last = (row - start for row in span)
                        if first >= 0:
                            rows = x[first:last]
                        else:
                            assert before is not None
                            rows = torch.cat([before[first:], x[:last]])
                        yield size, Chunk(rows.to(device), self._describe(cut.take()))
                before, start = x, start + len(x)

    def _describe(self, examples: np.ndarray) -> TokenRows:
        selection = self._selection
        position, token = np.divmod(selection.rows(examples), selection.kept_tokens)
        token = token - int(selection.has_cls)  # the class token stands first and becomes -1
        label = np.full(len(token), NO_LABEL, dtype=np.int16)
        if self._labels is not None:
            content = token >= 0
            label[content] = self._labels[examples[position[content]], token[content]]
        return TokenRows(examples[position], token.astype(np.int32), label)


class _Cuts:
    """Cuts examples into chunks of one size, and knows the rows of the next chunk.

    Args:
        selection: the examples.
        size: of a chunk, in examples.
    """

    def __init__(self, selection: Selection, size: int):
        self._examples, self._size, self._next = selection.examples, size, 0
        n = len(selection.examples)
        self._ends = selection.cum_rows[np.minimum(np.arange(0, n + size, size), n)]
        self.rows = np.diff(self._ends)
        """Tokens of each chunk."""

    def span(self, n_rows: int) -> tuple[int, int] | None:
        """The next chunk's first row and last row + 1; None if it ends behind the first ``n_rows``
        rows, or if there is no further chunk."""
        if self._next == len(self.rows) or self._ends[self._next + 1] > n_rows:
            return None
        first, last = self._ends[self._next : self._next + 2]
        return int(first), int(last)

    def take(self) -> np.ndarray:
        """The examples of the next chunk, which is taken."""
        first = self._next * self._size
        self._next += 1
        return self._examples[first : first + self._size]
