"""The order of an epoch, as arithmetic."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saev.errors import ConfigError
from saev.loaders.order import (
    MAX_BLOCK_BYTES,
    MIN_BLOCKS_PER_WINDOW,
    Order,
    choose_sizes,
    cut_blocks,
    permutation,
    share,
)

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


def make_blocks(sizes: list[int], rows: np.ndarray, n_layers: int, block: int):
    bounds = np.append(0, np.cumsum(sizes)).astype(np.int64)
    cum_rows = np.append(0, np.cumsum(rows)).astype(np.int64)
    return cut_blocks(bounds, cum_rows, n_layers=n_layers, block_examples=block)


# --- permutation ---------------------------------------------------------------------------


@given(st.integers(0, 3000), st.integers(-5, 2**70), st.integers(0, 2**31), st.integers(0, 2**31))
def test_permutation_holds_every_index_once(n, seed, epoch, index):
    found = permutation(n, seed=seed, epoch=epoch, stream=1, index=index)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(n))


def test_permutation_never_changes():
    """Written down once: another version of numpy or of saev must give the same."""
    assert permutation(10, seed=0, epoch=0, stream=1).tolist() == GOLDEN_10
    big = permutation(100_000, seed=7, epoch=3, stream=2, index=5)
    assert big[:6].tolist() == GOLDEN_BIG
    assert int((big * np.arange(100_000) % 1_000_003).sum()) == GOLDEN_SUM


GOLDEN_10 = [9, 3, 6, 0, 2, 8, 7, 1, 4, 5]
GOLDEN_BIG = [438, 99391, 30, 24932, 34345, 27222]
GOLDEN_SUM = 50140720550


@pytest.mark.parametrize("changed", [{"seed": 1}, {"epoch": 1}, {"stream": 2}, {"index": 1}])
def test_permutations_differ_in_every_argument(changed):
    same = {"seed": 0, "epoch": 0, "stream": 1, "index": 0}
    assert not np.array_equal(permutation(100, **same), permutation(100, **(same | changed)))


def test_permutation_is_uniform():
    """Chi-square of where each of 6 values lands, over 6000 permutations: 25 degrees of freedom."""
    n, draws = 6, 6000
    counts = np.zeros((n, n))
    for epoch in range(draws):
        counts[np.arange(n), permutation(n, seed=3, epoch=epoch, stream=1)] += 1
    chi2 = ((counts - draws / n) ** 2 / (draws / n)).sum()
    assert chi2 < 60  # p < 1e-4 beyond


# --- sizes ---------------------------------------------------------------------------------


@given(
    n_examples=st.integers(1, 10**7),
    tokens=st.integers(1, 1400),
    vector=st.integers(1, 8192),
    buffer_mb=st.integers(1, 8192),
)
def test_windows_fit_the_budget(n_examples, tokens, vector, buffer_mb):
    read = tokens * vector
    kept = tokens * (vector + 32)
    budget = buffer_mb << 20
    try:
        sizes = choose_sizes(
            n_examples=n_examples,
            read_bytes=read,
            kept_bytes=kept,
            buffer_bytes=budget,
        )
    except ConfigError:
        assert budget < 2 * kept
        return
    whole = min(n_examples, sizes.window_examples) == n_examples
    assert sizes.window_blocks >= 1
    assert sizes.window_examples * kept * 2 <= budget or (whole and n_examples * kept <= budget)
    assert sizes.block_examples == 1 or sizes.block_examples * read <= MAX_BLOCK_BYTES
    if sizes.window_examples < n_examples:
        assert sizes.block_examples == 1 or sizes.window_blocks >= MIN_BLOCKS_PER_WINDOW


def test_blocks_are_large_where_that_costs_no_mixing():
    """ViT-B/16 in float32: 605 KB per example."""
    read, kept = 197 * 3072, 197 * (3072 + 32)
    args = {"n_examples": 1_000_000, "read_bytes": read, "kept_bytes": kept}
    small = choose_sizes(**args, buffer_bytes=64 << 20)
    usual = choose_sizes(**args, buffer_bytes=2 << 30)
    large = choose_sizes(**args, buffer_bytes=64 << 30)
    assert small.block_examples == 1
    assert usual.block_examples == 6
    assert large.block_examples == MAX_BLOCK_BYTES // read


def test_a_block_is_one_read_and_lies_in_one_shard():
    """Its size is what is read, of which little may be kept."""
    sizes = {"n_examples": 100, "read_bytes": 1 << 20, "kept_bytes": 10, "buffer_bytes": 1000}
    assert choose_sizes(**sizes).block_examples == 4
    assert choose_sizes(**sizes, shard_examples=3).block_examples == 3


# --- blocks and windows --------------------------------------------------------------------


@given(shard_sizes, st.integers(1, 12), st.integers(1, 3), st.data())
def test_blocks_hold_every_example_once_and_cross_no_shard(sizes, block, n_layers, data):
    n = sum(sizes)
    rows = np.array(data.draw(st.lists(st.integers(1, 5), min_size=n, max_size=n)))
    blocks = make_blocks(sizes, rows, n_layers, block)
    bounds = np.append(0, np.cumsum(sizes))
    seen = []
    for layer, start, stop, count in zip(*blocks, strict=True):
        assert 0 < stop - start <= block
        assert np.searchsorted(bounds, start, "right") == np.searchsorted(bounds, stop - 1, "right")
        assert count == rows[start:stop].sum()
        seen += [(layer, i) for i in range(start, stop)]
    assert seen == list(itertools.product(range(n_layers), range(n)))


@given(
    shard_sizes,
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 3),
    st.booleans(),
)
def test_windows_hold_every_block_once(sizes, block, window, epoch, shuffle):
    blocks = make_blocks(sizes, np.ones(sum(sizes)), 1, block)
    order = Order(blocks, window, seed=5, shuffle=shuffle)
    found = []
    for w in range(order.n_windows):
        numbers = order.window_blocks(epoch, w)
        assert len(numbers) <= window
        examples = (blocks.stop - blocks.start)[numbers].sum()
        assert examples <= order.max_window_examples
        assert order.epoch(epoch).window_rows[w] == blocks.rows[numbers].sum()
        found += numbers.tolist()
    assert sorted(found) == list(range(len(blocks)))
    lengths = np.diff(order.epoch(epoch).bounds)
    assert lengths.max() - lengths.min() <= 1
    if not shuffle:
        assert found == sorted(found)


def test_order_does_not_depend_on_which_epochs_were_asked_for_before():
    blocks = make_blocks([50, 50], np.ones(100), 1, 3)
    direct = Order(blocks, 5, seed=1).epoch(4).blocks
    walked = Order(blocks, 5, seed=1)
    epochs = [walked.epoch(e).blocks for e in (0, 1, 2, 3, 4, 1, 4)]
    assert np.array_equal(epochs[4], direct)
    assert np.array_equal(epochs[6], direct)
    assert np.array_equal(epochs[1], epochs[5])
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_window_mixes_the_whole_dataset():
    """Every tenth of the dataset is in every window of 256 blocks."""
    blocks = make_blocks([1000] * 10, np.ones(10_000), 1, 2)
    order = Order(blocks, MIN_BLOCKS_PER_WINDOW, seed=0)
    assert order.n_windows > 10
    for w in range(order.n_windows):
        tenths = blocks.start[order.window_blocks(0, w)] // 1000
        assert np.bincount(tenths, minlength=10).min() >= 5


@given(shard_sizes, st.integers(1, 7), st.integers(0, 3))
def test_drop_last_keeps_whole_batches(sizes, batch, epoch):
    blocks = make_blocks(sizes, np.full(sum(sizes), 3), 1, 1)
    order = Order(blocks, 2)
    everything = order.usable_rows(epoch, batch, False)
    assert everything == blocks.rows.sum()
    kept = order.usable_rows(epoch, batch, True)
    assert kept % batch == 0
    assert everything - batch < kept <= everything


@given(st.integers(0, 10_000), st.integers(1, 70))
def test_shares_are_equal_and_hold_every_slot_once(n, world):
    shares = [share(n, rank, world) for rank in range(world)]
    assert [i for a, b in shares for i in range(a, b)] == list(range(n))
    sizes = [b - a for a, b in shares]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == math.ceil(n / world)


def test_two_windows_hold_other_blocks_in_every_epoch():
    order = Order(make_blocks([8], np.ones(8, int), 1, 1), 4)
    assert order.n_windows == 2
    assert not order.resident
    assert len({tuple(sorted(order.window_blocks(epoch, 0))) for epoch in range(6)}) > 1
