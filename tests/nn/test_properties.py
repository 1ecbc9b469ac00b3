"""Training on shapes, sizes and inputs that nobody would choose: what must hold whatever comes."""

import itertools
import math
import typing as tp

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nn.reference import Reference
from nn.test_reference import assert_same_gradients, assert_same_metrics, assert_same_state

import saev.nn.bank as bank_module
from saev.config import BatchTopK, JumpRelu, Matryoshka, Objective, Relu, SaeConfig, TopK, Vanilla
from saev.nn import SaeBank, SparseAutoencoder
from saev.nn.codes import encode
from saev.nn.encode import batch_top_k_codes, batch_top_k_without_waiting, largest, top_k_codes
from saev.nn.weights import Weights

# Tolerances are for rounding, so the same examples every time: a rare coincidence is no news.
properties = settings(deadline=None, derandomize=True, max_examples=60)
KINDS = ("top-k", "batch-top-k", "relu", "jump-relu")


class Problem(tp.NamedTuple):
    """A bank and how it cuts its work."""

    kind: str
    d_model: int
    cfgs: list[SaeConfig]
    objectives: list[Objective]
    optim: str
    dead: float
    """Share of latents that are dead."""
    bias: float
    """Added to b_enc: at ±10 all or none of the latents are positive."""
    chunk: int
    """Rows at a time."""
    group: int
    """Members at a time."""
    seed: int

    def bank(self, dtype=torch.float64, only: int | None = None) -> SaeBank:
        n = len(self.cfgs)
        members = range(n) if only is None else [only]
        bank = SaeBank(
            [self.cfgs[i] for i in members],
            [self.objectives[i] for i in members],
            [1e-2 * (i + 1) for i in members],
            [self.seed + i for i in members],
            self.d_model,
            optim=self.optim,
            dead_after=100,
            dtype=dtype,
        )
        # Drawn for all members, so that one of them alone gets the same.
        draw = torch.Generator().manual_seed(self.seed)
        b_enc, b_dec, chance = (
            torch.rand(n, width, generator=draw) for width in (bank.d_sae, self.d_model, bank.d_sae)
        )
        bank.params["b_enc"].add_(self.bias + 0.5 * b_enc[members])
        bank.params["b_dec"].add_(b_dec[members])
        bank.since_fired[chance[members] < self.dead] = 1000
        bank.n_tokens = 1000
        return bank

    def run(self, bank: SaeBank, x: torch.Tensor):
        """One step, cut as the problem says."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bank_module, "_CPU_CHUNK", 1)
            patch.setattr(bank_module, "_MIN_ROWS", self.chunk)
            patch.setattr(SaeBank, "_group_size", lambda bank, n_tokens: self.group)
            return bank.step(x)

    def batch(self, n: int, dtype=torch.float64) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1000)
        return torch.randn(n, self.d_model, dtype=dtype, generator=generator)


@st.composite
def problems(draw, max_members=3):
    kind = draw(st.sampled_from(KINDS))
    d_model, d_sae = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    cfgs, objectives = [], []
    for _ in range(draw(st.integers(1, max_members))):
        k = draw(st.integers(1, d_sae))
        activation = {
            "top-k": TopK(top_k=k),
            "batch-top-k": BatchTopK(top_k=k, threshold_momentum=k / 100),
            "relu": Relu(),
            "jump-relu": JumpRelu(init_l0=k),
        }[kind]
        cfgs.append(
            SaeConfig(
                d_sae=d_sae,
                activation=activation,
                normalize_w_dec=draw(st.booleans()),
                remove_parallel_grads=draw(st.booleans()),
            )
        )
        more = {"k_aux": draw(st.sampled_from([None, 1, 2, 5, 30])), "aux_coeff": 0.5}
        n_prefixes = draw(st.integers(0, min(d_sae, 5)))
        if n_prefixes:
            objectives.append(Matryoshka(n_prefixes=n_prefixes, **more))
        else:
            objectives.append(Vanilla(**more))
    sparse = kind in KINDS[:2]
    return Problem(
        kind,
        d_model,
        cfgs,
        objectives,
        optim=draw(st.sampled_from(["adam", "muon"])),
        dead=draw(st.sampled_from([0.0, 0.3, 1.0])),
        bias=draw(st.sampled_from([0.0, 0.0, 10.0, -10.0])),
        chunk=draw(st.integers(1, 12)),
        group=draw(st.integers(1, 3)) if sparse else 1,
        seed=draw(st.integers(0, 10**6)),
    )


SHAPES_OF_INPUT = {
    "random": lambda x: x,
    "zero": lambda x: x * 0,
    "equal rows": lambda x: x[:1].expand_as(x),
    "twice": lambda x: x[torch.arange(len(x)) // 2],
    "some zero rows": lambda x: x * (torch.arange(len(x)) % 3 > 0)[:, None],
    "one column": lambda x: x * (torch.arange(x.shape[1]) == 0),
}


@settings(properties, max_examples=80)
@given(problems(), st.integers(1, 12), st.sampled_from(sorted(SHAPES_OF_INPUT)))
def test_any_shape_trains_as_the_equations_say(problem, n_tokens, inputs):
    """One token, one latent, one dimension; k up to d_sae, fewer positive latents than k, none; no
    variance; chunks and groups that divide nothing."""
    bank = problem.bank()
    references = [Reference(bank, n) for n in range(len(bank))]
    x = SHAPES_OF_INPUT[inputs](problem.batch(n_tokens))
    for _ in range(2):
        found = problem.run(bank, x)
        want = [reference.step(x) for reference in references]
        assume(min(r.margin for r in references) > 1e-7)  # else any of the equal ones may be taken
        if not (x - x[0]).any():  # divided by what rounding makes of no variance
            found = found._replace(nmse=torch.zeros(len(bank)))
            want = [measured._replace(nmse=0.0) for measured in want]
        assert_same_metrics(found, want, rtol=1e-7)
        x = x.flip(1) * 1.1
    assert_same_state(bank, references, rtol=1e-6)


@properties
@given(problems(), st.integers(1, 12))
def test_a_member_has_the_same_bits_alone(problem, n_tokens):
    problem = problem._replace(group=1)  # as on a CPU
    x = problem.batch(n_tokens, torch.float32)
    together = problem.bank(torch.float32)
    measured = [problem.run(together, x) for _ in range(2)]
    for n in range(len(together)):
        alone = problem.bank(torch.float32, only=n)
        for want in measured:
            for field, value in problem.run(alone, x)._asdict().items():
                torch.testing.assert_close(
                    value[0], getattr(want, field)[n], rtol=0, atol=0, equal_nan=True
                )
        state = together.state_dict()
        for name, tensor in alone.state_dict().items():
            if name != "counters":
                assert torch.equal(tensor[0], state[name][n]), (n, name)


# --- Sizes that float32 cannot hold ----------------------------------------------------------


@settings(properties, max_examples=80)
@given(problems(), st.integers(1, 12), st.integers(-36, 30))
def test_numbers_of_any_size_are_right_or_seen_to_be_wrong(problem, n_tokens, exponent):
    """Overflow shows in the loss or in the gradient's norm, which training reports. Whatever is
    finite is right, but for what underflows."""
    scale = 10.0**exponent
    bank = problem._replace(dead=0.0).bank(torch.float32)
    bank.params["b_dec"].mul_(scale)
    bank.params["b_enc"].mul_(scale)
    references = [Reference(bank, n) for n in range(len(bank))]
    x = problem.batch(n_tokens, torch.float32) * scale
    found = problem.run(bank, x)
    want = [reference.step(x) for reference in references]
    seen = ~(found.loss.isfinite() & found.grad_norm.isfinite())
    assert all(found.loss.isnan() | found.loss.isposinf() | found.loss.isfinite())
    if exponent >= 25:
        assert seen.all()
    if -15 <= exponent <= 7:
        assert not seen.any()
    for n, reference in enumerate(references):
        if seen[n] or reference.margin < 1e-4 * scale:
            continue
        close = {"rel": 1e-3, "abs": 1e-36}
        for name in ("mse", "sparsity", "aux", "l0", "l1"):
            assert getattr(found, name)[n].item() == pytest.approx(getattr(want[n], name), **close)
        assert found.grad_norm[n].item() == pytest.approx(want[n].grad_norm, rel=1e-3, abs=1e-18)
        if n_tokens > 1 and exponent > -18:
            assert found.nmse[n].item() == pytest.approx(want[n].nmse, rel=1e-2)
        for name, p in bank.params.items():
            assert p[n].isfinite().all(), name


@pytest.mark.parametrize("exponent", [-17, 0, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_nmse_and_the_term_for_dead_latents_do_not_depend_on_the_unit(kind, exponent):
    """Both are ratios of squares, whose size in small units is far below 1e-30."""
    scale = 10.0**exponent
    activation = {
        "top-k": TopK(top_k=2),
        "batch-top-k": BatchTopK(top_k=2),
        "relu": Relu(),
        "jump-relu": JumpRelu(init_l0=3),
    }[kind]
    cfg = SaeConfig(d_sae=12, activation=activation)
    problem = Problem(kind, 6, [cfg], [Vanilla(k_aux=3)], "adam", 0.5, 0.0, 4, 1, 3)
    bank = problem.bank(torch.float32)
    bank.params["b_dec"].mul_(scale)
    bank.params["b_enc"].mul_(scale)
    if kind == "jump-relu":
        bank.params["log_threshold"].add_(math.log(scale))
    reference = Reference(bank, 0)
    x = problem.batch(9, torch.float32) * scale
    want = reference.gradients(x)
    assert reference.margin > 1e-5 * scale
    found = bank.compute_gradients(x)
    assert want.aux > 0
    assert found.aux.item() == pytest.approx(want.aux, rel=1e-4)
    assert found.nmse.item() == pytest.approx(want.nmse, rel=1e-4)
    assert_same_gradients(bank, [reference], rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_zeros_is_nothing_to_learn(kind):
    """Nothing is left over that dead latents could learn: 0/0 in their term of the loss."""
    activation = {
        "top-k": TopK(top_k=2), "batch-top-k": BatchTopK(top_k=2), "relu": Relu(),
        "jump-relu": JumpRelu(),
    }[kind]  # fmt: skip
    cfg = SaeConfig(d_sae=12, activation=activation)
    bank = SaeBank([cfg], [Vanilla(k_aux=3)], [0.1], [0], 6, dead_after=5)
    before = bank.state_dict()
    for _ in range(4):
        found = bank.step(torch.zeros(5, 6))
        assert found.loss.item() == found.grad_norm.item() == 0
    assert found.n_dead.item() == 12
    for name, p in bank.params.items():
        torch.testing.assert_close(p, before[name], rtol=0, atol=1e-6)


@settings(properties, max_examples=80)
@given(
    problems(),
    st.integers(1, 12),
    st.sampled_from(["x", "W_enc", "b_enc", "b_dec", "log_threshold"]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.integers(0, 10**6),
)
def test_what_is_not_finite_is_seen(problem, n_tokens, where, value, place):
    """Neither max, nor sort, nor a comparison hides it."""
    bank = problem.bank(torch.float32)
    x = problem.batch(n_tokens, torch.float32)
    if where == "x":
        x.view(-1)[place % x.numel()] = value
        members = list(range(len(bank)))
    else:
        assume(where in bank.params)
        assume(where != "W_enc" or (x != 0).any())
        # A latent that is never on is right to be off: only a bias or threshold of NaN is wrong.
        if where in ("b_enc", "log_threshold"):
            value = float("nan")
        param = bank.params[where]
        members = [place % len(bank)]
        member = param[members[0]].view(-1)
        member[place % member.numel()] = value
        if where == "W_enc" and value == value:
            x = x.abs() * -1 if value < 0 else x.abs()  # infinitely on, in either case
    found = problem.run(bank, x)
    seen = ~(found.loss.isfinite() & found.grad_norm.isfinite())
    assert seen.nonzero().flatten().tolist() == members


@pytest.mark.parametrize("wide", [1, 40])  # dense and sparse products of the inference stage
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["x", "W_enc"])
def test_an_sae_does_not_hide_what_is_not_a_number(kind, wide, where):
    activation = {
        "top-k": TopK(top_k=3), "batch-top-k": BatchTopK(top_k=3), "relu": Relu(),
        "jump-relu": JumpRelu(),
    }[kind]  # fmt: skip
    sae = SparseAutoencoder(SaeConfig(d_model=5, d_sae=12 * wide, activation=activation))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        x = torch.randn(6, 5, generator=generator)
        (x[2] if where == "x" else sae.W_enc[:, 7]).fill_(float("nan"))
        bad = torch.arange(6) == 2 if where == "x" else torch.ones(6, dtype=torch.bool)
        for x_hat in (sae(x).x_hat, encode(sae, x).x_hat):
            assert torch.equal(x_hat.isnan().all(1), bad)
            assert torch.equal(x_hat.isnan().any(1), bad)


# --- Selection -------------------------------------------------------------------------------


@properties
@given(st.data())
def test_ties_are_broken_but_what_is_selected_is_a_top_k(data):
    """Small integers: every product is exact, and most pre-activations have equals."""
    n_g, d_sae = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 6, 16, 60]))
    n_tokens, chunk = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    top_k = data.draw(st.lists(st.integers(1, d_sae), min_size=n_g, max_size=n_g))
    bf16, spread = data.draw(st.booleans()), data.draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))

    def integers(*shape):
        return torch.randint(-spread, spread + 1, shape, generator=generator).float()

    weights = Weights(
        integers(n_g, d_sae, 3), integers(n_g, d_sae), torch.zeros(n_g, d_sae, 3), torch.zeros(3)
    )
    x = integers(n_tokens, 3)
    z = torch.einsum("bd,gsd->gbs", x, weights.W_enc) + weights.b_enc[:, None]

    codes = top_k_codes(weights, x, top_k, chunk, bf16)
    f = densify(codes, n_g, n_tokens, d_sae)
    for g, k in enumerate(top_k):
        want = torch.relu(z[g].sort(descending=True).values[:, :k])
        assert torch.equal(f[g].sort(descending=True).values[:, :k], want)
        assert ((f[g] == 0) | (f[g] == z[g])).all()
        assert (f[g] > 0).sum(1).max() <= k

    theta = data.draw(st.sampled_from([0.0, 1.0, 3.0, 100.0, None]))
    if theta is None:  # as on a GPU
        codes, smallest = batch_top_k_without_waiting(weights, x, top_k, chunk, bf16)
    else:
        codes, smallest = batch_top_k_codes(
            weights, x, top_k, torch.full((n_g,), theta), chunk, bf16
        )
    f = densify(codes, n_g, n_tokens, d_sae)
    for g, k in enumerate(top_k):
        want = torch.relu(z[g].flatten().sort(descending=True).values[: k * n_tokens])
        assert torch.equal(f[g].flatten().sort(descending=True).values[: k * n_tokens], want)
        assert ((f[g] == 0) | (f[g] == z[g])).all()
        assert (f[g] > 0).sum() <= k * n_tokens
        least = want[want > 0].min().item() if (want > 0).any() else float("nan")
        assert smallest[g].item() == pytest.approx(least, nan_ok=True)


def densify(codes, n_g, n_tokens, d_sae):
    """Codes as [g, token, latent]; checks what the gradients take for granted of them."""
    dense = torch.zeros(n_g, n_tokens, d_sae)
    ptr = codes.row_ptr.tolist()
    assert len(ptr) == n_g * n_tokens + 1
    assert (ptr[0], ptr[-1]) == (0, len(codes.values))
    for row, (a, b) in enumerate(itertools.pairwise(ptr)):
        g, token = divmod(row, n_tokens)
        latents = codes.latents[a:b].long() - g * d_sae
        assert (latents.diff() > 0).all()
        dense[g, token, latents] = codes.values[a:b]
    return dense


@properties
@given(st.data())
def test_the_two_stage_selection_is_a_top_k(data):
    """Of values of which many are equal, and some are infinite or not numbers."""
    n = data.draw(st.sampled_from([1, 2, 12, 60, 61, 96, 256]))
    k = data.draw(st.integers(1, n))
    values = st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.5, float("inf"), float("-inf"), float("nan")])
    z = torch.tensor(data.draw(st.lists(values, min_size=2 * n, max_size=2 * n))).view(2, n)
    z = z.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    for ordered in (True, False):
        top, indices = largest(z, k, ordered=ordered)
        want = z.topk(k).values
        if not ordered:
            top = top.sort(descending=True).values
        torch.testing.assert_close(top, want, rtol=0, atol=0, equal_nan=True)
        picked = z.gather(1, indices).sort(descending=True).values
        torch.testing.assert_close(picked, want, rtol=0, atol=0, equal_nan=True)
        assert all(len(row.unique()) == k for row in indices)
