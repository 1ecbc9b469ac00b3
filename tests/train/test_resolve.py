"""What is decided before training: defaults, splits, groups and names."""

import json
import tomllib

import numpy as np
import pytest

from saev import cli, storage
from saev.config import (
    DataConfig,
    LoaderConfig,
    Relu,
    SaeConfig,
    TopK,
    TrainConfig,
    ValDataConfig,
    Vanilla,
)
from saev.config.train import default_n_train
from saev.errors import ConfigError
from saev.shards.protocol import in_validation
from saev.train import resolve, resume

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


def test_a_run_takes_ten_epochs_by_default(cfg, tmp_path):
    """Within limits. What is asked for stays; version 0.1.0 always took 100 million tokens."""
    data = LoaderConfig(shards=shards_of(tmp_path, 40), layer=3)  # 4 tokens each
    asked = update(cfg, n_train=None, n_val=0, train_data=data)
    assert resolve.resolve_one(asked).n_train == 300_000
    assert resolve.resolve_one(update(asked, n_train=17)).n_train == 17
    before = resolve.resolve_one(asked, before=True)
    assert before.n_train == 100_000_000
    given = resolve.resolve_one(update(asked, n_train=100_000_000), before=True)
    assert resolve.run_id(before) == resolve.run_id(given)
    for n_tokens, n_train in ((50_000, 500_000), (20_000_000, 100_000_000)):
        assert default_n_train(n_tokens) == n_train


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


@pytest.mark.parametrize("key", ["n_lr_warmup", "n_sparsity_warmup"])
def test_a_warmup_that_is_longer_than_the_run_is_cut_and_said_once(cfg, key, caplog):
    """10 steps with a warm-up of 1000 never had more than 1% of the rate that was asked for."""
    short = update(cfg, n_train=500, batch_size=50, **{key: 1000})
    (group,) = resolve.groups(short, table={"sae": {"d_sae": [32, 64]}})
    assert [getattr(m.config, key) for m in group.members] == [5, 5]
    flag = "--" + key.replace("_", "-")
    said = f"{flag} is 1000, but the run has only 10 steps: the warm-up is cut to 5"
    assert caplog.text.count(said) == caplog.text.count(flag) == 1
    assert getattr(resolve.resolve_one(update(short, **{key: 10})), key) == 10


def test_a_target_decides_the_coefficient(cfg):
    relu = update(cfg, sae=SaeConfig(d_sae=64, activation=Relu()))
    found = resolve.resolve_one(relu).objective
    assert (found.sparsity_coeff, found.target_l0) == (1e-3, None)
    aiming = update(relu, objective=Vanilla(target_l0=8))
    found = resolve.resolve_one(aiming).objective
    assert (found.sparsity_coeff, found.target_l0, found.k_aux) == (None, 8, 4)
    with pytest.raises(ConfigError, match=r"target-l0 is 8, but top-k keeps top_k latents"):
        resolve.resolve_one(update(cfg, objective=Vanilla(target_l0=8)))
    with pytest.raises(ConfigError, match=r"target-l0 is 40, but the SAE has only 64 latents"):
        resolve.resolve_one(update(relu, objective=Vanilla(target_l0=40)))
    table = {"objective": {"target_l0": [4, 8], "sparsity_coeff": 0.01}}
    with pytest.raises(ConfigError, match=r"target_l0 is 4 and sparsity_coeff is 0\.01.*Give one"):
        resolve.groups(relu, table=table)


def test_keys_of_version_0_1_0_still_parse_and_change_no_name(cfg):
    """grad_clip, and of JumpReLU init_threshold and bandwidth, are in every stored config."""
    raw = cfg.to_dict()
    raw["grad_clip"] = 0.5
    raw["sae"]["activation"] = {"kind": "jump-relu", "init_threshold": 0.1, "bandwidth": 0.2}
    found = TrainConfig.from_dict(raw)
    assert found.identity()["grad_clip"] == 1.0
    activation = found.identity()["sae"]["activation"]
    assert activation == {"kind": "jump-relu", "init_threshold": 0.01, "bandwidth": 0.05}
    assert found.identity()["objective"] == {
        "kind": "vanilla", "sparsity_coeff": 1e-3, "aux_coeff": 1 / 32, "k_aux": None
    }  # fmt: skip


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


# --- The validation side ---


def shards_of(tmp_path, n_examples: int, **more) -> str:
    return synthetic.write_shards(
        str(tmp_path), synthetic.make_truth(), n_examples=n_examples, content_tokens=4, **more
    )


def test_val_data_has_the_keys_that_say_which_activations():
    ours, theirs = ValDataConfig.model_fields, DataConfig.model_fields
    assert list(ours) == list(theirs)
    assert all(field.default is None for key, field in ours.items() if key != "shards")
    assert ValDataConfig.added == LoaderConfig.added == DataConfig.added


def test_a_flag_of_val_data_counts_if_it_is_the_default_too(shards):
    line = f"train --train-data.shards {shards} --train-data.layer 3 --train-data.tokens all "
    line += "--val-data.tokens content --train-data.no-verify --train-data.buffer-mb 99"
    config = cli.parse([*line.split(), "--val-data.ignore-labels"])
    config = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))  # a round trip
    found = resolve.resolve_one(config)
    assert (found.train_data.tokens, found.val_data.tokens) == ("all", "content")
    assert found.val_loader() == LoaderConfig(
        **{**found.train_data.to_dict(), "tokens": "content", "split": "val"}
    )


def test_removed_keys_parse_and_count_as_before(cfg):
    """In a stored config of version 0.1.0, and in a sweep."""
    found = resolve.resolve_one(cfg)
    stored = found.to_dict()
    stored["sae"]["enc_scale"] = None
    kept = {key: stored["train_data"][key] for key in ("buffer_mb", "n_threads", "verify")}
    loader = {**kept, "block_kb": 0}
    stored["train_data"] |= loader
    stored["val_data"] |= loader
    assert TrainConfig.from_dict(stored).to_dict() == found.to_dict()
    identity = found.identity()
    assert identity["sae"]["enc_scale"] is None
    assert loader.items() <= identity["train_data"].items()
    assert loader.items() <= identity["val_data"].items()
    table = {"sae": {"enc_scale": [0.5, 1.0]}, "data": {"block_kb": 64}, "lr": [1e-3, 1e-4]}
    (group,) = resolve.groups(cfg, table={**table, "val_data": {"n_threads": 3}})
    assert len(group.members) == 2


def test_other_shards_are_evaluated_on_as_training_is(cfg, tmp_path):
    other = shards_of(tmp_path, 5, seed=9)
    found = resolve.resolve_one(
        update(with_train(cfg, tokens="all"), val_data=LoaderConfig(shards=other))
    )
    assert (found.val_data.layer, found.val_data.tokens) == (3, "all")
    assert (found.val_data.split, found.val_data.val_fraction) == ("all", 0.0)


def test_to_evaluate_on_all_may_be_asked_for(cfg):
    found = resolve.resolve_one(update(cfg, val_data=LoaderConfig(split="all")))
    assert (found.train_data.split, found.val_data.split) == ("all", "all")


@pytest.mark.parametrize("side", ["train", "val"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_explicit_fraction_that_leaves_nothing_is_an_error(cfg, tmp_path, side, n):
    data = LoaderConfig(shards=shards_of(tmp_path, n), layer=3)
    small = update(cfg, train_data=data, batch_size=2)
    if side == "train":
        small = with_train(small, val_fraction=0.001)
    else:
        small = update(small, val_data=LoaderConfig(val_fraction=0.001))
    message = rf"--{side}-data\.val-fraction is 0\.001, .* none of the {n} images .* evaluate on"
    with pytest.raises(ConfigError, match=message):
        resolve.groups(small)
    assert resolve.resolve_one(update(small, n_val=0)).train_data.split == "train"


def test_a_fraction_that_leaves_nothing_to_train_on(cfg, tmp_path):
    data = LoaderConfig(shards=shards_of(tmp_path, 3), layer=3, val_fraction=0.9999)
    assert in_validation(np.arange(3), 0.9999).all()
    with pytest.raises(ConfigError, match=r"is 0\.9999, which leaves none of .* to train on"):
        resolve.resolve_one(update(cfg, train_data=data))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 40])
def test_the_default_fraction_of_few_images(cfg, tmp_path, n, caplog):
    in_val = in_validation(np.arange(n), 0.1)
    data = LoaderConfig(shards=shards_of(tmp_path, n), layer=3)
    found = resolve.resolve_one(update(cfg, train_data=data, batch_size=2))
    if in_val.any() and not in_val.all():
        assert (found.train_data.split, found.n_val) == ("train", cfg.n_val)
        assert not caplog.text
    else:
        assert (found.train_data.split, found.n_val) == ("all", 0)
        assert f"has {n} images, too few to keep 10% of them" in caplog.text
    assert resolve.resolve_one(found) == found


def test_labels_may_empty_a_side(cfg, tmp_path):
    data = LoaderConfig(shards=shards_of(tmp_path, 40, labels=True), layer=3)
    ignoring = data.model_copy(update={"ignore_labels": (0, 1, 2)})
    with pytest.raises(ConfigError, match=r"left to train on: .*\[0, 1, 2\].* 40 images"):
        resolve.resolve_one(update(cfg, train_data=ignoring))
    val = ValDataConfig(ignore_labels=(0, 1, 2))
    explicit = update(cfg, train_data=data, val_data=val)
    with pytest.raises(ConfigError, match=r"fraction is 0\.2, which leaves none .* evaluate on"):
        resolve.resolve_one(with_train(explicit, val_fraction=0.2))


def test_warm_ups_are_shares_of_the_steps_that_are_taken(cfg, tmp_path):
    """20 images of 4 patches: 80 tokens, of which some are held out; batches are not larger."""
    in_train = int((~in_validation(np.arange(20), 0.1)).sum()) * 4
    found = resolve.resolve_one(update(cfg, batch_size=1000, n_train=30_000))
    n_steps = -(-30_000 // in_train)
    assert found.batch_size == 1000
    assert found.n_lr_warmup == round(0.05 * n_steps) > 20
    assert found.n_sparsity_warmup == round(0.2 * n_steps)
    data = LoaderConfig(shards=shards_of(tmp_path, 20, labels=True), layer=3, ignore_labels=(0, 1))
    fewer = resolve.resolve_one(
        update(cfg, train_data=data, batch_size=1000, n_train=30_000)
    ).n_lr_warmup
    assert fewer > 2 * found.n_lr_warmup


# --- Seeds and older names ---


def members(cfg: TrainConfig, text: str) -> list[resolve.Member]:
    found = resolve.groups(cfg, table=tomllib.loads(text))
    return [member for group in found for member in group.members]


def test_seeds_in_a_grid_of_their_own_leave_the_others_as_they_are(cfg):
    """As docs/training.md says under Seeds, where an axis of seeds trains all SAEs anew."""
    first = [m.run_id for m in members(cfg, "lr = [1e-3, 1e-4]")]
    grids = "[[grid]]\nlr = [1e-3, 1e-4]\n[[grid]]\nlr = [1e-3, 1e-4]\nseed = [1, 2]"
    assert [m.run_id for m in members(cfg, grids)][:2] == first
    swept = members(cfg, "lr = [1e-3, 1e-4]\nseed = [0, 1]")
    assert {m.config.seed for m in swept} == {0, 1}
    assert {m.run_id for m in swept}.isdisjoint(first)


def test_a_seed_is_made_of_what_an_sae_is(cfg, tmp_path):
    first = members(cfg, "lr = [1e-3, 1e-4]")
    seeds = {m.config.lr: m.config.seed for m in first}
    assert len(set(seeds.values())) == 2
    again = members(cfg, "lr = [5e-4, 1e-4, 1e-3]")
    assert {m.config.lr: m.config.seed for m in again} == {**seeds, 5e-4: again[0].config.seed}
    assert {m.run_id for m in first} < {m.run_id for m in again}
    # Axes at their defaults, other ways to say the same, and other places.
    default = first[0].config
    same = [
        members(cfg, "lr = [1e-3, 1e-4]\noptim = ['adam']\ndata.buffer_mb = 2048.0"),
        members(cfg, f"lr = [1e-3, 1e-4]\nn_lr_warmup = [{default.n_lr_warmup}]"),
        members(cfg, "lr = [1e-3, 1e-4]\nsae.d_sae = 128"),
        members(update(cfg, runs_root=str(tmp_path / "else"), tag="x"), "lr = [1e-3, 1e-4]"),
        members(with_train(cfg, shards=shards_of(tmp_path, 20)), "lr = [1e-3, 1e-4]"),
    ]
    for found in same:
        assert [m.run_id for m in found] == [m.run_id for m in first]
        assert [m.config.seed for m in found] == [m.config.seed for m in first]
    other = members(update(cfg, seed=1), "lr = [1e-3, 1e-4]")
    assert {m.config.seed for m in other}.isdisjoint(seeds.values())
    assert [m.config.seed for m in members(cfg, "seed = [3, 4]")] == [3, 4]
    assert [m.config.seed for g in resolve.groups(update(cfg, seed=9)) for m in g.members] == [9]


def test_axes_that_end_in_the_same_sae_are_one(cfg, caplog):
    found = members(cfg, "sae.d_sae = 128\nsae.exp_factor = [4, 8]")
    assert len(found) == 1
    assert "asked for twice" in caplog.text


def old_members(cfg: TrainConfig, lrs: list[float]) -> list[resolve.Member]:
    """What version 0.1.0 made of a sweep of learning rates: seeds were positions."""
    asked = [update(cfg, lr=lr, seed=i) for i, lr in enumerate(lrs)]
    configs = [resolve.resolve_one(one, before=True) for one in asked]
    return [resolve.Member(resolve.run_id(c), c, rules=1) for c in configs]


def publish(member: resolve.Member, **record) -> None:
    storage.write_json(storage.join(member.url, "run.json"), record)


def test_what_version_0_1_0_trained_is_found(cfg):
    first, second = old_members(cfg, [1e-3, 1e-4])
    new = members(cfg, "lr = [1e-3, 1e-4]")
    assert {m.run_id for m in new}.isdisjoint({first.run_id, second.run_id})
    publish(second, run_id=second.run_id)
    assert [m.run_id for m in members(cfg, "lr = [1e-3, 1e-4]")] == [new[0].run_id, second.run_id]
    publish(first, run_id=first.run_id)
    found = resolve.groups(cfg, table={"lr": [1e-3, 1e-4]})
    assert [g.group_id for g in found] == [resolve.digest([first.run_id, second.run_id])]
    assert found[0].members == (first, second)
    # A run of this version that happens to have that seed is another SAE of the sweep.
    publish(first, run_id=first.run_id, rules=2)
    assert [m.run_id for m in members(cfg, "lr = [1e-3, 1e-4]")] == [new[0].run_id, second.run_id]


def test_a_group_in_flight_keeps_its_name(cfg):
    old = old_members(cfg, [1e-3, 1e-4])
    group = resolve.Group.of(old)
    root = resolve.resolve_one(cfg).runs_root
    meta = {"run_ids": [m.run_id for m in old], "loader": {}, "n_rows": 0}
    storage.write_json(  # a pointer of version 0.1.0
        storage.join(resume.folder(root, group.group_id), "step-000000000010.json"),
        {"step": 10, "n_bytes": 1, "checksum": "crc32c:00000000", "meta": meta},
    )
    assert resolve.groups(cfg, table={"lr": [1e-3, 1e-4]}) == [group]
    grown = resolve.groups(cfg, table={"lr": [1e-3, 1e-4, 5e-4]})
    assert grown[0] == group
    assert [m.config.lr for m in grown[1].members] == [5e-4]
    assert [resolve.Group.from_item(g.to_item()) for g in grown] == grown
    # One of them is not asked for: it cannot go on without it.
    assert len(resolve.groups(cfg, table={"lr": [1e-3, 5e-4]})) == 1
    # Published by this version, they still go by the old rules.
    for member in old:
        publish(member, run_id=member.run_id, rules=1)
    resume.clear(resume.folder(root, group.group_id))
    assert resolve.groups(cfg, table={"lr": [1e-3, 1e-4]}) == [group]


def test_a_sweep_may_grow_while_it_is_trained(cfg):
    (group,) = resolve.groups(cfg, table={"lr": [1e-3, 1e-4]})
    url = resume.folder(group.members[0].config.runs_root, group.group_id)
    meta = {"run_ids": [m.run_id for m in group.members], "loader": {}, "rules": 2}
    resume.Points(url).save(resume.ResumePoint(10, {}, meta))
    grown = resolve.groups(cfg, table={"lr": [5e-4, 1e-3, 1e-4]})
    assert [len(g.members) for g in grown] == [1, 2]
    assert grown[1] == group
    (still,) = resolve.groups(update(cfg, max_parallel=1), table={"lr": [1e-3, 1e-4]})
    assert still.group_id == group.group_id


def test_old_defaults_of_other_validation_shards_are_found(cfg, tmp_path):
    """Version 0.1.0 evaluated on content tokens of other shards, whatever it trained on."""
    other = shards_of(tmp_path, 5, seed=9)
    asked = update(with_train(cfg, tokens="all"), val_data=LoaderConfig(shards=other, layer=3))
    (new,) = members(asked, "optim = 'adam'")
    before = resolve.resolve_one(update(asked, lr=1e-3), before=True)
    assert before.val_data.tokens == "content"
    old = resolve.Member(resolve.run_id(before, val_buffer_mb=2048), before, rules=1)
    assert old.run_id != new.run_id
    publish(old, run_id=old.run_id)
    (group,) = resolve.groups(update(asked, lr=1e-3))
    assert group.members == (old,)
