"""A step queues its work on a GPU without waiting for any of it, and looks for dead latents rarely.

There may be no GPU here. On fake tensors, which have shapes and no values, whatever would need a
value from the device is an error.
"""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from saev.config import BatchTopK, JumpRelu, Matryoshka, Relu, SaeConfig, TopK, Vanilla
from saev.nn import SaeBank, bank, encode, group

D_MODEL, D_SAE, TOKENS = 8, 24, 32


def make_bank(activation, objective, **kwargs) -> SaeBank:
    cfgs = [SaeConfig(d_sae=D_SAE, activation=activation)] * 2
    return SaeBank(cfgs, [objective] * 2, [1e-3, 2e-3], [0, 1], D_MODEL, **kwargs)


def steps(bank_, n, start=0):
    for i in range(start, start + n):
        yield bank_.step(torch.randn(TOKENS, D_MODEL, generator=torch.Generator().manual_seed(i)))


@pytest.mark.parametrize(
    "activation", [TopK(top_k=3), BatchTopK(top_k=3), Relu(), JumpRelu()], ids=lambda a: a.kind
)
@pytest.mark.parametrize("objective", [Vanilla(), Matryoshka(n_prefixes=3)], ids=lambda o: o.kind)
def test_gradients_need_no_value_from_the_device(activation, objective, monkeypatch) -> None:
    made = make_bank(activation, objective, dead_after=1)
    list(steps(made, 2))
    given = {}

    def as_on_a_gpu(weights, x, top_k, threshold, *args):
        return encode.batch_top_k_without_waiting(weights, x, top_k, *args[:2])

    monkeypatch.setattr(encode, "batch_top_k_codes", as_on_a_gpu)

    def keep(group_, x, dead, variance):
        given.update(group=group_, x=x, dead=dead, variance=variance)
        return group.group_gradients(group_, x, dead, variance)

    monkeypatch.setattr(bank, "group_gradients", keep)
    with torch.no_grad():
        made.since_fired[:, :5] = 100  # some are dead, so AuxK takes part
        list(steps(made, 1))
    assert given["dead"] is not None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, given)
        group.group_gradients(**fake)
        with pytest.raises(DataDependentOutputException):  # the means work
            fake["x"].sum().item()


@pytest.mark.parametrize("steps_between", [2, 7])
def test_looking_rarely_for_dead_latents_changes_nothing(steps_between, monkeypatch) -> None:
    banks = []
    for between in (1, steps_between):
        made = make_bank(TopK(top_k=2), Vanilla(), dead_after=3 * TOKENS, dtype=torch.float64)
        made._steps_between_looks = between
        banks.append(made)
    revived = False
    for left, right in itertools.islice(zip(*(steps(b, 30) for b in banks), strict=True), 30):
        torch.testing.assert_close(left, right)
        revived |= bool((left.aux > 0).any())
    assert revived
    for name, tensor in banks[0].state_dict().items():
        torch.testing.assert_close(tensor, banks[1].state_dict()[name], msg=name)


def test_a_resumed_bank_looks_anew() -> None:
    whole = make_bank(TopK(top_k=2), Vanilla(), dead_after=2 * TOKENS, dtype=torch.float64)
    other = make_bank(TopK(top_k=2), Vanilla(), dead_after=2 * TOKENS, dtype=torch.float64)
    for made in (whole, other):
        made._steps_between_looks = 10
    list(steps(whole, 15))
    list(steps(other, 4))  # it has looked by now, at another state
    other.load_state_dict(whole.state_dict())
    for left, right in zip(steps(whole, 5, 15), steps(other, 5, 15), strict=True):
        torch.testing.assert_close(left, right)
