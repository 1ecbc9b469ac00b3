"""The stage against brute force, and the same bytes however the work was cut."""

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import scipy.sparse
import torch
from inference.world import LAYER, LAYERS, World, brute_force, contents, make_run, make_world
from sklearn.metrics import average_precision_score
from train.synthetic import write_acts

from saev import inference, storage
from saev.config import DataConfig, InferenceConfig
from saev.errors import (
    CheckpointError,
    ConfigError,
    CorruptDataError,
    IncompleteError,
    StorageError,
)
from saev.inference import job as job_module
from saev.inference import part as part_module
from saev.inference.codes import CodesWriter
from saev.inference.results import Results
from saev.nn import SparseAutoencoder, to_saelens


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def config(world: World, out: object = "", **kwargs) -> InferenceConfig:
    data = DataConfig(shards=world.shards, layer=LAYER, **kwargs.pop("data", {}))
    return InferenceConfig(run=world.run, data=data, out=str(out), **kwargs)


CASES = [
    {},
    {"data": {"tokens": "all"}},
    {"data": {"tokens": "special"}},
    {"data": {"ignore_labels": (0, 2)}},
    {"data": {"tokens": "all", "ignore_labels": (1,)}, "batch_size": 1},
    {"data": {"split": "val", "val_fraction": 0.5}, "n_dists": 200},
    {"batch_size": 37, "n_top": 3, "n_dists": 4},
]


@pytest.mark.parametrize("kwargs", CASES, ids=str)
def test_results_are_brute_force(world, tmp_path, kwargs, monkeypatch) -> None:
    monkeypatch.setattr(part_module, "_PIECE_ENTRIES", 100)  # several pieces per shard
    cfg = config(world, tmp_path / "out", **kwargs)
    results = Results.open(inference.run(cfg))
    data = kwargs.get("data", {})
    truth = brute_force(world, data.get("tokens", "content"), data.get("ignore_labels", ()))
    if data.get("split") == "val":
        from saev.shards.protocol import in_validation

        truth = truth.keep(in_validation(truth.example_idx, 0.5))
    check_metrics(results, truth)
    check_latents(results, truth)
    check_codes(results, truth)
    check_top(results, truth, cfg.n_top)
    check_distributions(results, truth, min(cfg.n_dists, 48))
    check_concepts(results, truth)


def check_metrics(results: Results, truth) -> None:
    m, f = results.metrics, truth.f
    n, d_model = truth.x.shape
    error = np.square(truth.x - truth.x_hat).sum()
    nmse = error / np.square(truth.x - truth.x.mean(0)).sum()
    p = (f != 0).mean(0)
    want = {
        "normalized_mse": nmse, "explained_variance": 1 - nmse, "mse_per_token": error / n,
        "mse_per_dim": error / n / d_model, "l0": (f != 0).sum(1).mean(),
        "l1": np.abs(f).sum(1, dtype=np.float64).mean(),
    }  # fmt: skip
    for name, value in want.items():
        assert m[name] == pytest.approx(value, rel=1e-5), name
    assert m["n_tokens"] == n
    assert m["n_examples"] == len(np.unique(truth.example_idx))
    assert m["n_dead"] == (p == 0).sum() >= 2
    assert m["dense_above"] == pytest.approx(min(10 * p.mean(), 0.5))  # mean p is L0 / d_sae
    assert m["dense_share"] == (p > min(10 * p.mean(), 0.5)).mean()
    assert (m["d_sae"], m["d_model"], m["layer"]) == (f.shape[1], d_model, LAYER)


def check_latents(results: Results, truth) -> None:
    f = truth.f.astype(np.float64)
    counts = (f != 0).sum(0)
    np.testing.assert_array_equal(results.counts, counts)
    np.testing.assert_allclose(results.frequency, counts / len(f))
    np.testing.assert_allclose(results.mean_values, f.sum(0) / np.maximum(counts, 1), rtol=1e-5)
    np.testing.assert_allclose(results.max_values, truth.f.max(0), rtol=1e-5)
    raw = storage.read_bytes(storage.join(results.url, "sparsity.safetensors"))
    sparsity = safetensors.numpy.load(raw)["sparsity"]
    np.testing.assert_allclose(sparsity, np.log10(counts / len(f) + 1e-10), rtol=1e-5)


def check_codes(results: Results, truth) -> None:
    matrix = scipy.sparse.load_npz(storage.join(results.url, "token_acts.npz"))
    np.testing.assert_allclose(matrix.toarray(), truth.f, rtol=1e-5, atol=1e-5)
    example_idx, token_idx = results.code_tokens()
    np.testing.assert_array_equal(example_idx, truth.example_idx)
    np.testing.assert_array_equal(token_idx, truth.token_idx)


def check_top(results: Results, truth, k: int) -> None:
    codes = results.codes().toarray()
    for latent in range(results.d_sae):
        top = results.top(latent)
        examples = np.unique(truth.example_idx)
        scores = np.array([codes[truth.example_idx == e, latent].max() for e in examples])
        order = np.lexsort((examples, -scores))
        order = order[scores[order] > 0][:k]
        np.testing.assert_array_equal(top.example_idx, examples[order])
        np.testing.assert_array_equal(top.value, scores[order])
        assert top.token_acts.shape == (len(order), results.content_tokens)
        for example, acts in zip(top.example_idx, top.token_acts, strict=True):
            want = np.zeros(results.content_tokens, np.float32)
            mine = (truth.example_idx == example) & (truth.token_idx >= 0)
            want[truth.token_idx[mine]] = codes[mine, latent]
            np.testing.assert_array_equal(acts, want)
    with pytest.raises(ConfigError, match="no latent 48: the SAE has 48"):
        results.top(48)


def check_distributions(results: Results, truth, n: int) -> None:
    found = results.distributions()
    assert len(found.latents) == n == len(set(found.latents.tolist()))
    codes = results.codes()[:, found.latents]
    np.testing.assert_array_equal(found.values.toarray(), codes.toarray())


def check_concepts(results: Results, truth) -> None:
    labelled = truth.labels >= 0
    classes = np.unique(truth.labels[labelled])
    assert [row["label"] for row in results.concepts] == classes.tolist()
    if not len(classes):
        assert "mean_average_precision" not in results.metrics
        return
    codes = results.codes().toarray()[labelled]
    for row in results.concepts:
        y = truth.labels[labelled] == row["label"]
        ap = [average_precision_score(y, codes[:, j]) for j in range(codes.shape[1])]
        assert row["average_precision"] == pytest.approx(max(ap), rel=1e-12)
        assert row["latent"] == int(np.argmax(ap))
    best = [row["average_precision"] for row in results.concepts]
    assert results.metrics["mean_average_precision"] == pytest.approx(np.mean(best))
    assert {"purity_at_16", "coverage_at_0.3", "probe_r"} <= results.metrics.keys()


# --- Any cut, the same bytes ---------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    inference.run(config(world, out))
    return contents(out)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_parts_in_any_order(world, whole, tmp_path, n) -> None:
    order = np.random.default_rng(n).permutation(n) + 1
    for i in order:
        assert inference.run(config(world, tmp_path, part=f"{i}/{n}")) == str(tmp_path)
        assert not (tmp_path / "metrics.json").exists()
    assert inference.finish(config(world, tmp_path)) == str(tmp_path)
    assert contents(tmp_path) == whole


def test_items_are_json_and_idempotent(world, whole, tmp_path) -> None:
    cfg = config(world, tmp_path)
    items = json.loads(json.dumps(inference.plan(cfg)))
    assert items == [{"shard": i} for i in range(5)]
    for item in [*reversed(items), items[0]]:
        inference.work(cfg, {k: float(v) for k, v in item.items()})  # KFP turns ints into floats
    inference.finish(cfg)
    assert contents(tmp_path) == whole


def test_only_missing_shards_are_done(world, whole, tmp_path, monkeypatch) -> None:
    inference.run(config(world, tmp_path, part="2/5"))
    done = []
    compute = part_module.compute
    monkeypatch.setattr(
        part_module, "compute", lambda job, shard, *a: (done.append(shard), compute(job, shard, *a))
    )
    inference.run(config(world, tmp_path))
    assert done == [0, 2, 3, 4]
    inference.run(config(world, tmp_path))
    inference.run(config(world, tmp_path, part="1/5"))
    assert done == [0, 2, 3, 4]
    assert contents(tmp_path) == whole


def test_what_a_kill_after_publishing_left_is_removed(world, whole, tmp_path) -> None:
    inference.run(config(world, tmp_path))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "000000.json").write_text("{}")
    inference.run(config(world, tmp_path))
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads_change_nothing(world, whole, tmp_path, n_threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        inference.run(config(world, tmp_path))
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path) == whole


def test_default_place_is_a_content_address(world) -> None:
    url = inference.run(InferenceConfig(run=world.run))  # shards and layer of the run
    assert storage.parent(url) == storage.join(world.run, "inference")
    assert inference.run(config(world)) == url
    assert inference.run(config(world, n_top=2)) != url
    shutil.rmtree(storage.join(world.run, "inference"))


def test_object_storage(world, whole) -> None:
    url = inference.run(config(world, "memory://inference-out"))
    found = {e.name: storage.read_bytes(e.url) for e in storage.list_dir(url)}
    assert found == whole


# --- What may be left out ------------------------------------------------------------------


def test_no_save_leaves_out_the_codes_alone(world, whole, tmp_path) -> None:
    inference.run(config(world, tmp_path, save=False))
    found = contents(tmp_path, leave_out=("config.json",))
    left_out = [name for name in whole if name.startswith("token_acts")]
    assert len(left_out) == 3
    expected = {k: v for k, v in whole.items() if k not in (*left_out, "config.json")}
    for each in (found, expected):
        assert each.pop("tables.json")  # which lists the tables
    lists = [json.loads(files.pop("metrics.json")) for files in (found, expected)]
    assert found == expected
    for raw in lists:  # the list of files is another one, as it should be
        assert raw.pop("checksum")
        raw["files"].pop("config.json")
        raw["files"].pop("tables.json")
    assert all(lists[1]["files"].pop(name) for name in left_out)
    assert lists[0] == lists[1]
    with pytest.raises(StorageError, match=r"token_acts\.npz does not exist: .*--no-save"):
        Results.open(str(tmp_path)).codes()


def test_no_save_without_concepts_writes_no_codes_at_all(world, tmp_path) -> None:
    cfg = config(world, tmp_path, save=False, concepts=False, part="1/1")
    inference.run(cfg)
    assert not list(tmp_path.rglob("*.codes"))
    inference.finish(cfg)
    assert "mean_average_precision" not in Results.open(str(tmp_path)).metrics


def test_no_distributions(world, tmp_path) -> None:
    results = Results.open(inference.run(config(world, tmp_path, n_dists=0)))
    assert results.distributions().values.shape == (270, 0)


def test_unlabelled_half_precision_shards(tmp_path) -> None:
    world = make_world(tmp_path, labelled=False, dtype="float16", n_examples=11)
    results = Results.open(inference.run(config(world)))
    check_metrics(results, brute_force(world))
    check_codes(results, brute_force(world))
    assert results.concepts == []


def test_shards_of_the_published_format(world, tmp_path) -> None:
    acts = np.stack([world.acts + 1, world.acts])  # LAYER is the second one
    url = write_acts(str(tmp_path / "shards"), acts, LAYERS, per_shard=7, protocol="2.1")
    data = DataConfig(shards=url, layer=LAYER)
    results = Results.open(inference.run(InferenceConfig(run=world.run, data=data)))
    truth = brute_force(dataclasses.replace(world, labels=None))
    check_metrics(results, truth)
    check_codes(results, truth)


def test_latents_with_values_span_the_frequencies() -> None:
    counts = np.array([0, 5, 100, 1, 0, 7, 50, 3])
    assert job_module.spread_by_frequency(counts, 3) == (1, 2, 3)  # fires 5, 100 and 1 times
    assert job_module.spread_by_frequency(counts, 7) == (0, 1, 2, 3, 5, 6, 7)


# --- Mistakes ------------------------------------------------------------------------------


def test_widths_that_do_not_fit(world, tmp_path) -> None:
    run = make_run(tmp_path, world.shards, d_model=24, d_sae=32, top_k=2)
    with pytest.raises(ConfigError, match=r"width 24, .* width 16"):
        inference.run(InferenceConfig(run=run))


def test_another_layer_is_warned_about(world, tmp_path, caplog) -> None:
    cfg = config(world, tmp_path)
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"layer": 3})})
    inference.run(cfg)
    assert caplog.text.count("was trained on layer 7; it is used on layer 3") == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"layer": 5}, "Layer 5 was not recorded in .* it has 3, 7"),
        ({"layer": "all"}, "Inference reads one layer"),
        ({"split": "val"}, "selects nothing"),
        ({"ignore_labels": (0, 1, 2, 3)}, "No tokens are left"),
        ({"shards": "/nowhere"}, "does not exist"),
    ],
)
def test_wrong_data(world, tmp_path, data, message) -> None:
    cfg = InferenceConfig(run=world.run, data=DataConfig(**data), out=str(tmp_path))
    with pytest.raises((ConfigError, StorageError), match=message):
        inference.run(cfg)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_wrong_part(world, part) -> None:
    with pytest.raises(ConfigError, match="expected I/N"):
        inference.run(config(world, part=part))


def test_wrong_device(world) -> None:
    with pytest.raises(ConfigError, match="--device gpu cannot be used here"):
        inference.run(config(world, device="gpu"))


def test_an_sae_outside_a_run_needs_out(world, tmp_path) -> None:
    checkpoint = storage.join(world.run, "checkpoint")
    data = DataConfig(shards=world.shards, layer=LAYER)
    with pytest.raises(ConfigError, match=r"not a run folder.*--out URL"):
        inference.run(InferenceConfig(run=checkpoint, data=data))
    with pytest.raises(ConfigError, match=r"--data\.shards"):
        inference.run(InferenceConfig(run=checkpoint, out=str(tmp_path)))
    cfg = InferenceConfig(run=checkpoint, data=data, out=str(tmp_path))
    assert Results.open(inference.run(cfg)).metrics["n_tokens"] == 270


def test_an_sae_of_scaled_activations_is_measured_on_plain_ones(world, tmp_path) -> None:
    """An SAE on (x - centre)·scale, told so, gives the figures of that SAE on x."""
    mean, scale = np.linspace(-2, 2, world.sae.d_model, dtype=np.float32), 0.5
    t = dict(world.sae.state_dict())
    scaled = t | {
        "W_enc": t["W_enc"] / scale,
        "b_enc": t["b_enc"] + torch.from_numpy(mean) @ t["W_enc"],
        "W_dec": t["W_dec"] * scale,
        "b_dec": (t["b_dec"] - torch.from_numpy(mean)) * scale,
    }
    to_saelens(SparseAutoencoder.from_tensors(world.sae.cfg, scaled), str(tmp_path / "scaled"))
    np.save(tmp_path / "mean.npy", mean)
    cfg = config(world, tmp_path / "out", centre=str(tmp_path / "mean.npy"), scale=scale)
    found = Results.open(inference.run(cfg.model_copy(update={"run": str(tmp_path / "scaled")})))
    plain = Results.open(inference.run(config(world, tmp_path / "plain")))
    for name in ("normalized_mse", "l0"):
        assert found.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-4)


def test_no_sae(world, tmp_path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        inference.run(config(world).model_copy(update={"run": str(tmp_path / "none")}))
    with pytest.raises(CheckpointError, match="holds no SAE"):
        inference.run(config(world).model_copy(update={"run": str(tmp_path)}))


def test_out_of_other_inputs(world, tmp_path) -> None:
    inference.run(config(world, tmp_path, part="1/2"))
    with pytest.raises(ConfigError, match=r"results of other inputs.*another --out"):
        inference.run(config(world, tmp_path, n_top=3))


def test_finish_before_all_parts(world, tmp_path) -> None:
    inference.run(config(world, tmp_path, part="2/3"))
    with pytest.raises(IncompleteError, match=r"4 of 5 shards are not done \(0, 2, 3, 4\)|of 5"):
        inference.finish(config(world, tmp_path))
    with pytest.raises(IncompleteError, match=r"metrics\.json is missing"):
        Results.open(str(tmp_path))


@pytest.mark.parametrize("suffix", ["codes", "dists", "safetensors"])
def test_a_damaged_part_is_named_and_can_be_done_anew(world, whole, tmp_path, suffix) -> None:
    inference.run(config(world, tmp_path, part="1/1"))
    path = tmp_path / "parts" / f"000002.{suffix}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptDataError, match=rf"000002\.{suffix} is damaged") as caught:
        inference.run(config(world, tmp_path))
    assert not (tmp_path / "metrics.json").exists()
    assert "000002.json" in str(caught.value)  # the remedy: without its record it is done anew
    (tmp_path / "parts" / "000002.json").unlink()
    inference.run(config(world, tmp_path))
    assert contents(tmp_path) == whole


def test_a_damaged_record_is_named(world, tmp_path) -> None:
    inference.run(config(world, tmp_path, part="1/5"))
    record = tmp_path / "parts" / "000000.json"
    for text, message in (("{", "not valid JSON"), ("{}", "key: Field required")):
        record.write_text(text)
        with pytest.raises(CorruptDataError, match=rf"000000\.json.*{message}"):
            inference.run(config(world, tmp_path))


def test_nothing_can_be_written(world, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"Cannot write .*file/out.*a file stands"):
        inference.run(config(world, tmp_path / "file" / "out"))


def test_a_full_disk(world, whole, tmp_path, monkeypatch) -> None:
    """The disk fills up while the second shard's codes are written."""
    append = CodesWriter.append

    def full(self, columns, tokens):
        if tokens.example_idx[0] >= 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, columns, tokens)

    monkeypatch.setattr(CodesWriter, "append", full)
    with pytest.raises(StorageError, match="no space left on the device"):
        inference.run(config(world, tmp_path))
    monkeypatch.undo()
    inference.run(config(world, tmp_path))
    assert contents(tmp_path) == whole


def test_a_damaged_shard_is_named(tmp_path) -> None:
    world = make_world(tmp_path)
    path = tmp_path / "shards" / storage.name(world.shards) / "acts000003.bin"
    data = bytearray(path.read_bytes())
    data[-7] ^= 8
    path.write_bytes(data)
    with pytest.raises(CorruptDataError, match=r"acts000003\.bin is damaged"):
        inference.run(config(world))


def test_weights_that_are_not_finite(world, tmp_path) -> None:
    sae = world.sae
    sae.b_dec[3] = float("nan")
    sae.save(str(tmp_path / "sae"))
    cfg = config(world, tmp_path / "out").model_copy(update={"run": str(tmp_path / "sae")})
    message = r"acts000000\.bin: the reconstruction error of the SAE at .*sae is nan"
    with pytest.raises(CorruptDataError, match=message):
        inference.run(cfg)


# --- Finding results -----------------------------------------------------------------------


def test_find(tmp_path) -> None:
    world = make_world(tmp_path)
    name = storage.name(world.shards)
    with pytest.raises(ConfigError, match="has no inference results"):
        Results.find(world.run, name)
    first = inference.run(config(world))
    inference.run(config(world, n_top=1, part="1/2"))  # unfinished ones do not count
    assert Results.find(world.run, name).url == first
    other = inference.run(config(world, n_top=1))
    assert Results.find(world.run, name).url == first  # as without further flags
    storage.delete(first, recursive=True)
    assert Results.find(world.run, name).url == other
    inference.run(config(world, n_top=2))
    with pytest.raises(ConfigError, match=r"several inference results.*--inference"):
        Results.find(world.run, name)


@pytest.mark.parametrize("kwargs", [{}, {"n_top": 3}], ids=["usual", "chosen"])
@pytest.mark.parametrize("is_moved", [False, True])
def test_find_prefers_what_this_version_makes(tmp_path, monkeypatch, kwargs, is_moved) -> None:
    world = make_world(tmp_path)
    with monkeypatch.context() as older:
        older.setattr(job_module, "FORMAT", job_module.FORMAT - 1)
        old = inference.run(config(world, **kwargs))
    new = inference.run(config(world, **kwargs))
    assert old != new
    shards = world.shards
    if is_moved:
        shards = str(tmp_path / storage.name(shards))
        Path(world.shards).rename(shards)
    assert Results.find(world.run, storage.name(shards), shards).url == new
    storage.delete(new, recursive=True)
    assert Results.find(world.run, storage.name(shards), shards).url == old
