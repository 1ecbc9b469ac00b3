"""The bank's hand-written gradients against autograd on the loss as its equations state it."""

import pytest
import torch

from saev.config import BatchTopK, JumpRelu, Matryoshka, Relu, SaeConfig, TopK, Vanilla
from saev.nn import SaeBank

D, S, B = 10, 24, 37
GRADS = ("W_enc", "b_enc", "W_dec", "b_dec")


class RectangleJumpRelu(torch.autograd.Function):
    """JumpReLU and its pseudo-derivatives, typed from the paper (arXiv:2407.14435, eqs. 8, 11)."""

    @staticmethod
    def forward(ctx, z, theta, eps):
        ctx.save_for_backward(z, theta)
        ctx.eps = eps
        return z * (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        z, theta = ctx.saved_tensors
        u = (z - theta) / ctx.eps
        kernel = ((u > -0.5) & (u < 0.5)).to(z.dtype)
        d_theta = (grad * (-theta / ctx.eps) * kernel).sum(0)
        return grad * (z > theta).to(z.dtype), d_theta, None


class RectangleStep(torch.autograd.Function):
    """Heaviside step with its pseudo-derivative (eq. 12)."""

    @staticmethod
    def forward(ctx, z, theta, eps):
        ctx.save_for_backward(z, theta)
        ctx.eps = eps
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        z, theta = ctx.saved_tensors
        u = (z - theta) / ctx.eps
        kernel = ((u > -0.5) & (u < 0.5)).to(z.dtype)
        return None, (grad * (-1 / ctx.eps) * kernel).sum(0), None


def reference(act, objective, params, x, prefixes, dead, coeff):
    """Loss terms with autograd, dense, one member. Nothing of saev.nn is used."""
    n_tokens = x.shape[0]
    z = x @ params["W_enc"].T + params["b_enc"]
    sparsity = torch.zeros((), dtype=x.dtype)
    if act.kind == "relu":
        f = torch.relu(z)
        sparsity = coeff * f.abs().sum() / n_tokens
    elif act.kind == "top-k":
        kth = z.sort(dim=1, descending=True).values[:, act.top_k - 1 : act.top_k]
        f = torch.relu(z) * (z >= kth)
    elif act.kind == "batch-top-k":
        kth = z.flatten().sort(descending=True).values[act.top_k * n_tokens - 1]
        f = torch.relu(z) * (z >= kth)
    else:
        theta = params["log_threshold"].exp()
        f = RectangleJumpRelu.apply(z, theta, act.bandwidth)
        sparsity = coeff * RectangleStep.apply(z, theta, act.bandwidth).sum() / n_tokens
    mse = torch.zeros((), dtype=x.dtype)
    for p in prefixes:
        x_hat = f[:, :p] @ params["W_dec"][:p] + params["b_dec"]
        mse = mse + (x - x_hat).square().mean() / len(prefixes)
    aux = torch.zeros((), dtype=x.dtype)
    if dead is not None and dead.any():
        e = (x - f @ params["W_dec"] - params["b_dec"]).detach()
        k_aux = objective.k_aux
        n_dead = int(dead.sum())
        masked = z.masked_fill(~dead, -torch.inf)
        top = masked.topk(min(k_aux, n_dead), dim=1).indices
        picked = torch.zeros_like(z).scatter(1, top, 1.0)
        e_hat = (z * picked) @ params["W_dec"]
        variance = (x - x.mean(0)).square().mean()
        ratio = (e - e_hat).square().sum() / e.square().sum()
        aux = objective.aux_coeff * min(n_dead / k_aux, 1) * variance * ratio
    return mse, sparsity, aux, f


ACTIVATIONS = [
    Relu(),
    TopK(top_k=4),
    BatchTopK(top_k=4),
    JumpRelu(init_threshold=0.3, bandwidth=0.4),
]
OBJECTIVES = [
    Vanilla(sparsity_coeff=0.07, k_aux=3),
    Matryoshka(sparsity_coeff=0.07, n_prefixes=5, k_aux=6),
]


def make_bank(act, objectives, **kwargs):
    n = len(objectives)
    acts = act if isinstance(act, list) else [act] * n
    cfgs = [
        SaeConfig(d_sae=S, activation=a, reinit_blend=0.8, remove_parallel_grads=False)
        for a in acts
    ]
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(200, D, generator=generator) + 0.5
    options = {"dtype": torch.float64, "data": data, "dead_after": 100} | kwargs
    return SaeBank(cfgs, objectives, [1e-3] * n, list(range(n)), D, **options)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, dtype=torch.float64, generator=generator) + 0.5


@pytest.mark.parametrize("n_dead", [0, 2, 9])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.kind)
@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: a.kind)
def test_gradients_equal_autograd_on_the_equations(act, objective, n_dead, monkeypatch):
    bank = make_bank(act, [objective, objective])
    seen = []
    import saev.nn.bank as bank_module

    draw = bank_module.draw_prefixes

    def spy(*args):
        seen.append(draw(*args))
        return seen[-1]

    monkeypatch.setattr(bank_module, "draw_prefixes", spy)
    bank.n_tokens = 1000  # so that a latent may count as dead
    dead = torch.zeros(2, S, dtype=torch.bool)
    dead[0, torch.randperm(S, generator=torch.Generator().manual_seed(1))[:n_dead]] = True
    bank.since_fired[dead] = 1000
    x = batch()
    metrics = bank.compute_gradients(x, sparsity_factor=0.5)
    prefixes = torch.cat([p.lengths for p in seen])
    for n in range(2):
        params = {k: p[n].clone().requires_grad_() for k, p in bank.params.items()}
        coeff = objective.sparsity_coeff * 0.5
        mse, sparsity, aux, f = reference(
            act, objective, params, x, prefixes[n].tolist(), dead[n], coeff
        )
        (mse + sparsity + aux).backward()
        for name, param in params.items():
            want = param.grad
            torch.testing.assert_close(bank.grads[name][n], want, rtol=1e-9, atol=1e-12)
            assert want.abs().max() > 0, name
        for found, want in ((metrics.mse, mse), (metrics.sparsity, sparsity), (metrics.aux, aux)):
            torch.testing.assert_close(found[n], want.detach(), rtol=1e-9, atol=1e-12)
        assert (aux > 0) == (n == 0 and n_dead > 0)
        torch.testing.assert_close(metrics.l0[n], (f > 0).double().sum(1).mean())
        torch.testing.assert_close(metrics.l1[n], f.detach().sum(1).mean())
        x_hat = f @ params["W_dec"] + params["b_dec"]
        nmse = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        torch.testing.assert_close(metrics.nmse[n], nmse.detach())
        norm = torch.stack([p.grad.square().sum() for p in params.values()]).sum().sqrt()
        torch.testing.assert_close(metrics.grad_norm[n], norm)


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: a.kind)
def test_gradients_do_not_depend_on_how_rows_are_chunked(act, monkeypatch):
    import saev.nn.bank as bank_module

    whole = make_bank(act, OBJECTIVES)
    whole.compute_gradients(batch())
    monkeypatch.setattr(bank_module, "_CPU_CHUNK", 1)
    monkeypatch.setattr(bank_module, "_MIN_ROWS", 5)
    cut = make_bank(act, OBJECTIVES)
    cut.compute_gradients(batch())
    for name, grad in whole.grads.items():
        torch.testing.assert_close(cut.grads[name], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("act", [TopK, BatchTopK])
def test_one_wide_product_for_a_group_of_members_gives_the_same(act, monkeypatch):
    """What a GPU does: members with different k and objectives share an encoder product."""
    acts = [act(top_k=3), act(top_k=5), act(top_k=4)]
    objectives = [Vanilla(), Matryoshka(n_prefixes=5), Matryoshka(n_prefixes=3)]
    one_by_one = make_bank(acts, objectives)
    one_by_one.compute_gradients(batch())
    monkeypatch.setattr(SaeBank, "_group_size", lambda self, n_tokens: 2)
    grouped = make_bank(acts, objectives)
    metrics = grouped.compute_gradients(batch())
    for name, grad in one_by_one.grads.items():
        torch.testing.assert_close(grouped.grads[name], grad, rtol=1e-9, atol=1e-12)
    assert metrics.l0.tolist() == pytest.approx([3, 5, 4], abs=0.5)


def test_aux_does_not_add_the_decoder_bias_and_leaves_it_alone():
    objective = Vanilla(k_aux=4, aux_coeff=1.0)
    with_aux = make_bank(TopK(top_k=3), [objective])
    without = make_bank(TopK(top_k=3), [objective.model_copy(update={"aux_coeff": 0.0})])
    for bank in (with_aux, without):
        bank.params["b_dec"] += 3.0
        bank.n_tokens = 1000
        bank.since_fired[0, :6] = 1000
        metrics = bank.compute_gradients(batch())
    assert with_aux.grads["b_dec"].equal(without.grads["b_dec"])
    alive = torch.arange(S) >= 6
    for name in ("W_enc", "b_enc", "W_dec"):
        same = (with_aux.grads[name] == without.grads[name])[0]
        assert same[alive].all()
        assert not same[~alive].all()
    assert metrics.aux.item() == 0


def test_parallel_part_of_decoder_gradients_is_removed_only_where_asked():
    x = batch()
    kept = make_bank(TopK(top_k=4), [Vanilla()])
    kept.compute_gradients(x)
    cfgs = [SaeConfig(d_sae=S, activation=TopK(top_k=4))]
    removed = SaeBank(cfgs, [Vanilla()], [1e-3], [0], D, dtype=torch.float64)
    for name, p in kept.params.items():
        removed.params[name].copy_(p)
    removed.compute_gradients(x)
    w, g = kept.params["W_dec"][0], kept.grads["W_dec"][0]
    along = (w * g).sum(1)
    assert along.abs().max() > 1e-4
    want = g - along[:, None] * w / (w * w).sum(1, keepdim=True)
    torch.testing.assert_close(removed.grads["W_dec"][0], want)
    assert (removed.grads["W_dec"][0] * w).sum(1).abs().max() < 1e-12
