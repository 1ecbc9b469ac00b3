"""What is decided before training: defaults, splits, groups and names."""

import pytest

from saev import storage
from saev.config import LoaderConfig, Relu, SaeConfig, TopK, TrainConfig
from saev.errors import ConfigError
from saev.train import resolve

from . import synthetic


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp("shards"))
    return synthetic.write_shards(root, synthetic.make_truth(), n_examples=20, content_tokens=4)


@pytest.fixture
def cfg(shards, tmp_path) -> TrainConfig:
    return TrainConfig(
        runs_root=str(tmp_path / "runs"),
        train_data=LoaderConfig(shards=shards, layer=3),
        sae=SaeConfig(exp_factor=4, activation=TopK(top_k=3)),
        n_train=10_000,
        batch_size=100,
    )


def update(cfg: TrainConfig, **values) -> TrainConfig:
    return cfg.model_copy(update=values)


def with_train(cfg: TrainConfig, **values) -> TrainConfig:
    return update(cfg, train_data=cfg.train_data.model_copy(update=values))


def test_every_default_is_decided(cfg, shards):
    found = resolve.resolve_one(cfg)
    assert (found.sae.d_model, found.sae.d_sae) == (32, 128)
    assert found.train_data.shards == found.val_data.shards == storage.normalize(shards)
    assert (found.train_data.split, found.val_data.split) == ("train", "val")
    assert found.train_data.val_fraction == found.val_data.val_fraction == 0.1
    assert found.val_data.layer == 3
    assert None not in (found.lr, found.n_lr_warmup, found.n_sparsity_warmup, found.dead_after)
    assert found.dead_after < cfg.n_train
    assert resolve.resolve_one(update(cfg, n_train=10**9)).dead_after == 10_000_000
    assert resolve.resolve_one(found) == found
    assert resolve.run_id(resolve.resolve_one(found)) == resolve.run_id(found)


def test_defaults_that_depend_on_others(cfg):
    assert resolve.resolve_one(cfg).objective.k_aux == 1  # half of 3
    wide = update(cfg, sae=SaeConfig(activation=TopK(top_k=32)))
    assert resolve.resolve_one(wide).objective.k_aux == 16
    assert (
        resolve.resolve_one(update(cfg, sae=SaeConfig(activation=Relu()))).objective.k_aux is None
    )
    auto = update(cfg, batch_size=None)
    found = [
        resolve.resolve_one(update(auto, n_train=n)).batch_size
        for n in (1000, 500_000, 1_000_000, 10**8)
    ]
    assert found == [256, 256, 512, 16_384]


def test_wider_saes_learn_more_slowly():
    lrs = [resolve.default_lr(d_sae, "adam") for d_sae in (1536, 1536 * 16, 1536 * 256)]
    assert lrs == pytest.approx([3e-3, 1.5e-3, 0.75e-3])
    assert resolve.default_lr(1536, "muon") == pytest.approx(5 * lrs[0])


def test_splits(cfg, shards, tmp_path):
    kept = resolve.resolve_one(with_train(cfg, val_fraction=0.3))
    assert (kept.train_data.val_fraction, kept.val_data.val_fraction) == (0.3, 0.3)
    named = resolve.resolve_one(update(cfg, val_data=LoaderConfig(shards=shards, layer=3)))
    assert (named.train_data.split, named.val_data.split) == ("train", "val")
    other = synthetic.write_shards(
        str(tmp_path), synthetic.make_truth(), n_examples=5, content_tokens=4, seed=9
    )
    apart = resolve.resolve_one(update(cfg, val_data=LoaderConfig(shards=other, layer=7)))
    assert (apart.train_data.split, apart.val_data.split) == ("all", "all")
    assert (apart.train_data.layer, apart.val_data.layer) == (3, 7)
    assert resolve.resolve_one(update(cfg, n_val=0)).train_data.split == "all"
    clash = update(with_train(cfg, val_fraction=0.3), val_data=LoaderConfig(val_fraction=0.2))
    with pytest.raises(ConfigError, match=r"0\.2 and 0\.3"):
        resolve.resolve_one(clash)


def test_run_ids_name_the_work(cfg, shards, tmp_path):
    def run_id(c: TrainConfig) -> str:
        return resolve.run_id(resolve.resolve_one(c))

    base = run_id(cfg)
    same = [
        update(cfg, runs_root=str(tmp_path / "elsewhere")),
        update(cfg, tag="again", device="cpu", log_every=1, checkpoint_every=7, max_parallel=1),
        update(cfg, sae=cfg.sae.model_copy(update={"d_sae": 128, "exp_factor": 16})),
        with_train(cfg, n_threads=1, verify=False),
        with_train(cfg, shards=shards + "/"),
    ]
    assert {run_id(c) for c in same} == {base}
    different = [
        update(cfg, seed=1),
        update(cfg, lr=1e-4),
        update(cfg, n_val=77),
        update(cfg, data_seed=1),
        with_train(cfg, layer=7),
        with_train(cfg, buffer_mb=1.0),
        update(cfg, sae=cfg.sae.model_copy(update={"activation": Relu()})),
    ]
    ids = {run_id(c) for c in different}
    assert len(ids) == len(different)
    assert base not in ids


def test_a_copy_of_the_shards_is_the_same_work(cfg, tmp_path):
    copy = synthetic.write_shards(
        str(tmp_path), synthetic.make_truth(), n_examples=20, content_tokens=4
    )
    there = resolve.resolve_one(with_train(cfg, shards=copy))
    assert resolve.run_id(there) == resolve.run_id(resolve.resolve_one(cfg))


def test_groups_split_by_data_and_by_max_parallel(cfg, tmp_path):
    sweep = tmp_path / "s.toml"
    sweep.write_text("lr = [1e-3, 1e-4, 1e-5]\nsae.d_sae = [64, 128]\ndata.layer = [3, 7]\n")
    found = resolve.groups(update(cfg, sweep=str(sweep)))
    assert [len(g.members) for g in found] == [6, 6]
    assert [{m.config.train_data.layer for m in g.members} for g in found] == [{3}, {7}]
    split = resolve.groups(update(cfg, sweep=str(sweep), max_parallel=4))
    assert [len(g.members) for g in split] == [4, 2, 4, 2]
    ids = [m.run_id for g in found for m in g.members]
    assert ids == [m.run_id for g in split for m in g.members]
    assert len({g.group_id for g in found + split}) == 6
    assert [resolve.Group.from_item(g.to_item()) for g in found] == found


def test_equal_work_after_defaults_is_done_once(cfg, tmp_path, caplog):
    sweep = tmp_path / "s.toml"
    sweep.write_text("seed = 3\n[[grid]]\nsae.d_sae = 128\n[[grid]]\nsae.exp_factor = 4\n")
    (group,) = resolve.groups(update(cfg, sweep=str(sweep)))
    assert len(group.members) == 1
    assert "asked for twice" in caplog.text


def test_a_sweep_of_an_unused_penalty_is_pointed_out(cfg, tmp_path, caplog):
    sweep = tmp_path / "s.toml"
    sweep.write_text("sae.sparsity_coeff = [1e-4, 2e-4]\n")
    resolve.groups(update(cfg, sweep=str(sweep)))
    assert "top-k has no sparsity penalty" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_data": LoaderConfig()}, "--train-data.shards is missing"),
        ({"sae": SaeConfig(d_model=768)}, "--sae.d-model is 768, but .* width 32"),
        ({"sae": SaeConfig(d_sae=16)}, "top-k is 32, but the SAE has only 16"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(cfg, values, message):
    with pytest.raises(ConfigError, match=message):
        resolve.resolve_one(update(cfg, **values))


def test_data_that_does_not_fit(cfg, tmp_path):
    with pytest.raises(ConfigError, match=r"Layer 5 was not recorded .* 3, 7"):
        resolve.resolve_one(with_train(cfg, layer=5))
    with pytest.raises(ConfigError, match="has layers 3, 7"):
        resolve.resolve_one(with_train(cfg, layer=None))
    with pytest.raises(ConfigError, match=r"has no labels\.bin"):
        resolve.resolve_one(with_train(cfg, ignore_labels=(0,)))
    narrow = synthetic.write_shards(
        str(tmp_path), synthetic.make_truth(d_model=8), n_examples=4, content_tokens=4
    )
    with pytest.raises(ConfigError, match=r"width 8, but --train-data.shards of width 32"):
        resolve.resolve_one(update(cfg, val_data=LoaderConfig(shards=narrow, layer=3)))
