"""Opening and reading a folder of protocol 3.0; every damage is one clear error."""

import gc
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from saev import storage
from saev.errors import ConfigError, CorruptDataError, IncompleteError, StorageError
from saev.shards import Shards, extract
from shards.recording import config


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> str:
    return extract.run(config(tmp_path_factory.mktemp("recorded")))


@pytest.fixture
def copy(recorded: str, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(recorded, tmp_path / storage.name(recorded)))


def test_what_it_says(recorded: str) -> None:
    shards = Shards.open(recorded)
    assert shards.n_examples == 17
    assert shards.layers == (1, 5)
    assert (shards.d_model, shards.content_tokens, shards.tokens_per_example) == (64, 16, 17)
    assert shards.shard_starts.tolist() == [0, 5, 10, 15, 17]
    assert [shards.locate(i) for i in (0, 4, 5, 16)] == [(0, 0), (0, 4), (1, 0), (3, 1)]
    assert shards.layer_index(5) == 1
    assert (shards.layer_index(-1), shards.layer_index(-2)) == (1, 0)  # of those recorded
    with pytest.raises(ConfigError, match=r"Layer -3 was not recorded"):
        shards.layer_index(-3)
    with pytest.raises(ConfigError, match=r"Layer 4 was not recorded in .*; it has 1, 5"):
        shards.layer_index(4)
    with pytest.raises(ConfigError, match="has layers 1, 5; name one"):
        shards.layer_index(None)
    with pytest.raises(ConfigError, match="Example 17 is not in"):
        shards.locate(17)


def test_ranges_are_slices_of_the_whole(recorded: str) -> None:
    shards = Shards.open(recorded)
    for layer in shards.layers:
        whole = shards.read(1, layer, 0, 5)
        for start in range(6):
            for stop in range(start, 6):
                assert torch.equal(shards.read(1, layer, start, stop), whole[start:stop])


def test_reads_into_a_given_tensor(recorded: str) -> None:
    shards = Shards.open(recorded)
    out = torch.full((2, 17, 64), 7.0)
    assert shards.read(0, 1, 1, 3, out) is out
    assert torch.equal(out, shards.read(0, 1, 0, 5)[1:3])
    for bad in (
        torch.empty(3, 17, 64),
        out.half(),
        out.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        with pytest.raises(ConfigError, match=r"expected \(2, 17, 64\) torch\.float32"):
            shards.read(0, 1, 1, 3, bad)
    for start, stop in ((-1, 2), (3, 2), (0, 6)):
        with pytest.raises(ConfigError, match=rf"Examples {start}:{stop} are not in acts000000"):
            shards.read(0, 1, start, stop)


def test_many_threads_and_reopening(recorded: str) -> None:
    with Shards.open(recorded) as shards:
        jobs = [(s, layer, i) for s in range(4) for layer in (1, 5) for i in range(2)] * 8
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda j: shards.read(j[0], j[1], j[2], j[2] + 1), jobs))
    for (shard, layer, i), tensor in zip(jobs, got, strict=True):  # reads again after close()
        assert torch.equal(tensor, shards.read(shard, layer, i, i + 1))
    shards.close()


def test_statistics_are_those_of_the_stored_values(recorded: str) -> None:
    shards = Shards.open(recorded)
    for layer in shards.layers:
        whole = torch.cat(
            [shards.read(s, layer, 0, i.n_examples) for s, i in enumerate(shards.infos)]
        )
        chosen = {"content": whole[:, 1:], "special": whole[:, :1], "all": whole}
        for tokens, values in chosen.items():
            rows = values.reshape(-1, 64).double().numpy()
            stats = shards.stats(layer, tokens)
            assert stats is not None
            assert stats.count == len(rows)
            np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(stats.mean_sq_norm, (rows**2).sum(1).mean(), rtol=1e-12)
            spread = ((rows - rows.mean(0)) ** 2).sum(1).mean()
            np.testing.assert_allclose(stats.centred_sq_norm, spread, rtol=1e-9)


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"No shards folder at .*/none: it does not exist"):
        Shards.open(str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"is not a shards folder: it has no metadata\.json"):
        Shards.open(str(tmp_path))


def test_incomplete(copy: Path) -> None:
    (copy / "shards.json").unlink()
    with pytest.raises(
        IncompleteError, match=r"did not finish\. Run the same `saev shards` command"
    ):
        Shards.open(str(copy))


@pytest.mark.parametrize(("change", "kind"), [(-1, "truncated"), (1, "too long")])
def test_wrong_size(copy: Path, change: int, kind: str) -> None:
    path = copy / "acts000002.bin"
    size = path.stat().st_size
    with path.open("r+b") as handle:
        handle.truncate(size + change)
    message = rf"acts000002\.bin is {kind}: it has {size + change} bytes, expected {size}\. .*again"
    with pytest.raises(CorruptDataError, match=message):
        Shards.open(str(copy))


def test_missing_file(copy: Path) -> None:
    (copy / "acts000001.bin").unlink()
    with pytest.raises(
        CorruptDataError, match=r"acts000001\.bin is missing; shards\.json lists it"
    ):
        Shards.open(str(copy))


@pytest.mark.parametrize("seed", range(5))
def test_one_flipped_bit_is_found(copy: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = copy / "acts000001.bin"
    data = bytearray(path.read_bytes())
    position = int(rng.integers(len(data)))
    data[position] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    shards = Shards.open(str(copy))
    layer, example = divmod(position // (17 * 64 * 4), 5)
    message = rf"acts000001\.bin is damaged: layer {(1, 5)[layer]}, example {example} of the shard"
    with pytest.raises(CorruptDataError, match=message):
        shards.read(1, (1, 5)[layer], 0, 5)
    shards.read(1, (1, 5)[layer], 0, 5, verify=False)
    shards.read(1, (5, 1)[layer], 0, 5)  # the other layer is whole
    with pytest.raises(CorruptDataError, match=r"acts000001\.bin is damaged: it has checksum"):
        shards.verify()


def test_file_that_shrinks_after_opening(copy: Path) -> None:
    shards = Shards.open(str(copy))
    (copy / "acts000000.bin").write_bytes(b"")
    with pytest.raises(CorruptDataError, match=r"acts000000\.bin is truncated"):
        shards.read(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("checksums.bin", lambda shards: shards.read(0, 1, 0, 1)),
        ("labels.bin", lambda shards: shards.labels()),
        ("stats.safetensors", lambda shards: shards.stats(1)),
        ("examples.parquet", lambda shards: shards.examples()),
        ("shards.json", lambda shards: None),
        ("metadata.json", lambda shards: None),
    ],
)
def test_truncated_companions(copy: Path, name: str, ask) -> None:
    path = copy / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptDataError, match=name.replace(".", r"\.")):
        ask(Shards.open(str(copy)))


OLD = Path(__file__).parents[1] / "upgrade" / "root" / "saev/shards/50c7c45994c5ded4"
"""A folder of version 0.1.0, which wrote no files.json: 20 examples in shards of 8."""


def test_a_lost_list(copy: Path) -> None:
    (copy / "files.json").unlink()
    with pytest.raises(
        CorruptDataError,
        match=r"files\.json is missing, the list of .* is of a later one\. Restore it",
    ):
        Shards.open(str(copy))


def test_edited_metadata(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(OLD, tmp_path / OLD.name))
    raw = json.loads((copy / "metadata.json").read_text())
    (copy / "metadata.json").write_text(json.dumps({**raw, "amp": True}))
    with pytest.raises(CorruptDataError, match="does not belong to its folder"):
        Shards.open(str(copy))


def test_shards_json_that_disagrees(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(OLD, tmp_path / OLD.name))
    rows = json.loads((copy / "shards.json").read_text())
    rows[0]["n_examples"] = 4
    (copy / "shards.json").write_text(json.dumps(rows))
    with pytest.raises(CorruptDataError, match=r"acts000000\.bin has \d+ bytes; 4 examples make"):
        Shards.open(str(copy))
    for wrong in ({"n_examples": -1}, {"name": "../x"}, {"size": 1}, {"n_bytes": "many"}):
        changed = [rows[0], {**rows[1], **wrong}, rows[2]]
        (copy / "shards.json").write_text(json.dumps(changed))
        with pytest.raises(
            CorruptDataError, match=rf"shards\.json row 1: {next(iter(wrong))}: "
        ) as err:
            Shards.open(str(copy))
        assert "\n" not in str(err.value)
    (copy / "shards.json").write_text("{}")
    with pytest.raises(CorruptDataError, match="holds a dict, expected a list"):
        Shards.open(str(copy))


def test_garbage_is_collected_again_after_a_folder_was_opened(copy: Path) -> None:
    """Also after one that could not be opened."""
    assert gc.isenabled()
    Shards.open(str(copy)).close()
    assert gc.isenabled()
    (copy / "shards.json").write_text("{}")
    with pytest.raises(CorruptDataError):
        Shards.open(str(copy))
    assert gc.isenabled()


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    url = extract.run(
        config(tmp_path, max_tokens_per_shard=1, data={"kind": "fake-img", "n_examples": 90})
    )
    gc.collect()  # what other tests left open is closed before we count
    opened = len(os.listdir("/proc/self/fd"))
    with Shards.open(url) as shards:
        with ThreadPoolExecutor(8) as pool:
            rows = list(pool.map(lambda i: shards.read(i % 90, 1, 0, 1), range(360)))
        assert all(torch.equal(rows[i], rows[i % 90]) for i in range(360))
        assert len(os.listdir("/proc/self/fd")) <= opened + 64
    assert len(os.listdir("/proc/self/fd")) == opened
