"""Every path of the bank, and the SAE that comes out of it, against the float64 reference."""

import contextlib

import pytest
import torch
from nn.reference import Measured, Reference

import saev.nn.bank as bank_module
from saev.config import BatchTopK, JumpRelu, Matryoshka, Relu, SaeConfig, TopK, Vanilla
from saev.nn import SaeBank, SparseAutoencoder, aux_k
from saev.nn.codes import encode

D, S, B = 10, 24, 37
K_AUX = 4
ACTIVATIONS = [
    TopK(top_k=4),
    BatchTopK(top_k=4, threshold_momentum=0.7),
    Relu(),
    JumpRelu(init_l0=6, kernel_width=0.7),
]
OBJECTIVES = [
    Vanilla(sparsity_coeff=0.07, k_aux=K_AUX),
    Matryoshka(sparsity_coeff=0.03, n_prefixes=5, k_aux=K_AUX, aux_coeff=0.5),
    Vanilla(sparsity_coeff=0.0, aux_coeff=0.0),
    Matryoshka(n_prefixes=1),
    Matryoshka(sparsity_coeff=0.02, n_prefixes=3, pareto_alpha=1.5),
]
AIMING = {1: {"target_l0": 3.0}, 2: {"target_l0": 9.0}, 4: {"target_l0": 5.0}}
"""What changes where there is a penalty: these members find its coefficient themselves."""
LAYOUTS = ["whole", "rows by fives", "two members at a time"]
"""How a bank cuts its work: on CPU by members and chunks of rows, on a GPU by wide products."""


@contextlib.contextmanager
def layout(name):
    with pytest.MonkeyPatch.context() as patch:
        if name == "rows by fives":
            patch.setattr(bank_module, "_CPU_CHUNK", 1)
            patch.setattr(bank_module, "_MIN_ROWS", 5)
        if name == "two members at a time":
            patch.setattr(SaeBank, "_group_size", lambda self, n_tokens: 2)
        yield


def layouts_of(act):
    return [name for name in LAYOUTS if hasattr(act, "top_k") or name != LAYOUTS[2]]


CASES = [(act, name) for act in ACTIVATIONS for name in layouts_of(act)]
case_id = {"ids": lambda v: getattr(v, "kind", v)}


def objectives_of(act):
    aiming = {} if hasattr(act, "top_k") else AIMING
    return [
        o.model_copy(update={"sparsity_coeff": None, **aiming[n]} if n in aiming else {})
        for n, o in enumerate(OBJECTIVES)
    ]


def make_bank(act, **kwargs):
    """Members that differ in all that may differ."""
    objectives = objectives_of(act)
    n = len(objectives)
    cfgs = []
    for i in range(n):
        more = {}
        if hasattr(act, "top_k"):
            more["top_k"] = act.top_k + i % 3
        if hasattr(act, "threshold_momentum"):
            more["threshold_momentum"] = act.threshold_momentum - 0.2 * i % 0.5
        cfgs.append(
            SaeConfig(
                d_sae=S,
                activation=act.model_copy(update=more),
                reinit_blend=0.8,
                normalize_w_dec=i % 4 != 1,
                remove_parallel_grads=i % 3 != 1,
            )
        )
    options = {"dtype": torch.float64, "data": batch(5, 200), "dead_after": 100} | kwargs
    return SaeBank(cfgs, objectives, [1e-2 * (i + 1) for i in range(n)], range(n), D, **options)


def batch(seed=0, n=B):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, dtype=torch.float64, generator=generator) + 0.5


def let_die(bank, n_dead, bias=0.0):
    """Latents 3, 4, … of every second member have not fired for long."""
    bank.n_tokens += 1000  # what a bank that saw nothing yet cannot have
    dead = torch.arange(3, 3 + n_dead) % S
    bank.since_fired[::2, dead] = 1000
    bank.params["b_enc"][::2, dead] += bias


def assert_same_metrics(found, want, rtol):
    for name in Measured._fields:
        torch.testing.assert_close(
            getattr(found, name).double(),
            torch.tensor([getattr(w, name) for w in want], dtype=torch.float64),
            rtol=rtol,
            atol=rtol * 1e-3,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_same_gradients(bank, references, rtol):
    for n, reference in enumerate(references):
        for name, want in reference.grads.items():
            found = bank.grads[name][n].double()
            torch.testing.assert_close(
                found,
                want,
                rtol=rtol,
                atol=rtol * float(want.abs().max()),
                msg=lambda text, where=(n, name): f"{where}: {text}",
            )


def assert_same_state(bank, references, rtol):
    for n, reference in enumerate(references):
        assert torch.equal(bank.since_fired[n], reference.since_fired), n
        assert float(bank.threshold[n]) == pytest.approx(reference.threshold, rel=rtol, abs=0)
        if reference.objective.target_l0 is not None:
            found = [float(values[n]) for values in bank.sparsity.state.values()]
            assert found == pytest.approx(list(reference.control.values()), rel=rtol)
            assert reference.control["sum"] != 0
        for name, want in reference.params.items():
            found = bank.params[name][n].double()
            torch.testing.assert_close(
                found, want, rtol=rtol, atol=rtol * 1e-2, msg=lambda t, w=(n, name): f"{w}: {t}"
            )


# --- The reference itself --------------------------------------------------------------------


def test_the_reference_is_right_about_a_case_by_hand():
    """One token x = (3, 1), two latents along the axes, TopK of one, no update.

    z = (2·3 - 1, 1) = (5, 1), f = (5, 0), x̂ = (5, 0) + (0, 0.5), e = x - x̂ = (-2, 0.5).
    """
    cfg = SaeConfig(d_sae=2, activation=TopK(top_k=1), remove_parallel_grads=False)
    bank = SaeBank([cfg], [Vanilla()], [0.1], [0], 2, dtype=torch.float64)
    bank.params["W_enc"].copy_(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]))
    bank.params["b_enc"].copy_(torch.tensor([[-1.0, 0.0]]))
    bank.params["W_dec"].copy_(torch.eye(2)[None])
    bank.params["b_dec"].copy_(torch.tensor([[0.0, 0.5]]))
    reference = Reference(bank, 0)
    found = reference.step(torch.tensor([[3.0, 1.0]]))
    assert found[:5] == pytest.approx(((4 + 0.25) / 2, 0, 0, 1, 5))
    want = {
        "b_dec": [2.0, -0.5],  # ∂mse/∂x̂ = 2·(x̂ - x)/2
        "W_dec": [[10.0, -2.5], [0.0, 0.0]],  # f·∂x̂
        "b_enc": [2.0, 0.0],  # ⟨∂x̂, W_dec⟩ where the latent is active
        "W_enc": [[6.0, 2.0], [0.0, 0.0]],
    }
    for name, grad in want.items():
        torch.testing.assert_close(reference.grads[name], torch.tensor(grad).double())
    # Adam's first step is lr·sign(gradient); the rows are then normalised.
    row = torch.tensor([1 - 0.1, 0.1])
    after = {
        "b_dec": [-0.1, 0.6],
        "W_dec": [(row / row.norm()).tolist(), [0.0, 1.0]],
        "b_enc": [-1.1, 0.0],
        "W_enc": [[1.9, -0.1], [0.0, 1.0]],
    }
    for name, param in after.items():
        torch.testing.assert_close(
            reference.params[name], torch.tensor(param).double(), rtol=1e-6, atol=1e-6
        )
    assert reference.margin == pytest.approx(2)  # both are 2 away from the middle, 3


# --- Training --------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adam", "muon"])
@pytest.mark.parametrize(("act", "cut"), CASES, **case_id)
def test_training_is_what_the_equations_say(act, cut, optim):
    """Several steps in float64 with schedules, dead latents and everything else."""
    with layout(cut):
        bank = make_bank(act, optim=optim)
        let_die(bank, K_AUX + 2, bias=-5.0)
        references = [Reference(bank, n) for n in range(len(bank))]
        # Muon normalises its matrices by a norm in float32.
        rtol = 1e-8 if optim == "adam" else 1e-6
        aux = 0
        for t in range(5):
            factors = [1 / (1 + t + n) for n in range(len(bank))]
            x = batch(t, B + t)
            found = bank.step(x, lr_factor=factors, sparsity_factor=factors[::-1])
            want = [
                r.step(x, lr_factor=a, sparsity_factor=b)
                for r, a, b in zip(references, factors, factors[::-1], strict=True)
            ]
            assert min(r.margin for r in references) > 1e-9, "the selection is not unique"
            assert_same_metrics(found, want, rtol)
            aux += (found.aux > 0).sum().item()
        assert_same_state(bank, references, rtol)
        assert aux == 5 * 2, "of the members 0 and 4; 2 has no AuxK"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_dead", [0, 1, K_AUX, K_AUX + 1, S])
@pytest.mark.parametrize(("act", "cut"), CASES, **case_id)
def test_gradients_are_those_of_the_loss(act, cut, n_dead, dtype):
    """None dead, fewer and more than k_aux, all: with AuxK's gradients in place."""
    with layout(cut):
        bank = make_bank(act, dtype=dtype)
        let_die(bank, n_dead)
        references = [Reference(bank, n) for n in range(len(bank))]
        x = batch(1).to(dtype)
        found = bank.compute_gradients(x, sparsity_factor=0.5)
    want = [r.gradients(x, sparsity_factor=0.5) for r in references]
    rtol = 1e-9 if dtype == torch.float64 else 2e-5
    assert min(r.margin for r in references) > rtol / 2, "the selection is not unique"
    assert_same_metrics(found, want, rtol)
    assert_same_gradients(bank, references, rtol)
    has_aux = [bool(n_dead) and n % 2 == 0 and o.aux_coeff > 0 for n, o in enumerate(OBJECTIVES)]
    assert (found.aux > 0).tolist() == has_aux
    assert all(g.abs().max() > 0 for r in references for g in r.grads.values())


@pytest.mark.parametrize("n_dead", [1, K_AUX + 1, S - 3])
@pytest.mark.parametrize("act", [ACTIVATIONS[0], ACTIVATIONS[3]], ids=lambda a: a.kind)
def test_aux_k_on_sparse_codes(act, n_dead, monkeypatch):
    """With candidates that are not dead, so that some tokens have fewer than k_aux codes."""
    monkeypatch.setitem(aux_k._SPARSE_ABOVE, "cpu", 0)
    bank = make_bank(act)
    bank._steps_between_looks = 2
    let_die(bank, n_dead)
    bank.since_fired[:, :3] = bank.dead_after - B
    bank.since_fired[:, -6:] = torch.maximum(bank.since_fired[:, -6:], bank.since_fired[:, :1])
    references = [Reference(bank, n) for n in range(len(bank))]
    x = batch(1)
    used = []
    add = aux_k._add_sparse
    monkeypatch.setattr(aux_k, "_add_sparse", lambda *args: used.append(args[4]) or add(*args))
    found = bank.compute_gradients(x)
    assert_same_metrics(found, [r.gradients(x) for r in references], 1e-9)
    assert_same_gradients(bank, references, 1e-9)
    assert all((~is_dead).any() for is_dead in used)
    assert [int(is_dead.sum()) for is_dead in used] == [n_dead, 0, 0, n_dead]


@pytest.mark.parametrize(("act", "cut"), CASES, **case_id)
def test_bfloat16_products_cost_a_few_bits_and_nothing_else(act, cut):
    """What the matrix units of a GPU are given, here on the CPU."""
    with layout(cut):
        bank = make_bank(act, dtype=torch.float32)
        let_die(bank, K_AUX + 2)
        references = [Reference(bank, n) for n in range(len(bank))]
        bank.bf16 = True
        x = batch(1).float()
        found = bank.compute_gradients(x)
    assert_same_metrics(found, [r.gradients(x) for r in references], rtol=0.05)
    for n, reference in enumerate(references):
        for name, want in reference.grads.items():
            miss = (bank.grads[name][n].double() - want).norm() / want.norm()
            # Most of it is of latents that are selected in place of others.
            assert 1e-5 < miss < 0.2, (n, name, miss)


def test_bfloat16_activations_are_taken_as_they_are():
    """A loader may give bfloat16: exact in float32, so training on it is exact, too."""
    x = batch().bfloat16()
    banks = [make_bank(TopK(top_k=4), dtype=torch.float32) for _ in range(2)]
    for bank, acts in zip(banks, (x, x.float()), strict=True):
        for _ in range(2):
            bank.step(acts)
    for name, tensor in banks[0].state_dict().items():
        assert torch.equal(tensor, banks[1].state_dict()[name]), name


# --- The SAE that comes out ------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize("wide", [1, 40])  # latents per wanted one: dense and sparse products
def test_an_sae_encodes_and_decodes_as_it_was_trained(act, wide):
    """SparseAutoencoder and the inference stage, on recorded activations, against the reference's
    forward pass on normalised ones; every prefix."""
    cfg = SaeConfig(d_sae=S * wide, activation=act)
    objective = Matryoshka(n_prefixes=4)
    bank = SaeBank([cfg], [objective], [1e-3], [0], D, data=batch(5, 200), dead_after=10**6)
    for t in range(3):
        bank.step(batch(t))
    mean, scale = torch.linspace(-1, 2, D), 0.6
    x = batch(7)
    recorded = (x / scale + mean).float()
    y = (recorded.double() - mean) * scale

    reference = Reference(bank, 0)
    p = reference.params
    z = y @ p["W_enc"].T + p["b_enc"]
    if act.kind == "batch-top-k":  # evaluation selects by the threshold
        f = z * (z > reference.threshold)
        margin = (z - reference.threshold).abs().min()
    else:
        f, _ = reference._activate(z)
        margin = reference.margin
    assert margin > 1e-6 or act.kind == "relu"  # which does not jump at its boundary
    sae = bank.to_sae(0, mean, scale)
    out = sae(recorded)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out.acts.double(), f / scale, **tolerance)
    for prefix in (0, 1, 7, S * wide):
        x_hat = (f[:, :prefix] @ p["W_dec"][:prefix] + p["b_dec"]) / scale + mean
        torch.testing.assert_close(sae.decode(out.acts, prefix).double(), x_hat, **tolerance)
    torch.testing.assert_close(out.x_hat.double(), x_hat, **tolerance)

    found = encode(sae, recorded)
    dense = torch.zeros_like(f)
    rows = torch.arange(B).repeat_interleave(found.row_nnz)
    dense[rows, found.latents.long()] = found.values.double()
    torch.testing.assert_close(dense, f / scale, **tolerance)
    torch.testing.assert_close(found.x_hat.double(), x_hat, **tolerance)
    assert len(found.values) == (out.acts > 0).sum()


def test_an_sae_takes_bfloat16_activations():
    sae = make_bank(TopK(top_k=4), dtype=torch.float32).members()[0]
    x = batch().bfloat16()
    assert isinstance(sae, SparseAutoencoder)
    assert torch.equal(sae(x).x_hat, sae(x.float()).x_hat)
    assert torch.equal(encode(sae, x).x_hat, encode(sae, x.float()).x_hat)
