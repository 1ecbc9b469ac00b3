"""The order of an epoch: a pure function of (shard sizes, wanted rows, seed, epoch).

Wanted examples are cut into *blocks* of consecutive examples of one shard and layer (one large
read each). The blocks are permuted over the whole dataset and grouped into *windows* that fit in
memory. Then the rows (vectors) of each window are permuted. So a batch mixes rows from all over the
dataset, although every read is large.

Ranks that train together share one order. Each rank reads an equal run of consecutive slots of
every window (:func:`share`), and gives the rows in these slots. So a batch is the same set of rows
for any number of ranks, and each vector is read by one rank only.

This module uses only numpy, no files and no clock. Permutations are made from the raw words of
Philox, a counter-based generator whose stream numpy guarantees (NEP 19). They do not use
``Generator.permutation``, which may change between versions of numpy, so a resumed run has the same
order on any machine.
"""

import itertools
import math
import typing as tp

import numpy as np

from saev.errors import ConfigError

ORDER_VERSION = 1
"""Increased whenever the same inputs give another order. Resume states of other versions are
refused."""

MAX_BLOCK_BYTES = 4 << 20
"""Most bytes of a block. A few concurrent reads of this size hide an object store's latency, and a
local read of this size is as fast as a longer one."""
MIN_BLOCKS_PER_WINDOW = 256
"""Least blocks in a window, if memory allows, so that a window mixes many parts of the dataset."""

_BLOCKS, _ROWS = 1, 2
"""Streams of random numbers, so that two permutations never use the same words."""
_PHILOX_KEY = 0x5AE7_10AD_E125
_MASK64 = 2**64 - 1


def permutation(n: int, *, seed: int, epoch: int, stream: int, index: int = 0) -> np.ndarray:
    """A uniform permutation of range(n), int64 [n], the same on every platform and version.

    Each index is put into the low bits of a random word, and the words are sorted. The words are
    distinct, so the result does not depend on the sorting algorithm.
    """
    if n <= 1:
        return np.zeros(n, dtype=np.int64)
    generator = np.random.Philox(
        key=np.array([seed & _MASK64, _PHILOX_KEY], dtype=np.uint64),
        counter=np.array([0, index, epoch, stream], dtype=np.uint64),
    )
    mask = np.uint64((1 << (n - 1).bit_length()) - 1)
    words = np.asarray(generator.random_raw(n), dtype=np.uint64)
    words &= ~mask
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    words &= mask
    return words.view(np.int64)


class Sizes(tp.NamedTuple):
    """Sizes of blocks and windows, in examples of one layer."""

    block_examples: int
    """Most examples in a block."""
    window_blocks: int
    """Most blocks in a window."""

    @property
    def window_examples(self) -> int:
        """Most examples in a window."""
        return self.block_examples * self.window_blocks


def choose_sizes(
    *,
    n_examples: int,
    read_bytes: int,
    kept_bytes: int,
    buffer_bytes: int,
    shard_examples: int | None = None,
) -> Sizes:
    """Sizes of blocks and windows for a memory budget.

    If all data fits into the budget, there is one window, which stays in memory in all epochs.
    Otherwise two windows share the budget: one is read while batches are cut from the other.

    Args:
        n_examples: examples to shuffle, over all layers.
        read_bytes: bytes to read per example.
        kept_bytes: memory per example in a window.
        buffer_bytes: memory for all windows.
        shard_examples: most wanted examples in a shard, which a block cannot exceed.

    Raises:
        ConfigError: the budget does not hold two windows of one example.
    """
    fits_whole = n_examples * kept_bytes <= buffer_bytes
    capacity = n_examples if fits_whole else buffer_bytes // (2 * kept_bytes)
    if not fits_whole and not capacity:
        raise ConfigError(
            f"buffer_mb={buffer_bytes / 2**20:g} is too small: two windows of one example "
            f"({kept_bytes / 2**10:.0f} KiB) need {2 * kept_bytes / 2**20:.2f} MiB. Raise "
            "buffer_mb."
        )
    block = max(1, MAX_BLOCK_BYTES // read_bytes)
    if not fits_whole:
        block = min(block, max(1, min(capacity, n_examples) // MIN_BLOCKS_PER_WINDOW))
    block = min(block, max(1, n_examples), shard_examples or block)
    if fits_whole:
        return Sizes(block, max(1, n_examples))  # one window, even if shards cut blocks shorter
    return Sizes(block, capacity // block)


class Blocks(tp.NamedTuple):
    """All blocks, in dataset order (layer, example). Arrays of equal length."""

    layer: np.ndarray
    """Position among the selected layers, int32."""
    start: np.ndarray
    """First example, as a position among the wanted examples, int64."""
    stop: np.ndarray
    """Last example + 1, int64."""
    rows: np.ndarray
    """Wanted rows, int64."""

    def __len__(self) -> int:
        return len(self.start)


def cut_blocks(
    shard_bounds: np.ndarray, cum_rows: np.ndarray, *, n_layers: int, block_examples: int
) -> Blocks:
    """Cut the wanted examples of every shard into blocks; none crosses a shard.

    Args:
        shard_bounds: int64 [n_shards + 1], position of each shard's first example among the wanted
            examples.
        cum_rows: int64 [n_wanted_examples + 1], wanted rows before each wanted example.
        n_layers: selected layers.
        block_examples: most examples in a block.
    """
    pieces = [
        np.arange(a, b, block_examples, dtype=np.int64) for a, b in itertools.pairwise(shard_bounds)
    ]
    start = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
    stop = np.append(start[1:], shard_bounds[-1])[: len(start)]
    layer = np.repeat(np.arange(n_layers, dtype=np.int32), len(start))
    start, stop = np.tile(start, n_layers), np.tile(stop, n_layers)
    return Blocks(layer, start, stop, cum_rows[stop] - cum_rows[start])


class Epoch(tp.NamedTuple):
    """Windows of one epoch: window w is ``blocks[bounds[w]:bounds[w + 1]]``."""

    blocks: np.ndarray
    """Block numbers in the order of this epoch, int64 [n_blocks]."""
    bounds: np.ndarray
    """int64 [n_windows + 1]."""
    window_rows: np.ndarray
    """Wanted rows of each window, int64 [n_windows]."""


class Order:
    """The order of blocks and rows in every epoch. Immutable; shared by threads.

    Args:
        blocks: all blocks.
        window_blocks: most blocks in a window.
        seed: seed of the permutations.
        shuffle: False keeps blocks and rows in dataset order.
    """

    def __init__(
        self,
        blocks: Blocks,
        window_blocks: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
    ):
        self.blocks = blocks
        self.seed = seed
        self.shuffle = shuffle
        self.n_windows = max(1, math.ceil(len(blocks) / window_blocks))
        # Windows of equal size: a short last window would be mixed badly.
        self._bounds = np.arange(self.n_windows + 1, dtype=np.int64) * len(blocks) // self.n_windows
        self._recent: dict[int, Epoch] = {}

    @property
    def resident(self) -> bool:
        """Whether one window holds all data."""
        return self.n_windows == 1

    @property
    def max_window_examples(self) -> int:
        """Upper bound of the examples in a window of any epoch."""
        sizes = self.blocks.stop - self.blocks.start
        if not len(sizes):
            return 0
        most_blocks = int(np.diff(self._bounds).max())
        return int(min(most_blocks * sizes.max(), sizes.sum()))

    def epoch(self, epoch: int) -> Epoch:
        """Windows of an epoch. The last two epochs are cached."""
        found = self._recent.get(epoch)
        if found is None:
            found = self._epoch(epoch)
            latest = list(self._recent.items())[-1:]
            # Replaced, not changed, because other threads may read it.
            self._recent = dict([*latest, (epoch, found)])
        return found

    def _epoch(self, epoch: int) -> Epoch:
        n = len(self.blocks)
        if self.shuffle and not self.resident:
            order = permutation(n, seed=self.seed, epoch=epoch, stream=_BLOCKS)
        else:
            order = np.arange(n, dtype=np.int64)
        rows = np.append(0, np.cumsum(self.blocks.rows[order]))[self._bounds]
        return Epoch(order, self._bounds, np.diff(rows))

    def window_blocks(self, epoch: int, window: int) -> np.ndarray:
        """Numbers of a window's blocks."""
        e = self.epoch(epoch)
        return e.blocks[e.bounds[window] : e.bounds[window + 1]]

    def row_order(self, n: int, epoch: int, window: int) -> np.ndarray:
        """The order of a window's n wanted rows, int64 [n]."""
        if not self.shuffle:
            return np.arange(n, dtype=np.int64)
        return permutation(n, seed=self.seed, epoch=epoch, stream=_ROWS, index=window)

    def usable_rows(self, epoch: int, batch_size: int, drop_last: bool) -> int:
        """Rows in the batches of one epoch: all rows, or with ``drop_last`` those of full
        batches."""
        rows = int(self.epoch(epoch).window_rows.sum())
        return rows // batch_size * batch_size if drop_last else rows


def share(n: int, rank: int, world_size: int) -> tuple[int, int]:
    """The slots [start, stop) of a window of n slots that a rank holds."""
    return n * rank // world_size, n * (rank + 1) // world_size
