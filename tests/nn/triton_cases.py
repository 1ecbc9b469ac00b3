"""Triton's kernels beside their references, in Triton's interpreter: run by test_triton.py.

The interpreter has to be chosen before the kernels are imported, so this is a process of its own.
"""

import pytest
import torch

from saev.config import BatchTopK, Matryoshka, SaeConfig, TopK, Vanilla
from saev.nn import SaeBank, aux_k
from saev.nn.kernels import choice, sparse
from saev.nn.kernels.choice import Shape, why_not
from saev.nn.kernels.sparse import Codes, group_by_latent
from saev.nn.kernels.triton import bags, decode, select, upkeep

NAN, INF = float("nan"), float("inf")


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def close(found, want) -> None:
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize(
    ("most", "top_k", "dtype"),
    [
        (20, [3, 3], torch.float32),
        (20, [5, 2], torch.float16),
        (10, [3, 3], torch.bfloat16),
        (10, [5, 2], torch.float32),
    ],
    ids=str,
)
def test_selection(most, top_k, dtype, monkeypatch) -> None:
    """Of few different values, so that ties decide; a row that is cut into pieces, too."""
    monkeypatch.setattr(select, "MOST_LATENTS", most)
    d_sae = 20
    assert select.supports(d_sae, 5)
    z = (normal(4, 2, d_sae) * 2).round() / 2
    z[0, 0] = torch.tensor([0.0, -0.0] * (d_sae // 2))
    z[1, 0] = -1.0
    z[1, 1, 3:] = INF
    z[2, 0, 4], z[2, 1, :4] = NAN, -INF
    z[3, 0] = torch.linspace(-6e-8, 6e-8, d_sae)  # subnormal float16
    z, ks = z.to(dtype), torch.tensor(top_k, dtype=torch.int32)
    same, k = top_k[0] == top_k[1], max(top_k)
    found = select.top_k(z, ks, k, same=same)
    values, order = z.transpose(0, 1).float().sort(dim=-1, descending=True, stable=True)
    for g, own in enumerate(top_k):
        for row in range(len(z)):
            best = {int(i): float(v) for i, v in zip(order[g, row], values[g, row], strict=True)}
            kept = list(best)[:own]
            want = {i: max(best[i], 0.0) if i in kept else 0.0 for i in sorted(list(best)[:k])}
            assert (found[1][g, row] - g * d_sae).tolist() == list(want)
            close([found[0][g, row]], [torch.tensor([*want.values()])])
    reference = select.top_k_reference(z, ks, k, same=same)
    close(found, reference)


def some_codes(n_tokens: int, d_sae: int, k: int) -> Codes:
    """Of two members; some values are 0, and some rows have fewer codes than others."""
    ks = torch.tensor([k, k], dtype=torch.int32)
    values, latents = select.top_k_reference(
        normal(n_tokens, 2, d_sae, seed=1) - 0.5, ks, k, same=True
    )
    kept = torch.arange(k) < torch.tensor([k, 0, 1, 3, k - 1, k] * 2)[: 2 * n_tokens, None]
    ptr = torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).to(torch.int32)
    return Codes(values.flatten(0, 1)[kept], latents.flatten(0, 1)[kept], ptr)


LENGTHS = {1: [[12], [12]], 3: [[2, 7, 12], [5, 12, 12]]}


@pytest.mark.parametrize(
    ("n_p", "dtype"), [(1, torch.float32), (3, torch.float16), (3, torch.bfloat16)], ids=str
)
def test_decoder(n_p: int, dtype: torch.dtype) -> None:
    codes, x = some_codes(6, 12, 7), normal(6, 5)
    assert (codes.values == 0).any()
    b_dec = normal(2, 5, seed=3)
    table = normal(24, 5, seed=4).to(dtype)
    weights = normal(2, n_p, seed=5).square()
    rest = (b_dec, x, torch.tensor(LENGTHS[n_p]), weights)
    residual = n_p == 3
    found = decode.decode(codes, table, *rest, residual=residual)
    want = sparse.decode(codes, table.float(), *rest, residual=residual)
    assert found.source.equal(want.source)
    entries = found.source.long()
    close([found.errors, found.grad_values], [want.errors, want.grad_values])
    first, of_entries = (
        [t.grads[:, 0].to(dtype).float(), t.grads.flatten(0, 1)[entries].to(dtype).float()]
        for t in (found, want)
    )
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(first, of_entries, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert (found.residual is None) == (not residual)
    if residual:
        close([found.residual], [want.residual])


def test_a_code_that_is_no_number_shows_in_the_errors() -> None:
    codes = some_codes(2, 12, 7)
    codes.values[0] = NAN
    inputs = (normal(24, 5), normal(2, 5), normal(2, 5), torch.tensor(LENGTHS[3]), torch.ones(2, 3))
    found = decode.decode(codes, *inputs, residual=False)
    want = sparse.decode(codes, *inputs, residual=False)
    assert found.errors[0].isnan().any()
    assert found.errors.isnan().equal(want.errors.isnan())


@pytest.mark.parametrize(
    ("piece", "dtype"), [(3, torch.float16), (256, torch.float32), (3, torch.bfloat16)], ids=str
)
def test_sums_of_bags(piece: int, dtype: torch.dtype, monkeypatch) -> None:
    """One bag has a third of all entries, others have none."""
    monkeypatch.setattr(bags, "PIECE", piece)
    n, generator = 40, torch.Generator().manual_seed(0)
    bag = torch.randint(0, 7, (n,), generator=generator).to(torch.int32)
    bag[::3] = 4
    bag[bag == 2] = 5
    source = torch.randint(0, 6 * 3, (n,), generator=generator).to(torch.int32)
    weights, table = normal(n).clamp(min=-0.3), normal(3, 5).to(dtype)
    weights[::5] = 0
    found, want = torch.ones(8, 5), torch.ones(8, 5)
    per_row = 2
    sums = bags.add_bags(found, table, group_by_latent(bag, 8), source, weights, per_row)
    for s, i, w in zip(source.tolist(), bag.tolist(), weights, strict=True):
        want[i] += w * table[s // per_row % 3].float()
    close([found], [want])
    chosen = torch.arange(8)[:, None] == bag
    close(sums, [(chosen * weights).sum(1), (chosen & (weights > 0)).sum(1).float()])
    reference = torch.ones(8, 5)
    other = sparse.add_bags(
        reference, table.float(), group_by_latent(bag, 8), source, weights, per_row
    )
    close([found, *sums], [reference, *other])


def test_upkeep() -> None:
    """Adam's step is torch's."""
    w, grad, on = normal(2, 4, 5), normal(2, 4, 5, seed=1), torch.tensor([1.0, 0.0])
    sides = [[t.clone() for t in (w, grad)] for _ in range(2)]
    squares = [
        upkeep.remove_parallel(*sides[0], on), upkeep.remove_parallel_reference(*sides[1], on)
    ]  # fmt: skip
    close([squares[0], *sides[0]], [squares[1], *sides[1]])
    close([(sides[0][1] * w).sum(-1)[0]], [torch.zeros(4)])
    assert sides[0][1][1].equal(grad[1])

    param = torch.nn.Parameter(w.clone())
    adam = torch.optim.Adam([param], lr=0.1, eps=upkeep.EPS)
    states = [[w.clone(), grad, torch.zeros(2, 4, 5), torch.zeros(2, 4, 5)] for _ in range(2)]
    for t in (1, 2, 3):
        param.grad = grad
        adam.step()
        row = [0.1 / (1 - 0.9**t), (1 - 0.999**t) ** 0.5]
        of_members = torch.tensor([[*row, 0.0], [*row, float(t == 3)]])
        upkeep.update(*states[0], of_members)
        upkeep.update_reference(*states[1], of_members)
    close(*states)
    plain = param.detach()
    unit = plain[1] / plain[1].norm(dim=-1, keepdim=True)
    close([states[0][0]], [torch.stack([plain[0], unit])])


@pytest.mark.parametrize(
    ("activations", "objective"),
    [
        ([TopK(top_k=3), TopK(top_k=2)], Matryoshka(n_prefixes=3)),
        ([BatchTopK(top_k=2)] * 2, Vanilla()),
    ],
    ids=["matryoshka", "batch-top-k"],
)
def test_training(activations, objective, monkeypatch) -> None:
    """The same gradients as by torch, dead latents and AuxK included."""
    monkeypatch.setattr(choice, "_TOKENS", 1)
    monkeypatch.setitem(aux_k._SPARSE_ABOVE, "cpu", 0)
    banks = [
        SaeBank(
            [SaeConfig(d_sae=16, activation=a) for a in activations], [objective] * 2, [1e-3, 2e-3],
            [0, 1], 8, dead_after=3, kernels=kernels,
        )
        for kernels in ("triton", "reference")
    ]  # fmt: skip
    assert [bank.triton for bank in banks] == [True, False]
    for i in range(2):
        left, right = (bank.compute_gradients(normal(3, 8, seed=i)) for bank in banks)
        close(left, right)
        for name, grad in banks[0].grads.items():
            torch.testing.assert_close(grad, banks[1].grads[name], msg=name)
            banks[1].grads[name].copy_(grad)  # Adam would magnify the smallest differences
        for bank in banks:
            bank.apply_gradients()
        for name, tensor in banks[0].state_dict().items():
            torch.testing.assert_close(tensor, banks[1].state_dict()[name], msg=name)
    assert (left.aux > 0).any()


def test_a_wrong_kernel_is_not_used(monkeypatch) -> None:
    monkeypatch.setattr(choice, "_TOKENS", 1)
    shape, device = Shape(8, 20, 2, 2, False), torch.device("cpu")
    assert why_not(device, shape) == ""
    for module, name, what in (
        (select, "top_k", "selection"),
        (decode, "decode", "the decoder"),
        (bags, "add_bags", "the gradients"),
        (upkeep, "update", "the update"),
    ):
        right = getattr(module, name)

        def wrong(*args, right=right, module=module, **kwargs):
            out = right(*args, **kwargs)
            changed = {select: 0, decode: 4, bags: 0}.get(module)
            (args[0] if changed is None else out[changed]).view(-1)[0] += 1
            return out

        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrong)
            assert why_not(device, shape) == f"the kernel of {what} gives other results than torch"

    def broken(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nmore")

    monkeypatch.setattr(select, "top_k", broken)
    assert (
        why_not(device, shape) == "RuntimeError: Failed to find C compiler. Please specify via CC"
    )
