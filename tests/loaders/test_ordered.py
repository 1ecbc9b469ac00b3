"""Dataset order, ranges, and that ranges of shards make up the whole."""

import itertools

import pytest
import torch

from saev.config import DataConfig
from saev.errors import ConfigError
from saev.loaders import OrderedLoader

from .folders import keys, write_shards
from .test_shuffled import check_batch


@pytest.mark.parametrize("protocol", ["3.0", "2.1"])
@pytest.mark.parametrize("tokens", ["content", "special", "all"])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_order_is_layer_example_token(tmp_path, protocol, tokens, n_threads):
    folder = write_shards(str(tmp_path / "f"), layers=(1, 4), protocol=protocol)
    wanted = {"content": range(6), "special": [-1], "all": range(-1, 6)}[tokens]
    with folder.open() as shards:
        loader = OrderedLoader(
            shards, DataConfig(layer="all", tokens=tokens), 17, n_threads=n_threads, buffer_mb=0.006
        )
        batches = list(loader)
        for batch in batches:
            check_batch(folder, batch)
        assert keys(batches) == list(itertools.product((1, 4), range(23), wanted))
        assert [len(b.act) for b in batches[:-1]] == [17] * (len(batches) - 1)
        assert loader.n_batches() == len(batches)


@pytest.mark.parametrize("split", ["all", "train", "val"])
def test_ranges_of_shards_make_up_the_whole(tmp_path, split):
    folder = write_shards(str(tmp_path / "f"), labels=True)
    cfg = DataConfig(split=split, val_fraction=0.3, ignore_labels=(2,))
    with folder.open() as shards:
        whole = keys(OrderedLoader(shards, cfg, 10, labels=True))
        n_shards = len(shards.infos)
        assert n_shards == 4
        pieces = [
            OrderedLoader(shards, cfg, 10, shard_range=(i, i + 1), labels=True)
            for i in range(n_shards)
        ]
        assert list(itertools.chain(*map(keys, pieces))) == whole
        assert sum(p.n_tokens for p in pieces) == len(whole)
        assert keys(OrderedLoader(shards, cfg, 10, shard_range=(1, 3))) == keys(
            OrderedLoader(shards, cfg, 10, example_range=(7, 21))
        )
        for batch in OrderedLoader(shards, cfg, 10, shard_range=(1, 3), labels=True):
            check_batch(folder, batch)


def test_a_range_without_wanted_tokens_has_no_batches(folder):
    cfg = DataConfig(split="val", val_fraction=0.001)
    with folder.open() as shards:
        for span in ((3, 3), (0, 2)):
            loader = OrderedLoader(shards, cfg, 10, shard_range=span)
            assert loader.n_tokens == 0
            assert list(loader) == list(loader) == []
        with pytest.raises(ConfigError, match="endless"):
            OrderedLoader(shards, cfg, 10, shard_range=(0, 2), epochs=None)
        with pytest.raises(ConfigError, match="No tokens are left"):
            OrderedLoader(shards, cfg, 10)


def test_wrong_ranges(folder):
    with folder.open() as shards:
        with pytest.raises(ConfigError, match="Shards 2:9 are not in"):
            OrderedLoader(shards, DataConfig(), 10, shard_range=(2, 9))
        with pytest.raises(ConfigError, match="Examples -1:9 are not in"):
            OrderedLoader(shards, DataConfig(), 10, example_range=(-1, 9))
        with pytest.raises(ConfigError, match="not both"):
            OrderedLoader(shards, DataConfig(), 10, example_range=(0, 9), shard_range=(0, 1))


def test_resuming_after_any_batch_gives_the_rest(folder):
    with folder.open() as shards:

        def make(**kwargs):
            return OrderedLoader(shards, DataConfig(), 20, buffer_mb=0.006, **kwargs)

        loader, states, batches = make(), [], []
        for batch in loader:
            states.append(loader.state_dict())
            batches.append(keys([batch]))
        for done, state in enumerate(states[:-1], 1):
            resumed = make()
            resumed.load_state_dict(state)
            assert [keys([b]) for b in resumed] == batches[done:]
        with pytest.raises(ConfigError, match="its data is"):
            make(example_range=(0, 22)).load_state_dict(states[0])


def test_every_pass_gives_the_same(folder):
    with folder.open() as shards:
        loader = OrderedLoader(shards, DataConfig(), 50, drop_last=True)
        first, second = keys(loader), keys(loader)
        assert first == second
        assert len(first) == 100


def test_one_example_at_a_time_fits_any_buffer(folder):
    with folder.open() as shards:
        loader = OrderedLoader(shards, DataConfig(), 7, buffer_mb=1e-6, dtype=torch.float16)
        assert len(keys(loader)) == 138
