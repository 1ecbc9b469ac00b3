"""The loaders over a real S3 server: the same bytes in the same order, and errors that name it."""

import itertools
import os

import pytest
import s3_proxy
import s3fs
import torch

from saev import cores, storage
from saev.config import DataConfig, LoaderConfig
from saev.errors import CorruptDataError
from saev.loaders import IndexedActivations, OrderedLoader, ShuffledLoader
from saev.shards import Shards

from .folders import keys, readers, write_shards


@pytest.fixture
def url(s3, request):
    return storage.join(s3, request.node.name)


def test_shuffled_and_ordered(url, tmp_path):
    shape = {"n_examples": 40, "layers": (0, 1), "labels": True, "dtype": "float16"}
    remote, local = write_shards(url, **shape), write_shards(str(tmp_path / "f"), **shape)
    cfg = LoaderConfig(
        layer="all", buffer_mb=0.02, split="train", val_fraction=0.2, ignore_labels=(1,)
    )
    with remote.open() as there, local.open() as here:
        pairs = [
            [
                list(ShuffledLoader(shards, cfg, 50, epochs=2, labels=True))
                for shards in (there, here)
            ],
            [list(OrderedLoader(shards, cfg, 50, labels=True)) for shards in (there, here)],
        ]
        for a, b in pairs:
            assert len(a) == len(b) > 3
            for x, y in zip(a, b, strict=True):
                assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


@pytest.mark.parametrize(("n_cores", "n_disk"), [(1, 2), (4, 3), (64, 4)])
def test_an_object_store_gets_more_threads_than_a_disk(n_cores, n_disk, url, tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "available", lambda: n_cores)
    for folder, n in ((write_shards(url), 16), (write_shards(str(tmp_path)), n_disk)):
        with folder.open() as shards:
            for loader in (
                ShuffledLoader(shards, LoaderConfig(), 9),
                OrderedLoader(shards, LoaderConfig(), 9),
            ):
                with loader:
                    next(iter_ := iter(loader))
                    assert len(readers()) == n
                    del iter_


def test_resume_and_break(url):
    folder = write_shards(url, n_examples=30)
    cfg = LoaderConfig(buffer_mb=0.01)
    with folder.open() as shards:
        whole = [keys([b]) for b in ShuffledLoader(shards, cfg, 25, epochs=1)]
        loader = ShuffledLoader(shards, cfg, 25, epochs=1)
        for _ in loader:
            break
        assert not readers()
        resumed = ShuffledLoader(Shards.open(url), cfg, 25, epochs=1)
        resumed.load_state_dict(loader.state_dict())
        assert [keys([b]) for b in resumed] == whole[1:]


def test_indexed(url):
    folder = write_shards(url)
    with folder.open() as shards:
        for verify in (True, False):
            batch = IndexedActivations(shards, DataConfig(), verify=verify).gather([130, 3, 77])
            assert torch.equal(batch.act, folder.vectors(batch))


def test_a_damaged_object_is_named(url):
    folder = write_shards(url)
    place = storage.join(url, "acts000001.bin")
    data = bytearray(storage.read_bytes(place))
    data[100] ^= 4
    storage.write_bytes(place, data)
    with (
        folder.open() as shards,
        pytest.raises(CorruptDataError, match=r"acts000001\.bin is damag"),
    ):
        list(ShuffledLoader(shards, LoaderConfig(), 10, epochs=1))
    assert not readers()


@pytest.mark.parametrize("cached", [False, True])
def test_flipped_bits_on_the_way_end_no_epoch(cached, url, tmp_path, monkeypatch, caplog):
    """Every third answer with activations has one; what is read again is right."""
    local = write_shards(str(tmp_path / "f"), n_examples=40)
    write_shards(url, n_examples=40)
    turn, bit = itertools.count(), itertools.count()
    if cached:
        monkeypatch.setenv("SAEV_CACHE_DIR", str(tmp_path / "cache"))
    cfg = LoaderConfig(buffer_mb=0.02)
    with s3_proxy.before(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        proxy.fault = lambda r: "flip" if ".bin" in r.path and next(turn) % 3 == 1 else ""
        proxy.flipped_bit = lambda n_bits: 977 * next(bit) % n_bits
        with Shards.open(url) as there, local.open() as here:
            loaders = (ShuffledLoader(x, cfg, 50, epochs=2) for x in (there, here))
            for x, y in zip(*loaders, strict=True):
                assert torch.equal(x.act, y.act)
    s3fs.S3FileSystem.clear_instance_cache()
    assert "was read wrongly once" in caplog.text
    assert not readers()
