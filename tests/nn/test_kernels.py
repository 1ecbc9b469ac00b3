"""Each kernel beside the lines of torch that it stands for: values and gradients, in float64."""

import itertools

import pytest
import torch

from saev.nn import activations
from saev.nn.kernels import dense, errors, sparse

D = 5


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def same(kernel, plain, inputs: list[torch.Tensor], n_out: int) -> None:
    """Compare the first outputs of two functions, and their gradients for random weights."""
    found, want = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    outputs = kernel(*found)[:n_out], plain(*want)[:n_out]
    for side in outputs:
        sum((o * rows(*o.shape, seed=i + 7)).sum() for i, o in enumerate(side)).backward()
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach())
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("n", [7, 0])
@pytest.mark.parametrize("cuts", [[12], [3, 12], [1, 4, 9, 12]])
def test_dense_decoder(cuts: list[int], n: int) -> None:
    def plain(f, w):
        parts = [f[:, a:b] @ w[a:b] for a, b in itertools.pairwise([0, *cuts])]
        return (torch.stack(parts, dim=1).flatten(0, 1),)

    same(
        lambda f, w: (dense.decode_blocks(f, w, cuts, False),), plain, [rows(7, 12), rows(12, D)], 1
    )


@pytest.mark.parametrize("n_prefixes", [1, 3])
@pytest.mark.parametrize("n_members", [1, 2])
@pytest.mark.parametrize("n", [7, 0])
def test_nested_errors(n: int, n_members: int, n_prefixes: int) -> None:
    x, shape = rows(n, D, seed=3), (n_members, n, n_prefixes, D)

    def kernel(blocks, b_dec):
        return errors.nested_errors(blocks.clone(), b_dec, x, n_prefixes)

    def plain(blocks, b_dec):
        x_hats = blocks.view(shape).cumsum(2) + b_dec[:, None, None]
        missing = x[:, None] - x_hats
        return missing.square().sum((1, 3)), missing[:, :, -1]

    blocks, b_dec = rows(n_members * n * n_prefixes, D), rows(n_members, D, seed=1)
    same(kernel, plain, [blocks, b_dec], 1)
    residual = kernel(blocks, b_dec).residual
    torch.testing.assert_close(residual, plain(blocks, b_dec)[1])
    assert not residual.requires_grad


def test_squared_error() -> None:
    same(lambda r: (errors.squared_error(r),), lambda r: (r.square().sum(),), [rows(9, D)], 1)
    zero = torch.zeros(3, D, dtype=torch.float64, requires_grad=True)
    errors.squared_error(zero).backward()
    assert (zero.grad == 0).all()  # a norm's derivative is not a number there


def decoded(act: dense.Activated, w: torch.Tensor) -> torch.Tensor:
    return dense.decode_blocks(act.f, w, [len(w)], False)


@pytest.fixture(params=[1, 1 << 20], ids=["tiles of 8 rows", "one tile"])
def tiles(request, monkeypatch) -> None:
    monkeypatch.setattr(dense, "_TILE_BYTES", request.param)


@pytest.mark.usefixtures("tiles")
def test_relu_and_its_l1() -> None:
    w = rows(12, D, seed=2)

    def kernel(z, bias):
        act = dense.relu(z.clone(), bias)
        torch.testing.assert_close(act.l0, (z + bias > 0).double().sum(0))
        return decoded(act, w), act.l1

    def plain(z, bias):
        f = activations.relu(z + bias)
        return f @ w, f.sum(0)

    same(kernel, plain, [rows(40, 12), rows(12, seed=1)], 2)


@pytest.mark.usefixtures("tiles")
def test_jump_relu_and_its_l0() -> None:
    """The plain functions have the pseudo-derivatives by θ; autograd makes them those by ln θ."""
    w, width = rows(12, D, seed=2), 0.8

    def kernel(z, bias, log_theta):
        act = dense.jump_relu(z.clone(), bias, log_theta, width)
        torch.testing.assert_close(act.l1, ((z + bias) * (z + bias > log_theta.exp())).sum(0))
        return decoded(act, w), act.l0

    def plain(z, bias, log_theta):
        z, theta = z + bias, log_theta.exp()
        f = activations.jump_relu(z, theta, width)
        return f @ w, activations.step(z, theta, width).sum(0)

    z, bias, log_theta = rows(40, 12), rows(12, seed=3), 0.3 * rows(12, seed=1) - 1
    near = activations.rectangle(z + bias, log_theta.exp(), width)
    assert 0 < near.sum() < z.numel()
    same(kernel, plain, [z, bias, log_theta], 2)


LENGTHS = {1: [[12], [12]], 3: [[2, 7, 12], [5, 12, 12]]}


@pytest.mark.parametrize("n_members", [1, 2])
@pytest.mark.parametrize("n_prefixes", [1, 3])
def test_sparse_step(n_prefixes: int, n_members: int) -> None:
    """Decoder, errors, and the gradients of all weights, against autograd with dense latents."""
    n, d_sae, k = 7, 12, 3
    x, b_dec = rows(n, D, seed=4), rows(n_members, D, seed=3)
    lengths = torch.tensor(LENGTHS[n_prefixes][:n_members])
    weights = rows(n_members, n_prefixes, seed=5).square()
    params = [rows(n_members, d_sae, D), rows(n_members, d_sae, seed=1), rows(n_members, d_sae, D)]
    w_enc, b_enc, w_dec, b_dec = (t.clone().requires_grad_() for t in (*params, b_dec))

    z = (
        torch.einsum("cd,gsd->gcs", x, w_enc) + b_enc[:, None] - 1.0
    )  # so that some of the k are off
    latents = z.detach().topk(k, dim=-1).indices.sort(-1).values
    f = torch.zeros_like(z).scatter(-1, latents, z.gather(-1, latents).relu())
    errors = torch.stack(
        [(f * (torch.arange(d_sae) < ends[:, None, None])) @ w_dec + b_dec[:, None] - x
         for ends in lengths.T], dim=2,
    )  # fmt: skip
    squares = errors.square().sum(-1)
    (squares * weights[:, None]).sum().backward()

    values = f.detach().gather(-1, latents)
    assert (values == 0).any()
    offset = torch.arange(n_members)[:, None, None] * d_sae
    ptr = torch.arange(n_members * n + 1, dtype=torch.int32) * k
    codes = sparse.Codes(values.flatten(), (latents + offset).flatten().to(torch.int32), ptr)
    with torch.no_grad():
        table = w_dec.flatten(0, 1)
        found = sparse.decode(codes, table, b_dec, x, lengths, weights, residual=True)
    torch.testing.assert_close(found.errors, squares.detach().flatten(0, 1))
    torch.testing.assert_close(found.residual, -errors[:, :, -1].detach().flatten(0, 1))
    of_first = found.grads[:, 0].view(n_members, n, D)
    torch.testing.assert_close(of_first.sum(1), b_dec.grad)
    grouped = sparse.group_by_latent(codes.latents, n_members * d_sae)
    grads = [torch.ones_like(table), torch.ones_like(table)]
    used = sparse.add_bags(grads[0], found.grads.flatten(0, 1), grouped, found.source, codes.values)
    encoded = sparse.add_bags(grads[1], x, grouped, found.source, found.grad_values, n_prefixes)
    for grad, leaf in zip(grads, (w_dec, w_enc), strict=True):
        torch.testing.assert_close(grad - 1, leaf.grad.flatten(0, 1))
    torch.testing.assert_close(encoded.weights, b_enc.grad.flatten())
    torch.testing.assert_close(used.weights, f.detach().sum(1).flatten())
    torch.testing.assert_close(used.n_positive, (f > 0).double().sum(1).flatten())


@pytest.mark.parametrize("ends", [[0, 4, 9], [0, 0, 2, 9, 9]])
def test_sums_of_bags(ends: list[int]) -> None:
    latents = torch.tensor([0, 3, 5, 1, 4, 2, 3, 4, 5], dtype=torch.int32)
    values, table = rows(9), rows(6, D)
    want = [(values[a:b, None] * table[latents[a:b].long()]).sum(0) for a, b in
            itertools.pairwise(ends)]  # fmt: skip
    found = sparse.sum_bags(table, latents, values, torch.tensor(ends, dtype=torch.int32))
    torch.testing.assert_close(found, torch.stack(want))
