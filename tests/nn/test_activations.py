"""Activation functions, sparse decoding and objectives beside their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saev.config import BatchTopK, JumpRelu, Matryoshka, Relu, SaeConfig, TopK, Vanilla
from saev.errors import ConfigError
from saev.nn import activations, objectives
from saev.nn.encode import largest
from saev.nn.init import initial_weights, least_error_scale
from saev.nn.kernels import sparse
from saev.nn.sae import SparseAutoencoder


def test_top_k_keeps_the_largest_and_rectifies_after_selection():
    z = torch.tensor([[3.0, -1.0, 2.0, 5.0], [-4.0, -1.0, -2.0, 0.5]])
    assert activations.top_k(z, 2).tolist() == [[3, 0, 0, 5], [0, 0, 0, 0.5]]
    assert activations.top_k(z, 2, rectify=False).tolist() == [[3, 0, 0, 5], [0, -1, 0, 0.5]]
    assert activations.top_k(z, 4).tolist() == [[3, 0, 2, 5], [0, 0, 0, 0.5]]


def test_batch_top_k_shares_its_budget_among_tokens():
    z = torch.tensor([[9.0, 8.0, 7.0], [1.0, 0.5, -3.0], [2.0, -1.0, 0.1]])
    want = [[9.0, 8.0, 7.0], [1.0, 0.5, 0.0], [2.0, 0.0, 0.0]]
    torch.testing.assert_close(activations.batch_top_k(z, 2), torch.tensor(want))
    assert activations.batch_top_k(z, 3).min() == 0


@pytest.mark.parametrize(("n", "k"), [(1536, 32), (60, 4), (61, 4), (30, 30), (2048, 1), (96, 8)])
def test_the_two_stage_selection_is_topk(n, k):
    z = torch.randn(3, 7, n, generator=torch.Generator().manual_seed(n)).transpose(0, 1)
    want = z.topk(k, dim=-1)
    values, indices = largest(z, k, ordered=True)
    assert torch.equal(values, want.values)
    assert torch.equal(indices, want.indices)
    values, indices = largest(z, k, ordered=False)
    assert torch.equal(indices.sort(-1).values, want.indices.sort(-1).values)
    assert torch.equal(z.gather(-1, indices), values)


def test_threshold_is_strict():
    z = torch.tensor([0.5, 0.50001, -1.0])
    assert activations.threshold(z, torch.tensor(0.5)).tolist() == pytest.approx([0, 0.50001, 0])


def test_jump_relu_pseudo_derivatives_by_hand():
    """θ = 1, ε = 0.5: z in (0.75, 1.25) is under the kernel."""
    z = torch.tensor([[0.7], [0.8], [1.2], [1.3]], requires_grad=True)
    theta = torch.tensor([1.0], requires_grad=True)
    out = activations.jump_relu(z, theta, 0.5)
    assert out.flatten().tolist() == pytest.approx([0, 0, 1.2, 1.3])
    (out * torch.tensor([[1.0], [10.0], [100.0], [1000.0]])).sum().backward()
    assert z.grad.flatten().tolist() == [0, 0, 100, 1000]
    assert theta.grad.item() == pytest.approx(-(1.0 / 0.5) * (10 + 100))

    z.grad = theta.grad = None
    steps = activations.step(z, theta, 0.5)
    assert steps.flatten().tolist() == [0, 0, 1, 1]
    (steps * torch.tensor([[1.0], [10.0], [100.0], [1000.0]])).sum().backward()
    assert z.grad is None
    assert theta.grad.item() == pytest.approx(-(1 / 0.5) * (10 + 100))


def test_l0_pseudo_derivative_estimates_the_true_one():
    """E over z of the pseudo-derivative is the derivative of the expected L0, -p(θ)."""
    z = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    theta = torch.tensor([0.6], requires_grad=True)
    activations.step(z, theta, 0.1).mean().backward()
    density = math.exp(-0.5 * 0.6**2) / math.sqrt(2 * math.pi)
    assert theta.grad.item() == pytest.approx(-density, rel=0.02)


# --- Sparse codes ----------------------------------------------------------------------------


def random_codes(n_rows, d_sae, generator):
    dense = torch.rand(n_rows, d_sae, dtype=torch.float64, generator=generator)
    dense = dense * (torch.rand(n_rows, d_sae, generator=generator) < 0.3)
    dense[n_rows // 2] = 0  # an empty row
    rows, latents = dense.nonzero(as_tuple=True)
    ptr = torch.searchsorted(rows, torch.arange(n_rows + 1), out_int32=True)
    return dense, sparse.Codes(dense[rows, latents], latents.to(torch.int32), ptr)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 1000))
def test_sparse_sums_and_their_gradients_equal_dense_ones(n_rows, d_sae, seed):
    """The loss ‖f·W - x‖², with rows that have no latents."""
    generator = torch.Generator().manual_seed(seed)
    dense, codes = random_codes(n_rows, d_sae, generator)
    w, x = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (d_sae, n_rows))
    w_dense, f_dense = w.clone().requires_grad_(), dense.clone().requires_grad_()
    (f_dense @ w_dense - x).square().sum().backward()
    one = torch.ones(1, 1, dtype=torch.float64)
    out = sparse.decode(codes, w, 0 * x[:1], x, one.long() * d_sae, one, residual=False)
    torch.testing.assert_close(out.errors[:, 0], (dense @ w - x).square().sum(1))
    torch.testing.assert_close(out.grad_values, f_dense.grad[dense != 0])
    grad = torch.zeros_like(w)
    grouped = sparse.group_by_latent(codes.latents, d_sae)
    sparse.add_bags(grad, out.grads[:, 0], grouped, out.source, codes.values)
    torch.testing.assert_close(grad, w_dense.grad)


def test_rows_of_codes_are_those_rows():
    dense, codes = random_codes(9, 12, torch.Generator().manual_seed(1))
    w = torch.eye(12, dtype=torch.float64)
    for start, stop in [(0, 9), (0, 4), (3, 7), (4, 5), (8, 9)]:
        own = codes.rows(start, stop)
        found = sparse.sum_bags(w, own.latents, own.values, own.row_ptr)
        assert torch.equal(found, dense[start:stop])


# --- Objectives ------------------------------------------------------------------------------


def test_prefix_lengths_follow_the_pareto_distribution():
    """One prefix besides the last: frequencies against P(length ≥ l) ∝ l^-α - d_sae^-α."""
    d_sae, alpha, n = 12, 0.5, 20_000
    probabilities = objectives.prefix_probabilities(d_sae, alpha)
    generator = torch.Generator().manual_seed(0)
    draws = [objectives.sample_prefixes(probabilities, 2, generator)[0].item() for _ in range(n)]
    counts = np.bincount(draws, minlength=d_sae + 1)
    assert counts[0] == counts[d_sae] == 0
    tail = np.arange(1, d_sae + 1) ** -alpha - d_sae**-alpha
    want = n * (tail[:-1] - tail[1:]) / tail[0]
    chi2 = ((counts[1:d_sae] - want) ** 2 / want).sum()
    assert chi2 < 31.3  # 0.999 quantile for 10 degrees of freedom


def test_every_prefix_length_can_be_drawn():
    probabilities = objectives.prefix_probabilities(9, 0.5)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(500):
        prefixes = objectives.sample_prefixes(probabilities, 3, generator).tolist()
        assert prefixes == sorted(set(prefixes))
        assert len(prefixes) == 3
        assert prefixes[-1] == 9
        seen.update(prefixes)
    assert seen == set(range(1, 10))
    all_of_them = objectives.sample_prefixes(probabilities, 9, generator).tolist()
    assert all_of_them == list(range(1, 10))


def test_as_many_prefixes_as_latents_at_most():
    assert objectives.n_prefixes(Vanilla(), 4) == 1
    assert objectives.n_prefixes(Matryoshka(n_prefixes=4), 4) == 4
    with pytest.raises(ConfigError, match=r"n_prefixes is 5.*only 4"):
        objectives.n_prefixes(Matryoshka(n_prefixes=5), 4)


@pytest.mark.parametrize(
    ("d_model", "k_aux"), [(2, 1), (384, 128), (512, 256), (768, 256), (1023, 256), (4096, 512)]
)
def test_default_k_aux_is_half_the_width_as_a_power_of_two(d_model, k_aux):
    assert objectives.default_k_aux(d_model) == k_aux


# --- Initialisation --------------------------------------------------------------------------


@pytest.mark.parametrize("act", [TopK(top_k=3), BatchTopK(top_k=3), Relu()])
def test_the_initial_encoder_scale_has_the_least_error(act):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=generator)
    cfg = SaeConfig(d_model=8, d_sae=20, activation=act)
    w_dec = torch.nn.functional.normalize(torch.randn(20, 8, generator=generator), dim=1)
    best = least_error_scale(cfg, x, w_dec)

    def error(scale):
        z = x @ w_dec.T * scale
        f = {
            "top-k": lambda: activations.top_k(z, 3),
            "batch-top-k": lambda: activations.batch_top_k(z, 3),
            "relu": lambda: torch.relu(z),
        }[act.kind]()
        return (x - f @ w_dec).double().square().sum().item()

    assert error(best) < error(best * 1.02)
    assert error(best) < error(best * 0.98)


def test_data_point_initialisation_blends_centred_activations():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(50, 8, generator=generator) + 4.0
    cfg = SaeConfig(d_model=8, d_sae=20, activation=TopK(top_k=3), reinit_blend=1.0)
    w = initial_weights(cfg, data, torch.Generator().manual_seed(1))
    centred = torch.nn.functional.normalize(data - data.mean(0), dim=1)
    assert (w.W_dec @ centred.T).max(1).values.min() > 1 - 1e-5  # every row is a data point
    assert torch.allclose(w.W_dec.norm(dim=1), torch.ones(20))
    scale = w.W_enc.norm() / w.W_dec.norm()
    assert torch.allclose(w.W_enc, scale * w.W_dec, atol=1e-6)
    assert torch.allclose(w.b_dec, data.mean(0))
    z = data @ w.W_enc.T + w.b_enc
    assert torch.allclose(z, (data - data.mean(0)) @ w.W_enc.T, atol=1e-4)

    blended = initial_weights(
        cfg.model_copy(update={"reinit_blend": 0.8}), data, torch.Generator().manual_seed(1)
    )
    overlap = (blended.W_dec * w.W_dec).sum(1)
    assert overlap.min() > 0.8
    assert overlap.max() < 0.9999
    noise = initial_weights(
        cfg.model_copy(update={"reinit_blend": 0.0}), data, torch.Generator().manual_seed(1)
    )
    assert (noise.W_dec * w.W_dec).sum(1).abs().mean() < 0.5


def test_initialisation_without_data_or_with_few_points():
    cfg = SaeConfig(d_model=8, d_sae=20, activation=JumpRelu(init_l0=2))
    plain = initial_weights(cfg, None, torch.Generator().manual_seed(1))
    assert torch.equal(plain.W_enc, plain.W_dec)
    assert not plain.b_dec.any()
    assert not plain.b_enc.any()
    assert plain.log_threshold.unique().shape == (1,)
    few = initial_weights(cfg, torch.randn(3, 8), torch.Generator().manual_seed(1))
    assert torch.unique(few.W_dec, dim=0).shape[0] == 20
    with pytest.raises(ConfigError, match=r"\[0, 8\]"):
        initial_weights(cfg, torch.zeros(0, 8), torch.Generator())


def test_an_sae_encodes_numpy_arrays_too_and_says_what_else_it_takes():
    cfg = SaeConfig(d_model=8, d_sae=20, activation=Relu())
    w = initial_weights(cfg, None, torch.Generator().manual_seed(1))
    tensors = {"W_enc": w.W_enc.T, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    sae = SparseAutoencoder.from_tensors(cfg, tensors)
    x = np.random.default_rng(0).standard_normal((3, 5, 8))
    want = sae.encode(torch.from_numpy(x)).acts
    assert want.any()
    for array in (x, x[:, ::-1][:, ::-1], x.astype(">f8")):
        assert torch.equal(sae.encode(array).acts, want)
        assert torch.equal(sae(array).x_hat, sae(torch.from_numpy(x)).x_hat)
    for wrong, found in ((x.astype(np.int64), "int64"), (x.tolist(), "list"), (None, "NoneType")):
        with pytest.raises(ConfigError, match=f"a torch tensor or a NumPy array.*found {found}"):
            sae.encode(wrong)
    with pytest.raises(ConfigError, match=r"width 8, these have 7"):
        sae.encode(x[..., 1:])
