"""What the shuffled loader gives: every wanted vector once, mixed, the same for any threads."""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saev.config import LoaderConfig
from saev.errors import ConfigError
from saev.limits import INDEX_BYTES_PER_TOKEN
from saev.loaders import OrderedLoader, ShuffledLoader, batch_metrics
from saev.shards.protocol import in_validation

from .folders import Folder, keys, write_shards


def expected(folder: Folder, cfg: LoaderConfig) -> set[tuple[int, int, int]]:
    """What a config asks for, by looking at every token."""
    meta = folder.metadata
    layers = meta.layers if cfg.layer == "all" else (cfg.layer or meta.layers[0],)
    tokens = {"content": range(meta.content_tokens_per_example), "special": range(-1, 0)}
    tokens["all"] = range(-int(meta.cls_token), meta.content_tokens_per_example)
    wanted = set()
    for example in range(meta.n_examples):
        in_val = bool(in_validation(np.array([example]), cfg.val_fraction)[0])
        if cfg.split != "all" and (cfg.split == "val") != in_val:
            continue
        for token in tokens[cfg.tokens]:
            if token >= 0 and cfg.ignore_labels:
                assert folder.labels is not None
                if folder.labels[example, token] in cfg.ignore_labels:
                    continue
            wanted |= {(layer, example, token) for layer in layers}
    return wanted


@st.composite
def cases(draw):
    """A folder, a config and how it is loaded."""
    cls_token = draw(st.booleans())
    n_layers = draw(st.integers(1, 3))
    shape = {
        "n_examples": draw(st.integers(1, 30)),
        "layers": tuple(range(2, 2 + n_layers)),
        "content_tokens": draw(st.integers(1, 7)),
        "cls_token": cls_token,
        "d_model": draw(st.integers(1, 5)),
        "protocol": draw(st.sampled_from(["3.0", "2.1"])),
        "examples_per_shard": draw(st.integers(1, 12)),
        "labels": True,
    }
    shape["dtype"] = (
        "float32"
        if shape["protocol"] == "2.1"
        else draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    )
    cfg = {
        "layer": draw(st.sampled_from(["all", 2])),
        "tokens": draw(
            st.sampled_from(["content", "special", "all"] if cls_token else ["content"])
        ),
        "ignore_labels": draw(st.sampled_from([(), (0,), (1, 3)])),
        "split": draw(st.sampled_from(["all", "train", "val"])),
        "val_fraction": draw(st.sampled_from([0.0, 0.3])),
        "buffer_mb": draw(st.sampled_from([0.004, 0.02, 1.0])),
        "n_threads": draw(st.integers(1, 4)),
    }
    load = {
        "batch_size": draw(st.integers(1, 40)),
        "seed": draw(st.integers(0, 99)),
        "drop_last": draw(st.booleans()),
    }
    return shape, cfg, load, draw(st.integers(1, 3))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_every_wanted_vector_comes_exactly_once(case):
    shape, cfg, load, world = case
    with tempfile.TemporaryDirectory() as root:
        folder = write_shards(str(Path(root) / "f"), **shape)
        cfg = LoaderConfig(**cfg)
        wanted = expected(folder, cfg)
        with folder.open() as shards:
            try:
                loaders = [
                    ShuffledLoader(
                        shards, cfg, **load, epochs=2, rank=rank, world_size=world,
                        labels=cfg.tokens != "special",
                    )
                    for rank in range(world)
                ]  # fmt: skip
            except ConfigError:
                row = shards.layouts[0].row_bytes
                too_few = load["drop_last"] and len(wanted) < load["batch_size"]
                block = max(1, 1024 // max(1, row)) * (row + 8 * INDEX_BYTES_PER_TOKEN)
                too_small = cfg.buffer_mb * 2**20 < 2 * block * 4 / 3
                assert not wanted or too_small or too_few
                return
            steps = []
            for loader in loaders:
                batches = list(loader)
                for batch in batches:
                    check_batch(folder, batch)
                assert loader.n_tokens == len(wanted)
                assert len(batches) == loader.n_batches(0) + loader.n_batches(1)
                steps.append([keys([batch]) for batch in batches])
            # A step's batch is the same set of rows however many ranks share it.
            alone = [keys([b]) for b in ShuffledLoader(shards, cfg, **load, epochs=2)]
            together = [list(itertools.chain(*parts)) for parts in zip(*steps, strict=True)]
            assert [sorted(b) for b in together] == [sorted(b) for b in alone]
            per_epoch = loaders[0].n_batches(0)
            assert all(len(b) == load["batch_size"] for b in alone[: per_epoch - 1])
            given_ = list(itertools.chain(*alone))
            if load["drop_last"]:
                assert len(set(given_)) * 2 >= len(given_)
                assert set(given_) <= wanted
            else:
                assert sorted(given_) == sorted([*wanted, *wanted])


def check_batch(folder: Folder, batch) -> None:
    assert batch.act.dtype == torch.float32
    assert torch.equal(batch.act, folder.vectors(batch).float())
    assert batch.example_idx.dtype == batch.token_idx.dtype == batch.layer.dtype == torch.int64
    if batch.token_labels is not None:
        assert batch.token_labels.dtype == torch.int16
        labels = folder.labels[batch.example_idx, batch.token_idx.clamp(min=0)].astype(np.int16)
        right = np.where(batch.token_idx.numpy() < 0, -1, labels)
        assert np.array_equal(batch.token_labels.numpy(), right)


SMALL = {"buffer_mb": 0.004}  # several windows


def test_a_batch_of_several_windows_has_all_its_labels(tmp_path):
    folder = write_shards(str(tmp_path / "f"), labels=True)
    with folder.open() as shards:
        (batch,) = ShuffledLoader(shards, LoaderConfig(**SMALL), 1000, epochs=1, labels=True)
        assert len(batch.act) == 23 * 6
        check_batch(folder, batch)


def test_the_order_does_not_depend_on_threads(folder):
    with folder.open() as shards:
        runs = [
            list(ShuffledLoader(shards, LoaderConfig(n_threads=n, **SMALL), 10, epochs=2))
            for n in (1, 2, 7)
        ]
    for batches in runs[1:]:
        for a, b in zip(runs[0], batches, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)


@pytest.mark.parametrize("buffer_mb", [0.004, 1.0])
def test_epochs_and_seeds_have_other_orders(folder, buffer_mb):
    with folder.open() as shards:
        cfg = LoaderConfig(buffer_mb=buffer_mb)
        loader = ShuffledLoader(shards, cfg, 23 * 6, epochs=3)
        epochs = [keys([batch]) for batch in loader]
        other = [keys([b]) for b in ShuffledLoader(shards, cfg, 23 * 6, epochs=1, seed=1)]
    orders = [*epochs, *other]
    assert all(sorted(o) == sorted(orders[0]) for o in orders)
    assert len({tuple(o) for o in orders}) == 4


def test_an_endless_loader_goes_on_into_the_next_epochs(folder):
    with folder.open() as shards, ShuffledLoader(shards, LoaderConfig(**SMALL), 100) as loader:
        seen = []
        for batch in loader:
            seen += keys([batch])
            if len(seen) >= 138 * 5:
                break
    for i in range(0, 138 * 5, 138):
        assert len(set(seen[i : i + 138])) == 138


def test_data_in_one_window_are_read_once_for_all_epochs(folder):
    with folder.open() as shards:
        loader = ShuffledLoader(shards, LoaderConfig(), 50, epochs=5)
        assert len(keys(loader)) == 5 * 138
        assert loader.metrics()["loader/read_mb"] * 1e6 == folder.acts.nbytes


def test_batches_that_are_kept_are_never_overwritten(folder):
    with folder.open() as shards:
        kept = list(ShuffledLoader(shards, LoaderConfig(**SMALL), 10, epochs=8))
        views = [b.act[1:3, ::2] for b in ShuffledLoader(shards, LoaderConfig(), 10, epochs=8)]
        again = [b.act.clone() for b in ShuffledLoader(shards, LoaderConfig(), 10, epochs=8)]
    assert len(kept) == 8 * 14
    for batch in kept:
        assert torch.equal(batch.act, folder.vectors(batch))
    for view, act in zip(views, again, strict=True):
        assert torch.equal(view, act[1:3, ::2])


def test_memory_of_dropped_batches_is_used_again(folder):
    places = set()
    with folder.open() as shards:
        for batch in ShuffledLoader(shards, LoaderConfig(), 10, epochs=8):
            places.add(batch.act.untyped_storage().data_ptr())
    assert len(places) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_batches_have_the_dtype_that_was_asked_for(tmp_path, stored, dtype):
    folder = write_shards(str(tmp_path / "f"), dtype=stored)
    with folder.open() as shards:
        for batch in ShuffledLoader(shards, LoaderConfig(**SMALL), 16, epochs=1, dtype=dtype):
            assert batch.act.dtype == dtype
            assert torch.equal(batch.act, folder.vectors(batch).to(dtype))


def test_only_wanted_examples_are_read(tmp_path):
    folder = write_shards(str(tmp_path / "f"), n_examples=200, examples_per_shard=64)
    cfg = LoaderConfig(split="val", val_fraction=0.1)
    n_val = int(in_validation(np.arange(200), 0.1).sum())
    with folder.open() as shards:
        loader = ShuffledLoader(shards, cfg, 32, epochs=1)
        assert loader.n_tokens == n_val * 6 == len(keys(loader))
        assert loader.metrics()["loader/read_mb"] * 1e6 == folder.acts[0, 0].nbytes * n_val


def test_splits_are_disjoint_and_complete(folder):
    with folder.open() as shards:
        sides = [
            {
                k[1]
                for k in keys(
                    OrderedLoader(shards, LoaderConfig(split=side, val_fraction=0.4), 1000)
                )
            }
            for side in ("train", "val")
        ]
    assert sides[0] | sides[1] == set(range(23))
    assert not sides[0] & sides[1]
    assert all(sides)


@pytest.mark.parametrize("tokens", ["content", "special"])
@pytest.mark.parametrize("buffer_mb", [0.05, 0.2, 10])
def test_windows_stay_within_the_budget(tmp_path, buffer_mb, tokens):
    folder = write_shards(
        str(tmp_path / "f"), n_examples=500, content_tokens=9, d_model=64, examples_per_shard=90
    )
    with folder.open() as shards:
        cfg = LoaderConfig(buffer_mb=buffer_mb, tokens=tokens)
        iterator = iter(ShuffledLoader(shards, cfg, 100, epochs=1))
        most = 0
        for _ in iterator:
            windows = [b for b in iterator._buffers._buffers if b is not None]
            most = max(most, sum(b.nbytes for b in windows))
        needed = 500 * 64 * 4 * (10 if tokens == "content" else 1)
        assert 0.4 * min(needed, buffer_mb * 2**20) < most <= min(needed, buffer_mb * 2**20)


# --- mixing --------------------------------------------------------------------------------


def test_batches_of_4096_are_mixed(tmp_path):
    """Normalised token entropy ≥ 0.98, and as many examples as a window has, from everywhere."""
    folder = write_shards(
        str(tmp_path / "f"), n_examples=2048, content_tokens=196, d_model=2, examples_per_shard=600
    )
    buffer_mb = 2 * 256.5 * 197 * (8 + 32) / 2**20  # windows of 256 examples, an eighth
    with folder.open() as shards:
        loader = ShuffledLoader(
            shards, LoaderConfig(buffer_mb=buffer_mb), 4096, epochs=1, drop_last=True
        )
        for batch in loader:
            values = batch_metrics(batch, n_examples=2048, content_tokens=196)
            assert values["loader/token_entropy_normalized"] >= 0.98
            assert values["loader/token_coverage"] == 1.0
            assert values["loader/example_entropy_normalized"] >= 0.72  # ln 256 / ln 2048 = 0.727
            eighths = torch.bincount(batch.example_idx // 256, minlength=8)
            assert eighths.min() > 4096 / 8 / 3


# --- state ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("buffer_mb", "drop_last"), [(0.004, False), (0.004, True), (1.0, False), (0.0035, True)]
)
def test_resuming_after_any_batch_gives_the_rest(folder, buffer_mb, drop_last):
    def make(shards):
        cfg = LoaderConfig(buffer_mb=buffer_mb)
        return ShuffledLoader(shards, cfg, 25, seed=4, epochs=3, drop_last=drop_last)

    with folder.open() as shards:
        loader, states, batches = make(shards), [], []
        states.append(loader.state_dict())
        for batch in loader:
            batches.append(keys([batch]))
            states.append(json.loads(json.dumps(loader.state_dict())))
        assert len(batches) == 3 * (5 if drop_last else 6)
        for done, state in enumerate(states[:-1]):
            resumed = make(shards)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            assert [keys([b]) for b in resumed] == batches[done:]
        finished = make(shards)
        finished.load_state_dict(states[-2])
        next(iter(finished))
        assert [keys([b]) for b in finished] == []  # the three epochs are over


def test_resuming_reads_no_earlier_window(tmp_path):
    folder = write_shards(str(tmp_path / "f"), n_examples=400, examples_per_shard=100)
    with folder.open() as shards:
        cfg = LoaderConfig(buffer_mb=0.02)
        loader = ShuffledLoader(shards, cfg, 100, epochs=1)
        iterator = iter(loader)
        for _ in range(20):
            next(iterator)
        state = loader.state_dict()
        loader.close()
        resumed = ShuffledLoader(shards, cfg, 100, epochs=1)
        resumed.load_state_dict(state)
        assert sum(len(b.act) for b in resumed) == 400
        read = resumed.metrics()["loader/read_mb"] * 1e6
        window = 0.01 * 2**20 / (7 * (32 + 32)) * folder.acts[0, 0].nbytes
        assert read <= 400 / 6 * folder.acts[0, 0].nbytes + window


def test_a_break_keeps_the_place(folder):
    with folder.open() as shards:
        cfg = LoaderConfig(**SMALL)
        whole = [keys([b]) for b in ShuffledLoader(shards, cfg, 25, epochs=2)]
        loader, pieces = ShuffledLoader(shards, cfg, 25, epochs=2), []
        while len(pieces) < len(whole):
            for i, batch in enumerate(loader):
                pieces.append(keys([batch]))
                if i == 2:
                    break
        assert pieces == whole
        assert list(loader) == []
        third = keys(loader)  # the next two epochs
        assert len(third) == 2 * 138
        assert third[:138] != list(itertools.chain(*whole[:6]))
        loader.reset()
        assert [keys([b]) for b in loader] == whole


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 1}, "seed"),
        ({"tokens": "all"}, "data"),
        ({"split": "train", "val_fraction": 0.3}, "data"),
        ({"buffer_mb": 0.008}, "order"),
    ],
)
def test_a_state_of_something_else_is_refused(folder, change, word):
    load = {k: change.pop(k) for k in ("seed",) if k in change}
    with folder.open() as shards:
        state = ShuffledLoader(shards, LoaderConfig(**SMALL), 10).state_dict()
        other = ShuffledLoader(shards, LoaderConfig(**(SMALL | change)), 10, **load)
        with pytest.raises(ConfigError, match=f"its {word} is"):
            other.load_state_dict(state)


def test_a_state_of_other_shards_is_refused(folder, tmp_path):
    more = write_shards(str(tmp_path / "more"), n_examples=24)
    coarse = write_shards(str(tmp_path / "coarse"), dtype="float16")
    with folder.open() as shards:
        state = ShuffledLoader(shards, LoaderConfig(), 10).state_dict()
        for other in (more, coarse):
            with other.open() as others, pytest.raises(ConfigError, match="its data is"):
                ShuffledLoader(others, LoaderConfig(), 10).load_state_dict(state)
        with pytest.raises(ConfigError, match="lacks"):
            ShuffledLoader(shards, LoaderConfig(), 10).load_state_dict({"epoch": 1})
        with pytest.raises(ConfigError, match="position 999"):
            ShuffledLoader(shards, LoaderConfig(), 10).load_state_dict(state | {"position": 999})


def test_threads_do_not_change_a_state(folder):
    with folder.open() as shards:
        few, many = (
            ShuffledLoader(shards, LoaderConfig(n_threads=n, **SMALL), 25, epochs=1) for n in (1, 5)
        )
        iterator = iter(few)
        first = [keys([next(iterator)]) for _ in range(3)]
        many.load_state_dict(few.state_dict())
        whole = [keys([b]) for b in ShuffledLoader(shards, LoaderConfig(**SMALL), 25, epochs=1)]
        assert first + [keys([b]) for b in many] == whole
        few.close()


@pytest.mark.parametrize("tokens", ["all", "special"])
def test_one_state_serves_any_number_of_ranks(folder, tokens):
    """Ranks make the same steps, so the state that one of them saved resumes each, and others."""
    with folder.open() as shards:

        def make(rank, world_size):
            cfg = LoaderConfig(tokens=tokens, **SMALL)
            return ShuffledLoader(
                shards, cfg, 10, epochs=6, drop_last=True, rank=rank, world_size=world_size
            )

        whole = {w: [[keys([b]) for b in make(rank, w)] for rank in range(w)] for w in (1, 2, 3)}
        loader = make(0, 3)
        for _, _ in zip(range(5), loader, strict=False):
            state = loader.state_dict()
        loader.close()
        for world_size, ranks in whole.items():
            for rank, steps in enumerate(ranks):
                resumed = make(rank, world_size)
                resumed.load_state_dict(state)
                assert [keys([b]) for b in resumed] == steps[5:]
                assert len(steps) > 5


def test_ranks_share_the_reading(tmp_path):
    """Each example is read by one rank, and each rank gives about its share of every batch."""
    folder = write_shards(str(tmp_path / "f"), n_examples=600, content_tokens=9)
    with folder.open() as shards:
        n_bytes = []
        for rank in range(3):
            loader = ShuffledLoader(
                shards, LoaderConfig(buffer_mb=0.1), 600, epochs=1, rank=rank, world_size=3
            )
            sizes = [len(b.act) for b in loader]
            assert loader.n_batches() == len(sizes) > 5
            assert all(140 < n < 260 for n in sizes[:-1])
            n_bytes.append(loader.metrics()["loader/read_mb"] * 1e6)
        alone = ShuffledLoader(shards, LoaderConfig(buffer_mb=0.1), 600, epochs=1)
        for _ in alone:
            pass
        assert sum(n_bytes) == pytest.approx(alone.metrics()["loader/read_mb"] * 1e6)
        assert max(n_bytes) < 1.1 * min(n_bytes)


def test_more_ranks_than_rows_in_a_batch(folder):
    """Some have no row of a batch; every row still comes once."""
    with folder.open() as shards:
        loaders = [
            ShuffledLoader(shards, LoaderConfig(**SMALL), 4, epochs=1, rank=r, world_size=9)
            for r in range(9)
        ]
        batches = [list(loader) for loader in loaders]
        assert {len(b) for b in batches} == {loaders[0].n_batches()}
        assert any(len(b.act) == 0 for of_rank in batches for b in of_rank)
        found = sorted(itertools.chain(*(keys(b) for b in batches)))
        assert found == sorted(keys(ShuffledLoader(shards, LoaderConfig(**SMALL), 4, epochs=1)))


# --- wrong configs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "cfg", "load", "message"),
    [
        ({}, {"layer": 9}, {}, "Layer 9 was not recorded"),
        ({"layers": (1, 2)}, {}, {}, "has layers 1, 2; name one"),
        ({"cls_token": False}, {"tokens": "special"}, {}, "no class token"),
        ({}, {"ignore_labels": (1,)}, {}, r"ignore_labels=\[1\] needs labels.bin"),
        ({}, {}, {"labels": True}, "Token labels needs labels.bin"),
        ({"labels": True}, {"tokens": "special"}, {"labels": True}, "only content tokens have"),
        ({}, {"buffer_mb": 0.0005}, {}, "buffer_mb=0.000.* is too small"),
        ({}, {}, {"batch_size": 139, "drop_last": True}, "batch_size is 139, the data have 138"),
        ({"labels": True}, {"ignore_labels": (0, 1, 2, 3)}, {}, "No tokens are left"),
        ({}, {"split": "val"}, {}, "Set val_fraction"),
        ({"content_tokens": 0}, {}, {}, "No tokens are left"),
        ({}, {}, {"batch_size": 0}, "batch_size is 0"),
        ({}, {}, {"rank": 2, "world_size": 2}, "rank is 2, expected 0 to 1"),
        ({}, {}, {"epochs": -1}, "epochs is -1"),
        ({}, {}, {"device": "meta"}, "on cpu or cuda, not on meta"),
    ],
)
def test_a_wrong_config_is_one_clear_error(tmp_path, shape, cfg, load, message):
    folder = write_shards(str(tmp_path / "f"), **shape)
    load = {"batch_size": 10} | load
    with folder.open() as shards, pytest.raises(ConfigError, match=message) as info:
        ShuffledLoader(shards, LoaderConfig(**cfg), **load)
    assert "\n" not in str(info.value)


def test_an_empty_folder_is_an_error(tmp_path):
    folder = write_shards(str(tmp_path / "f"), n_examples=0)
    with folder.open() as shards, pytest.raises(ConfigError, match="has no examples"):
        ShuffledLoader(shards, LoaderConfig(), 10)


def test_a_window_of_few_examples_is_warned_of(tmp_path, caplog):
    folder = write_shards(str(tmp_path / "f"), n_examples=300)
    with folder.open() as shards:
        ShuffledLoader(shards, LoaderConfig(buffer_mb=1), 10)
        assert not caplog.records
        ShuffledLoader(shards, LoaderConfig(buffer_mb=0.01), 10)
    assert "windows of only" in caplog.text


def test_labels_outside_a_byte_are_refused():
    with pytest.raises(ConfigError, match=r"ignore_labels.*256"):
        LoaderConfig.from_dict({"ignore_labels": [256]})
    assert LoaderConfig.from_dict({"layer": "all"}).layer == "all"
    assert LoaderConfig.from_dict({"layer": 11.0}).layer == 11
