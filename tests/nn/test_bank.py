"""The bank as a whole: independence of its members, resume, threads, optimisers, thresholds."""

import pytest
import safetensors.torch
import torch
from forker import Forker

from saev.config import BatchTopK, JumpRelu, Matryoshka, Relu, SaeConfig, TopK, Vanilla
from saev.errors import CheckpointError, ConfigError
from saev.nn import SaeBank
from saev.nn.optim import orthogonalize

D, S = 23, 71  # so that members differ in their alignment in memory
ACTIVATIONS = [TopK(top_k=5), BatchTopK(top_k=5), Relu(), JumpRelu()]


def stream(n_steps, size=130, seed=0):
    """Batches of a low-rank distribution, in which few latents are enough."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(30, D, generator=generator)
    for _ in range(n_steps):
        codes = torch.rand(size, 30, generator=generator)
        yield (codes * (codes > 0.85)) @ directions


def sae_config(act, **kwargs):
    """Explicit, so that the defaults of training may change."""
    return SaeConfig(d_sae=S, activation=act, reinit_blend=0.8, **kwargs)


def members(act, n, objective=None):
    """Configs of n members that differ in everything that may differ."""
    cfgs, objectives = [], []
    for i in range(n):
        more = {
            "top_k": 4 + i,
            "threshold_momentum": 0.9 - 0.2 * i,
            "kernel_width": 0.5 + 0.1 * i,
            "init_l0": 5 + i,
            "threshold_lr": 1e-2 if i == 1 else None,
        }
        more = {name: value for name, value in more.items() if hasattr(act, name)}
        cfgs.append(
            sae_config(
                act.model_copy(update=more),
                normalize_w_dec=i != 2,
                remove_parallel_grads=i != 3,
            )
        )
        kind = Matryoshka(n_prefixes=3 + i, pareto_alpha=0.5 * i) if i % 2 else Vanilla()
        more = {"sparsity_coeff": 1e-3 * (i + 1), "aux_coeff": 0.1 * (i + 1), "k_aux": 6 + 4 * i}
        if i == 1 and act.kind in ("relu", "jump-relu"):
            more |= {"sparsity_coeff": None, "target_l0": 6.0}
        objectives.append((objective or kind).model_copy(update=more))
    lrs = [1e-3 * (i + 1) for i in range(n)]
    return cfgs, objectives, lrs, list(range(n))


def bank_of(cfgs, objectives, lrs, seeds, **kwargs):
    data = torch.cat(list(stream(2, seed=9)))
    options = {"data": data, "dead_after": 400} | kwargs
    return SaeBank(cfgs, objectives, lrs, seeds, D, **options)


def with_dead_latents(bank):
    """The first ten latents of every member do not fire for a while."""
    bank.params["b_enc"][:, :10] -= 20
    return bank


def train(bank, batches, start=0):
    return [
        bank.step(x, lr_factor=1 / (1 + i), sparsity_factor=min(1, i / 5))
        for i, x in enumerate(batches, start)
    ]


# Rows at a time: all, or few. An optimizer sees whole gradients, whatever their number.
@pytest.mark.parametrize(("optim", "rows"), [("adam", None), ("muon", None), ("adam", 47)])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: a.kind)
def test_a_member_of_a_bank_is_bit_for_bit_what_it_is_alone(act, optim, rows, monkeypatch):
    if rows:
        monkeypatch.setattr("saev.nn.bank._CPU_CHUNK", 1)
        monkeypatch.setattr("saev.nn.bank._MIN_ROWS", rows)
    cfgs, objectives, lrs, seeds = members(act, 4)
    bank = with_dead_latents(bank_of(cfgs, objectives, lrs, seeds, optim=optim))
    together = train(bank, stream(12))
    assert all(together[-1].aux > 0), "no latent died: AuxK was not tried"
    state = bank.state_dict()
    for i in range(4):
        one = slice(i, i + 1)
        alone = bank_of(cfgs[one], objectives[one], lrs[one], seeds[one], optim=optim)
        metrics = train(with_dead_latents(alone), stream(12))
        for name, tensor in alone.state_dict().items():
            want = state[name] if name == "counters" else state[name][one]
            assert torch.equal(tensor, want), (i, name)
        for a, t in zip(metrics, together, strict=True):
            for field in a._fields:
                assert torch.equal(getattr(a, field)[0], getattr(t, field)[i]), (i, field)


@pytest.mark.parametrize("optim", ["adam", "muon"])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: a.kind)
def test_resume_is_exact_through_safetensors(act, optim):
    batches = list(stream(10))
    straight = bank_of(*members(act, 2), optim=optim)
    train(straight, batches)
    first = bank_of(*members(act, 2), optim=optim)
    train(first, batches[:4])
    saved = safetensors.torch.save(first.state_dict())
    train(first, batches[4:6])  # a state that was taken must not change afterwards
    second = bank_of(*members(act, 2), optim=optim, data=None)
    second.load_state_dict(safetensors.torch.load(saved))
    train(second, batches[4:], start=4)
    want, found = straight.state_dict(), second.state_dict()
    assert set(want) == set(found)
    for name in want:
        assert torch.equal(want[name], found[name]), name


def test_a_state_of_another_bank_is_an_error_that_names_the_tensor():
    bank = bank_of(*members(TopK(top_k=4), 2))
    state = bank.state_dict()
    with pytest.raises(CheckpointError, match="log_threshold"):
        bank_of(*members(JumpRelu(), 2)).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"W_enc.*\[2, 71, 23\].*expected.*\[3, 71, 23\]"):
        bank_of(*members(TopK(top_k=4), 3)).load_state_dict({**state, "rng": state["rng"][:1]})
    muon = bank_of(*members(TopK(top_k=4), 2), optim="muon")
    with pytest.raises(CheckpointError, match="muon"):
        muon.load_state_dict(state)


THREADS = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
assert torch.get_num_threads() == int(sys.argv[1])
from saev.config import *
from saev.nn import SaeBank
torch.manual_seed(0)
mix = torch.randn(40, 67)
for act in (TopK(top_k=6), BatchTopK(top_k=6), Relu(), JumpRelu()):
    for optim in ("adam", "muon"):
        cfg = SaeConfig(d_sae=331, activation=act)
        objectives = [Vanilla(), Matryoshka(n_prefixes=4)]
        data = torch.randn(500, 40) @ mix
        bank = SaeBank([cfg] * 2, objectives, [1e-3, 2e-3], [0, 1], 67, optim=optim,
                       dead_after=1100, data=data)
        bank.params["b_enc"][:, :20] -= 20
        metrics = [bank.step(torch.randn(1009, 40) @ mix) for _ in range(3)]
        digest = hashlib.sha256()
        for tensor in [*bank.state_dict().values(), *(t for m in metrics for t in m)]:
            digest.update(tensor.numpy().tobytes())
        print(act.kind, optim, digest.hexdigest())
# torch splits a sum from 32,768 numbers on.
bank = SaeBank([SaeConfig(d_sae=16, activation=TopK(top_k=2))], [Vanilla()], [1e-3], [0], 8)
print(*(t.tolist() for t in bank.step(torch.randn(40_000, 8))))
"""


def test_the_number_of_threads_does_not_change_a_bit(forker: Forker):
    outputs = {forker.output(THREADS, n_threads) for n_threads in (1, 3)}
    assert len(outputs) == 1, outputs


@pytest.mark.parametrize("optim", ["adam", "muon"])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: a.kind)
def test_training_reduces_the_error_and_keeps_rows_at_unit_norm(act, optim):
    cfg = sae_config(act)
    lr = {"adam": 3e-3, "muon": 1e-2}[optim]
    bank = bank_of([cfg], [Vanilla(sparsity_coeff=1e-4)], [lr], [0], optim=optim)
    metrics = [bank.step(x) for x in stream(75)]
    assert metrics[-1].nmse.item() < 0.5 * metrics[0].nmse.item()
    assert torch.allclose(bank.params["W_dec"].norm(dim=-1), torch.ones(1, S), atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (9, 9)])
def test_orthogonalize_has_singular_values_near_one_and_the_same_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    out = orthogonalize(matrix)
    inner = u.T @ out @ vh.T
    off = inner - torch.diag(inner.diag())
    assert off.abs().max() < 0.02
    assert inner.diag().min() > 0.6
    assert inner.diag().max() < 1.3
    assert s.max() / s.min() > 1.5  # so that it had something to do


@pytest.mark.parametrize("scale", [1e12, 1e-12, 1e-20, 1e-30, 1e-42, 0.0])
def test_orthogonalize_never_diverges(scale):
    """Below about 1e-19 the norm that it divides by underflows, and with it would the bound on the
    singular values that its polynomial needs."""
    matrix = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    out = orthogonalize(matrix * scale)
    assert torch.linalg.matrix_norm(out, 2) < 1.3
    if scale >= 1e-12:
        torch.testing.assert_close(out, orthogonalize(matrix), rtol=1e-4, atol=1e-5)


def test_dead_latents_are_counted_and_revived():
    """Latents whose bias was pushed down never fire. AuxK brings them back, or else they stay."""
    fired = {}
    for aux_coeff in (0.0, 1 / 32):
        cfg = sae_config(TopK(top_k=4))
        bank = bank_of([cfg], [Vanilla(aux_coeff=aux_coeff)], [3e-3], [0], dead_after=1000)
        bank.params["b_enc"][0, :20] -= 4.0
        for x in stream(8):
            metrics = bank.step(x)
        assert metrics.n_dead.item() >= 20
        assert bank.since_fired[0, :20].eq(8 * 130).all()
        for x in stream(150, seed=1):
            bank.step(x)
        fired[aux_coeff] = (bank.since_fired[0, :20] < 150 * 130).sum().item()
    assert fired[0.0] == 0
    assert fired[1 / 32] >= 18


def test_batch_top_k_threshold_gives_the_same_sparsity_at_evaluation():
    cfg = sae_config(BatchTopK(top_k=5))
    bank = bank_of([cfg], [Vanilla()], [1e-3], [0])
    for i, x in enumerate(stream(300)):
        metrics = bank.step(x, lr_factor=1 - i / 300)
    fresh = torch.cat(list(stream(20, seed=0)))
    sae = bank.members()[0]
    out = sae(fresh)
    l0 = (out.acts != 0).float().sum(1).mean()
    assert l0.item() == pytest.approx(5, rel=0.05)
    assert metrics.l0.item() == pytest.approx(5, abs=1e-5)
    nmse = (out.x_hat - fresh).square().sum() / (fresh - fresh.mean(0)).square().sum()
    assert nmse.item() == pytest.approx(metrics.nmse.item(), rel=0.15)


def test_batch_top_k_with_fewer_positive_values_than_wanted_selects_those():
    cfg = sae_config(BatchTopK(top_k=S))
    bank = bank_of([cfg], [Vanilla()], [1e-3], [0])
    for x in stream(3):
        z = x @ bank.params["W_enc"][0].T + bank.params["b_enc"][0]
        metrics = bank.step(x)
        assert metrics.l0.item() == pytest.approx((z > 0).sum(1).float().mean().item())
    bank.params["b_enc"] -= 1000  # nothing fires at all
    before = bank.threshold.clone()
    metrics = bank.step(x)
    assert metrics.l0.item() == 0
    assert torch.isfinite(metrics.loss).all()
    assert torch.equal(bank.threshold, before)


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: a.kind)
def test_members_compute_what_the_bank_trains(act):
    bank = bank_of(*members(act, 2))
    for x in stream(30):
        bank.step(x)
    x = next(stream(1, seed=5))
    metrics = bank.compute_gradients(x)
    for i, sae in enumerate(bank.members()):
        x_hat, acts = sae(x)
        assert (acts >= 0).all()
        if act.kind == "batch-top-k":
            continue  # evaluation uses the threshold; tested above
        nmse = (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
        torch.testing.assert_close(metrics.nmse[i], nmse, rtol=1e-4, atol=1e-6)
        l0 = (acts > 0).float().sum(1).mean()
        torch.testing.assert_close(metrics.l0[i], l0, rtol=1e-3, atol=1e-3)


def test_seeds_decide_the_initialisation():
    cfg = sae_config(TopK(top_k=4))
    bank = bank_of([cfg] * 3, [Vanilla()] * 3, [1e-3] * 3, [1, 1, 2])
    w = bank.params["W_dec"]
    assert torch.equal(w[0], w[1])
    assert not torch.equal(w[0], w[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, o, r, s: (c, o, r, s[:1]), "as many configs"),
        (lambda c, o, r, s: ([], [], [], []), "as many configs"),
        (
            lambda c, o, r, s: ([c[0], c[1].model_copy(update={"d_sae": 9})], o, r, s),
            "share d_sae",
        ),
        (lambda c, o, r, s: ([c[0], SaeConfig(d_sae=S, activation=Relu())], o, r, s), "activation"),
        (
            lambda c, o, r, s: ([SaeConfig(d_model=7, d_sae=S)] * 2, o, r, s),
            "d_model is 7.*have 23",
        ),
        (lambda c, o, r, s: (c, [Matryoshka(n_prefixes=S + 1)] * 2, r, s), "n_prefixes is 72"),
        (
            lambda c, o, r, s: ([SaeConfig(d_sae=4, activation=TopK(top_k=5))] * 2, o, r, s),
            "top_k is 5.*only 4",
        ),
        (
            lambda c, o, r, s: ([SaeConfig(d_sae=S, activation=TopK(rectify=False))] * 2, o, r, s),
            "not trainable",
        ),
    ],
)
def test_members_that_do_not_belong_together_are_an_error(change, message):
    with pytest.raises(ConfigError, match=message):
        bank_of(*change(*members(TopK(top_k=4), 2)))


def test_a_batch_or_factor_that_does_not_fit_is_an_error():
    bank = bank_of(*members(TopK(top_k=4), 2))
    with pytest.raises(ConfigError, match=r"\[3, 25\].*\[tokens, 23\]"):
        bank.step(torch.zeros(3, 25))
    with pytest.raises(ConfigError, match="lr_factor has 3 values, the bank has 2"):
        bank.step(torch.zeros(3, 23), lr_factor=[1, 1, 1])
    with pytest.raises(ConfigError, match=r"shape \[5, 9\]"):
        bank_of(*members(TopK(top_k=4), 2), data=torch.zeros(5, 9))
