"""Single vectors, by index, in this process and in DataLoader workers."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from saev.config import DataConfig
from saev.errors import ConfigError, CorruptDataError
from saev.loaders import Batch, IndexedActivations, OrderedLoader

from .folders import keys, write_shards
from .test_closing import flip
from .test_shuffled import check_batch


@pytest.mark.parametrize("protocol", ["3.0", "2.1"])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "cfg",
    [
        {},
        {"tokens": "special"},
        {"tokens": "all", "ignore_labels": (0, 2)},
        {"ignore_labels": (1,), "split": "train", "val_fraction": 0.5},
    ],
)
def test_indices_are_dataset_order(tmp_path, protocol, verify, cfg):
    folder = write_shards(str(tmp_path / "f"), layers=(1, 4), protocol=protocol, labels=True)
    cfg = DataConfig(layer="all", **cfg)
    labels = cfg.tokens != "special"
    with folder.open() as shards:
        data = IndexedActivations(shards, cfg, labels=labels, verify=verify)
        batch = data.gather(range(len(data)))
        check_batch(folder, batch)
        assert keys([batch]) == keys(OrderedLoader(shards, cfg, 1000))
        mixed = np.random.default_rng(0).permutation(len(data))[:50]
        for part in (mixed, torch.from_numpy(mixed), mixed.tolist()):
            found = data.gather(part)
            check_batch(folder, found)
            assert keys([found]) == [keys([batch])[i] for i in mixed]
        for i in (0, 5, len(data) - 1, -1, -len(data)):
            item = data[i]
            assert torch.equal(item.act, batch.act[i])
            assert item[1:3] == (batch.example_idx[i], batch.token_idx[i])
            assert item.layer == batch.layer[i]
            assert item.token_label == (batch.token_labels[i] if labels else -1)


def test_wrong_indices(folder):
    with folder.open() as shards:
        data = IndexedActivations(shards, DataConfig())
        for wrong in (138, -139):
            with pytest.raises(IndexError, match=f"Index {wrong} is out of range for 138"):
                data[wrong]
        with pytest.raises(ConfigError, match="2 dimensions"):
            data.gather([[1]])
        assert len(list(data)) == 138  # iteration by index ends
        assert data.gather([]).act.shape == (0, 8)


def test_checksums(folder):
    flip(folder, "acts000000.bin")
    with folder.open() as shards:
        with pytest.raises(CorruptDataError, match=r"acts000000\.bin is damaged"):
            IndexedActivations(shards, DataConfig())[3]
        assert IndexedActivations(shards, DataConfig(), verify=False)[3].example_idx == 0
        assert IndexedActivations(shards, DataConfig())[6].example_idx == 1


def collated(loader) -> Batch:
    """All batches of a DataLoader as one."""
    rows = list(loader)
    columns = [torch.cat([row[i] for row in rows]) for i in range(5)]
    return Batch(columns[0], columns[1], columns[2], columns[3].to(torch.int16), columns[4])


@pytest.mark.parametrize("method", ["in process", "fork", "spawn"])
def test_in_a_dataloader(tmp_path, method):
    folder = write_shards(str(tmp_path / "f"), labels=True)
    with folder.open() as shards:
        data = IndexedActivations(shards, DataConfig(tokens="all"), labels=True)
        data[0]  # an open file, which workers inherit
        more = {} if method == "in process" else {"multiprocessing_context": method}
        n_workers = {"in process": 0, "fork": 2, "spawn": 1}[method]
        loader = DataLoader(data, batch_size=33, num_workers=n_workers, **more)
        batch = collated(loader)
        check_batch(folder, batch)
        assert keys([batch]) == keys(OrderedLoader(shards, DataConfig(tokens="all"), 1000))
    assert not multiprocessing.active_children()


def test_pickling_opens_the_folder_anew(folder):
    with folder.open() as shards:
        data = IndexedActivations(shards, DataConfig(), dtype=torch.float64)
        text = pickle.dumps(data)
        assert len(text) < 1500  # the config, not the data
        copy = pickle.loads(text)
    assert copy.shards is not shards
    assert torch.equal(copy[77].act, data[77].act)
    assert copy[77].act.dtype == torch.float64
