"""Folders of the published saev (protocol 2.1) open and read like our own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saev import storage
from saev.errors import CorruptDataError, IncompleteError
from saev.shards import Shards
from shards import published

LAYERS = (3, 7)
rng = np.random.default_rng(0)


def check(url: str, acts: np.ndarray) -> None:
    with Shards.open(url) as shards:
        assert shards.n_examples == len(acts)
        for i, start in enumerate(shards.shard_starts[:-1]):
            n = shards.infos[i].n_examples
            for index, layer in enumerate(shards.layers):
                for first in range(n + 1):
                    got = shards.read(i, layer, first, n)
                    expected = acts[start + first : start + n, index]
                    assert got.dtype == torch.float32
                    np.testing.assert_array_equal(got.numpy(), expected)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 9),
    per_shard=st.integers(1, 5),
    n_layers=st.integers(1, 3),
    padded=st.booleans(),
    extra=st.booleans(),
    cls_token=st.booleans(),
)
def test_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    n: int, per_shard: int, n_layers: int, padded: bool, extra: bool, cls_token: bool,
) -> None:  # fmt: skip
    acts = rng.standard_normal((n, n_layers, 3, 2), dtype=np.float32)
    url = published.write(
        tmp_path_factory.mktemp("published") / "0a1b2c3d", acts, layers=tuple(range(n_layers)),
        cls_token=cls_token, per_shard=per_shard, padded=padded, extra_empty_shard=extra,
    )  # fmt: skip
    check(url, acts)


def test_what_goes_with_them(tmp_path: Path) -> None:
    acts = rng.standard_normal((5, 2, 4, 2), dtype=np.float32)
    labels = rng.integers(0, 151, (5, 3))
    url = published.write(
        tmp_path / "x", acts, layers=LAYERS, cls_token=True, per_shard=3, labels=labels
    )
    shards = Shards.open(url)
    np.testing.assert_array_equal(shards.labels(), labels)
    assert shards.metadata.data.startswith("gASV")  # text: never unpickled
    assert shards.stats(7) is None
    assert shards.examples().column("index").to_pylist() == [0, 1, 2, 3, 4]
    shards.verify()  # has no checksums, so there is nothing to find


def test_early_keys_open_too(tmp_path: Path) -> None:
    acts = rng.standard_normal((3, 2, 4, 2), dtype=np.float32)
    url = published.write(
        tmp_path / "x", acts, layers=LAYERS, cls_token=True, per_shard=2, old_keys=True
    )
    check(url, acts)
    assert Shards.open(url).metadata.family == "clip"


def test_on_object_storage(tmp_path: Path, s3: str) -> None:
    acts = rng.standard_normal((4, 2, 4, 2), dtype=np.float32)
    local = published.write(tmp_path / "x", acts, layers=LAYERS, cls_token=True, per_shard=3)
    url = storage.join(s3, "published")
    for entry in storage.list_dir(local):
        storage.write_bytes(storage.join(url, entry.name), storage.read_bytes(entry.url))
    check(url, acts)


def test_faults(tmp_path: Path) -> None:
    acts = rng.standard_normal((4, 2, 4, 2), dtype=np.float32)
    url = published.write(tmp_path / "x", acts, layers=LAYERS, cls_token=True, per_shard=3)
    with (tmp_path / "x" / "acts000001.bin").open("r+b") as handle:
        handle.truncate(2 * 4 * 2 * 4 - 1)
    with pytest.raises(CorruptDataError, match=r"acts000001\.bin is truncated: it has 63 bytes"):
        Shards.open(url)
    (tmp_path / "x" / "acts000001.bin").unlink()
    with pytest.raises(CorruptDataError, match=r"acts000001\.bin is missing"):
        Shards.open(url)
    (tmp_path / "x" / "shards.json").unlink()
    with pytest.raises(IncompleteError, match=r"shards\.json is missing"):
        Shards.open(url)
