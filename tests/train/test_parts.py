"""Schedules, normalisation, resume points, curves and metrics, each by itself."""

import itertools
import json
import struct

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from saev import storage
from saev.config import DataConfig
from saev.errors import ConfigError, CorruptDataError
from saev.nn.metrics import ReconstructionMetrics
from saev.shards import LayerStats, Shards
from saev.train import curves, normalize, resume, schedule

from . import synthetic

# --- Schedules ---


def test_lr_rises_to_its_peak_and_falls_to_nothing():
    scales = [schedule.lr_scale(step, 100, 10) for step in range(100)]
    assert scales[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(scales) == 1.0
    assert all(a > b for a, b in itertools.pairwise(scales[10:]))
    assert 0 < scales[-1] < 1e-3
    assert schedule.lr_scale(0, 1, 0) == 1.0
    assert schedule.lr_scale(5, 5, 5) == 1.0  # all warm-up


def test_the_penalty_rises_once():
    assert [schedule.sparsity_scale(s, 4) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert schedule.sparsity_scale(0, 0) == 1.0


# --- Normalisation ---


@pytest.mark.parametrize("tokens", ["content", "special", "all"])
@pytest.mark.parametrize("protocol", ["3.0", "2.1"])
def test_normalised_activations_are_centred_and_of_norm_sqrt_d(tmp_path, tokens, protocol):
    truth = synthetic.make_truth()
    url = synthetic.write_shards(str(tmp_path), truth, n_examples=30, protocol=protocol)
    with Shards.open(url) as shards:
        stats = normalize.layer_stats(shards, DataConfig(shards=url, layer=7, tokens=tokens))
        x = torch.cat([shards.read(i, 7, 0, n.n_examples) for i, n in enumerate(shards.infos)])
    x = {"content": x[:, 1:], "special": x[:, :1], "all": x}[tokens].reshape(-1, 32)
    norm = normalize.Normalization.of(stats, scale_mean=True, scale_norm=True)
    y = norm.apply_(x.clone())
    assert y.mean(0).abs().max() < 1e-4
    assert y.square().sum(1).mean().item() == pytest.approx(32, rel=1e-4)
    # Each of the two by itself.
    y = normalize.Normalization.of(stats, scale_mean=True, scale_norm=False).apply_(x.clone())
    assert torch.allclose(y, x - x.mean(0), atol=1e-4)
    y = normalize.Normalization.of(stats, scale_mean=False, scale_norm=True).apply_(x.clone())
    assert y.square().sum(1).mean().item() == pytest.approx(32, rel=1e-4)


def test_statistics_of_a_large_old_folder_are_sampled(tmp_path, monkeypatch):
    url = synthetic.write_shards(
        str(tmp_path), synthetic.make_truth(), n_examples=200, protocol="2.1"
    )
    monkeypatch.setattr(normalize, "SAMPLE_TOKENS", 16 * 50)
    data = DataConfig(shards=url, layer=3)
    with Shards.open(url) as shards:
        a, b = normalize.layer_stats(shards, data), normalize.layer_stats(shards, data)
        monkeypatch.setattr(normalize, "SAMPLE_TOKENS", 10**9)
        whole = normalize.layer_stats(shards, data)
    assert (a.count, whole.count) == (16 * 50, 16 * 200)
    assert np.array_equal(a.mean, b.mean)
    assert np.abs(a.mean - whole.mean).max() < 0.2


def test_activations_that_do_not_vary_cannot_be_scaled():
    stats = LayerStats(np.ones(4), 4.0, 10)
    with pytest.raises(ConfigError, match="same vector"):
        normalize.Normalization.of(stats, scale_mean=True, scale_norm=True)


# --- Resume points ---


def point(step: int) -> resume.ResumePoint:
    gen = torch.Generator().manual_seed(step)
    tensors = {
        "a.weight": torch.randn(3, 5, generator=gen),
        "half": torch.randn(7, generator=gen).bfloat16(),
        "count": torch.arange(4) * step,
        "flag": torch.tensor([True, False]),
        "state": torch.randint(0, 255, (16,), dtype=torch.uint8, generator=gen),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "view": torch.randn(4, 6, generator=gen).T,
    }
    return resume.ResumePoint(step, tensors, {"loader": {"epoch": step}, "n_rows": step})


def assert_equal(a: resume.ResumePoint, b: resume.ResumePoint) -> None:
    assert (a.step, a.meta) == (b.step, b.meta)
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        assert torch.equal(a.tensors[name], b.tensors[name]), name
        assert a.tensors[name].dtype == b.tensors[name].dtype


@pytest.mark.parametrize("root", ["local", "memory://resume-test"])
def test_the_last_two_resume_points_are_kept(tmp_path, root):
    url = storage.join(str(tmp_path) if root == "local" else root, "resume/g")
    assert resume.load(url) is None
    for step in (5, 20, 100):
        resume.save(url, point(step))
    names = [e.name for e in storage.list_dir(url)]
    assert names == [f"step-{s:012d}.{ext}" for s in (20, 100) for ext in ("json", "safetensors")]
    assert_equal(resume.load(url), point(100))
    resume.clear(url)
    assert resume.load(url) is None
    resume.clear(url)


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "pointer", "no pointer"])
def test_a_damaged_resume_point_is_passed_over(tmp_path, damage, caplog):
    url = str(tmp_path / "resume")
    resume.save(url, point(10))
    resume.save(url, point(20))
    place, pointer = tmp_path / "resume/step-000000000020.safetensors", None
    pointer = place.with_suffix(".json")
    if damage == "flip":
        raw = bytearray(place.read_bytes())
        raw[-3] ^= 1
        place.write_bytes(raw)
    elif damage == "truncate":
        place.write_bytes(place.read_bytes()[:-8])
    elif damage == "missing":
        place.unlink()
    elif damage == "pointer":
        pointer.write_text('{"step": 2')
    else:
        pointer.unlink()  # killed between the two objects: not damage, just not there
    assert_equal(resume.load(url), point(10))
    assert ("passed over" in caplog.text) == (damage != "no pointer")


# --- Curves ---


def add_rows(run: curves.Curves, steps: range) -> None:
    for step in steps:
        run.add({"step": step, "loss": 1.0 / (step + 1), "lr": 1e-3}, {"loader/wait_s": 0.1})


@pytest.mark.parametrize("root", ["local", "memory://curves-test"])
def test_an_interrupted_run_has_the_same_curve(tmp_path, root):
    base = str(tmp_path) if root == "local" else root
    whole = curves.Curves(storage.join(base, "a"))
    add_rows(whole, range(9))
    whole.flush()

    url = storage.join(base, "b")
    first = curves.Curves(url)
    add_rows(first, range(3))
    first.flush()
    add_rows(first, range(3, 7))  # these rows came after the resume point
    first.flush()
    second = curves.Curves(url, n_rows=3)
    add_rows(second, range(3, 9))
    second.flush()
    second.flush()
    assert storage.read_bytes(storage.join(url, "metrics.jsonl")) == storage.read_bytes(
        storage.join(base, "a", "metrics.jsonl")
    )
    assert len(storage.read_text(storage.join(url, "timings.jsonl")).splitlines()) == 9
    if root == "local":
        events = EventAccumulator(storage.join(url, "tb"))
        events.Reload()
        scalars = events.Scalars("loss")
        assert [e.step for e in scalars] == list(range(9))
        assert [e.value for e in scalars] == pytest.approx([1 / (i + 1) for i in range(9)])


def test_what_is_not_finite_is_null(tmp_path):
    run = curves.Curves(str(tmp_path))
    run.add({"step": 0, "grad_norm": float("inf"), "loss": 2.0}, {})
    run.flush()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 0, "grad_norm": None, "loss": 2.0}


def test_a_lost_curve_is_an_error_not_a_gap(tmp_path):
    run = curves.Curves(str(tmp_path))
    add_rows(run, range(2))
    run.flush()
    with pytest.raises(CorruptDataError, match="has 2 rows, but its resume point counts 5"):
        curves.Curves(str(tmp_path), n_rows=5)


def test_wandb_is_asked_for_before_training(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    curves.check_wandb("")
    with pytest.raises(ConfigError, match="pip install 'saev\\[wandb\\]'"):
        curves.check_wandb("my-project")


# --- Metrics ---


def test_metrics_do_not_depend_on_batches_and_are_the_definition():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 12, generator=gen) + 100  # a mean that dwarfs the variance
    x_hat = x + 0.1 * torch.randn(1000, 12, generator=gen)
    f = torch.relu(torch.randn(1000, 30, generator=gen))
    f[:, 3] = 0
    f[:, 4] = 0
    f[17, 4] = 1
    merged = ReconstructionMetrics(12, 30)
    for rows in (slice(0, 10), slice(10, 700), slice(700, 1000)):
        part = ReconstructionMetrics(12, 30)
        part.update(x[rows], x_hat[rows], f[rows])
        merged.merge(ReconstructionMetrics.from_tensors(part.tensors()))
    found = merged.to_dict()
    xd, ed = x.double(), (x.double() - x_hat.double()).square().sum()
    want = float(ed / (xd - xd.mean(0)).square().sum())
    assert found["normalized_mse"] == pytest.approx(want, rel=1e-9)
    assert found["explained_variance"] == 1 - found["normalized_mse"]
    assert found["mse_per_token"] == pytest.approx(float(ed) / 1000)
    assert found["mse_per_dim"] == pytest.approx(float(ed) / 12000)
    assert found["l0"] == float((f != 0).sum()) / 1000
    assert found["l1"] == pytest.approx(float(f.double().sum()) / 1000)
    assert (found["n_dead"], found["n_almost_dead"], found["n_dense"]) == (1, 1, 28)
    assert merged.frequency()[4].item() == pytest.approx(1e-3)


def test_metrics_of_nothing_or_of_other_widths():
    with pytest.raises(ConfigError, match="no tokens"):
        ReconstructionMetrics(4, 8).to_dict()
    with pytest.raises(ConfigError, match="shapes"):
        ReconstructionMetrics(4, 8).update(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 9))
    with pytest.raises(ConfigError, match="cannot be merged"):
        ReconstructionMetrics(4, 8).merge(ReconstructionMetrics(4, 9))


def test_constant_activations_have_finite_metrics():
    metrics = ReconstructionMetrics(2, 2)
    metrics.update(torch.ones(5, 2), torch.ones(5, 2), torch.zeros(5, 2))
    assert metrics.to_dict()["normalized_mse"] == 0.0
    assert struct.pack("d", metrics.to_dict()["l1"]) == struct.pack("d", 0.0)
