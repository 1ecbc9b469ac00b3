"""Schedules, normalisation, resume points, curves and metrics, each by itself."""

import itertools
import json
import struct

import numpy as np
import pytest
import torch

from saev.config import DataConfig
from saev.errors import ConfigError
from saev.nn.metrics import ReconstructionMetrics
from saev.shards import LayerStats, Shards
from saev.train import curves, normalize, schedule

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


# --- Curves ---


def test_what_is_not_finite_is_null(tmp_path):
    run = curves.Curves(str(tmp_path))
    run.add({"step": 0, "grad_norm": float("inf"), "loss": 2.0}, {})
    run.flush()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 0, "grad_norm": None, "loss": 2.0}


def test_wandb_is_asked_for_before_training(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    curves.check_wandb("")
    with pytest.raises(ConfigError, match="pip install 'saevit\\[wandb\\]'"):
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
    assert (found["n_dead"], found["n_almost_dead"]) == (1, 1)
    often = (f != 0).double().mean(0)
    assert often.mean() > 0.05  # so ten times that is more than the most, one half
    assert found["dense_above"] == 0.5
    assert found["dense_share"] == pytest.approx(int((often > 0.5).sum()) / 30)
    assert merged.frequency()[4].item() == pytest.approx(1e-3)


def test_a_dense_latent_fires_ten_times_as_often_as_the_mean():
    """Of 100 latents 99 fire on 1% of the tokens and one on 30%. The mean is 1.29%."""
    f = torch.zeros(1000, 100)
    f[:10, :99] = 1
    f[:300, 99] = 1
    metrics = ReconstructionMetrics(4, 100)
    x = torch.randn(1000, 4)
    metrics.update(x, x, f)
    found = metrics.to_dict()
    assert found["dense_above"] == pytest.approx(0.129)
    assert found["dense_share"] == pytest.approx(0.01)


def test_metrics_of_nothing_or_of_other_widths():
    with pytest.raises(ConfigError, match="no tokens"):
        ReconstructionMetrics(4, 8).to_dict()
    with pytest.raises(ConfigError, match="shapes"):
        ReconstructionMetrics(4, 8).update(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 9))
    with pytest.raises(ConfigError, match="cannot be merged"):
        ReconstructionMetrics(4, 8).merge(ReconstructionMetrics(4, 9))


def test_constant_activations_have_no_normalised_error():
    metrics = ReconstructionMetrics(2, 2)
    metrics.update(torch.ones(5, 2), torch.ones(5, 2), torch.zeros(5, 2))
    found = metrics.to_dict()
    assert found["normalized_mse"] is found["explained_variance"] is None
    assert found["mse_per_token"] == found["l0"] == 0
    assert struct.pack("d", metrics.to_dict()["l1"]) == struct.pack("d", 0.0)
