"""Where sparsity is aimed at: where JumpReLU starts, λ by feedback, levels set after training."""

import math

import pytest
import torch

from saev.config import BatchTopK, JumpRelu, Relu, SaeConfig, TopK, Vanilla
from saev.errors import ConfigError
from saev.nn import SaeBank
from saev.nn.calibration import Calibration, set_level
from saev.nn.sae import SparseAutoencoder

D, S = 24, 160


def tokens(n, seed=0, scale=1.0):
    """Sparse sums of directions that are not equally frequent, and noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(60, D, generator=torch.Generator().manual_seed(99))
    chance = 0.5 / torch.arange(1, 61)
    on = torch.rand(n, 60, generator=generator) < chance
    x = (on * torch.rand(n, 60, generator=generator)) @ directions
    return scale * (x + 0.1 * torch.randn(n, D, generator=generator))


def bank_of(activation, objectives, scale=1.0):
    n = len(objectives)
    return SaeBank(
        [SaeConfig(d_sae=S, activation=activation)] * n, objectives, [3e-3] * n, range(n), D,
        data=tokens(2000, 7, scale), dead_after=10_000,
    )  # fmt: skip


@pytest.mark.parametrize("l0", [4, 16, 40])
def test_jump_relu_starts_at_its_target(l0):
    """The quantile of the sample is that of any batch."""
    bank = bank_of(JumpRelu(), [Vanilla(target_l0=l0), Vanilla(sparsity_coeff=1e-3)])
    started = bank_of(JumpRelu(init_l0=l0), [Vanilla()]).compute_gradients(tokens(4000))
    found = bank.compute_gradients(tokens(4000))
    assert found.l0[0].item() == pytest.approx(l0, rel=0.15)
    assert found.l0[1].item() == pytest.approx(S // 4, rel=0.1)  # of 64, at most a quarter of all
    assert started.l0[0].item() == pytest.approx(l0, rel=0.15)


@pytest.mark.parametrize(
    ("activation", "n_steps", "scale"),
    [(Relu(), 700, 0.3), (JumpRelu(), 150, 0.3), (JumpRelu(), 150, 1.0)],
)
def test_a_target_is_reached_whatever_the_unit(activation, n_steps, scale):
    bank = bank_of(activation, [Vanilla(target_l0=k) for k in (4, 12, 30)], scale=scale)
    steps = [bank.step(tokens(128, t, scale), 1 - t / n_steps) for t in range(n_steps)]
    l0 = torch.stack([step.l0 for step in steps])
    assert l0[-20:].mean(0).tolist() == pytest.approx([4, 12, 30], rel=0.15)


def test_a_target_for_activations_without_a_penalty_is_an_error():
    for activation in (TopK(top_k=4), BatchTopK(top_k=4)):
        with pytest.raises(ConfigError, match=f"target_l0 is given, but {activation.kind}"):
            bank_of(activation, [Vanilla(target_l0=4)])


def test_a_target_and_a_coefficient_are_an_error():
    with pytest.raises(ValueError, match=r"target_l0 is 30 and sparsity_coeff is 0\.01"):
        Vanilla(target_l0=30, sparsity_coeff=0.01)
    assert Vanilla(target_l0=30).identity()["sparsity_coeff"] == 1e-3
    assert "target_l0" not in Vanilla().identity()


def test_thresholds_of_dead_latents_fall_to_a_third_of_the_usual_one():
    bank = bank_of(JumpRelu(), [Vanilla(target_l0=8, aux_coeff=0.0)])
    bank.dead_after = 500
    bank.params["log_threshold"][0, :5] += math.log(50)  # beyond all pre-activations
    first = bank.params["log_threshold"].clone()
    fired = torch.zeros(5, dtype=torch.bool)
    for t in range(120):
        bank.step(tokens(256, t))
        fired |= bank.since_fired[0, :5] == 0
        if t == 0:  # not dead yet
            assert torch.equal(bank.params["log_threshold"][0, :5], first[0, :5])
    assert fired.all()
    bank.params["W_enc"][0, :5] = 0.0  # these cannot fire
    bank.params["b_enc"][0, :5] = -1.0
    for t in range(200):
        bank.step(tokens(256, t), lr_factor=1.0)
        bank.params["b_enc"][0, :5] = -1.0
    ln_theta = bank.params["log_threshold"][0]
    dead = bank.since_fired[0] >= 500
    assert dead[:5].all()
    assert ln_theta[:5].tolist() == pytest.approx([ln_theta[~dead].mean().item() - 1] * 5, abs=0.1)


# --- Levels ----------------------------------------------------------------------------------


def random_sae(kind):
    generator = torch.Generator().manual_seed(3)
    activation = {"relu": Relu(), "jump-relu": JumpRelu(), "batch-top-k": BatchTopK(top_k=5)}[kind]
    sae = SparseAutoencoder(SaeConfig(d_model=D, d_sae=S, activation=activation))
    sae.W_enc.data = torch.randn(D, S, generator=generator) / 5
    sae.b_enc.data = -torch.rand(S, generator=generator)
    sae.W_dec.data = torch.randn(S, D, generator=generator)
    if kind == "jump-relu":
        sae.threshold = torch.rand(S, generator=generator) + 0.1
    if kind == "batch-top-k":
        sae.threshold = torch.tensor(0.5)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("l0", [0.7, 5, 31.5])
@pytest.mark.parametrize("kind", ["relu", "jump-relu", "batch-top-k"])
def test_a_level_leaves_as_many_latents_active_as_wanted(kind, l0):
    sae, x = random_sae(kind), tokens(6000)
    before = (sae(x).acts > 0).sum(1).double().mean()
    calibration = Calibration(sae, l0)
    for part in x.split(1700):
        calibration.update(part)
    # The slow way: sort all scores.
    z = x @ sae.W_enc + sae.b_enc
    scores = (z / sae.threshold if kind == "jump-relu" else z).flatten().sort().values
    want = scores[-round(l0 * len(x))].item()
    assert calibration.level() == pytest.approx(want, abs=2e-3)
    assert calibration.l0_before == pytest.approx(before.item(), rel=1e-3)
    set_level(sae, calibration.level())
    assert (sae(x).acts > 0).sum(1).double().mean() == pytest.approx(l0, rel=5e-3)


def test_levels_do_not_depend_on_batches():
    levels = []
    for sizes in (4096, 500, 1):
        calibration = Calibration(random_sae("batch-top-k"), 5)
        x = tokens(5000)
        for part in (x[:4096], *x[4096:].split(sizes)):
            calibration.update(part)
        levels.append(calibration.level())
    assert len(set(levels)) == 1


def test_a_level_of_nothing_is_an_error():
    with pytest.raises(ConfigError, match="no tokens to calibrate on"):
        Calibration(random_sae("relu"), 5).level()
    top_k = SparseAutoencoder(SaeConfig(d_model=D, d_sae=S, activation=TopK(top_k=3)))
    with pytest.raises(ConfigError, match="top-k has no level"):
        set_level(top_k, 1.0)
