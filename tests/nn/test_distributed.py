"""Ranks that share batches train what one process trains on the whole of them."""

import functools
from pathlib import Path

import pytest
import rank_cases
import safetensors.torch
import torch
from forker import Forker
from rank_cases import CASES

EXACT = ("since_fired", "counters", "rng", "metric.n_dead")


@pytest.fixture(scope="module", params=[2, 3])
def ended(request, forker: Forker, tmp_path_factory) -> tuple[int, Path]:
    """Number of ranks, and the folder of what each of them had at the end."""
    size, folder = request.param, tmp_path_factory.mktemp("ranks")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    script = Path(rank_cases.__file__).read_text()
    pids = [forker.start([rank, size, store.port, folder], script=script) for rank in range(size)]
    ends = [forker.wait(pid) for pid in pids]
    assert [end.status for end in ends] == [0] * size, "\n".join(end.stderr for end in ends)
    return size, folder


def state(folder: Path, case: rank_cases.Case, rank: int) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / f"{case.name}.{rank}")


@functools.cache
def alone(case: rank_cases.Case) -> dict[str, torch.Tensor]:
    return rank_cases.train(rank_cases.bank_of(case))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_all_ranks_have_the_same_bits(ended, case):
    size, folder = ended
    first = state(folder, case, 0)
    for rank in range(1, size):
        other = state(folder, case, rank)
        assert set(first) == set(other)
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), (rank, name)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_ranks_train_what_one_process_trains(ended, case):
    _, folder = ended
    single, together = alone(case), state(folder, case, 0)
    assert (single["metric.aux"][-1] > 0).all(), "no latent died: AuxK was not tried"
    assert set(single) == set(together)
    wide = case.dtype == torch.float64
    for name, want in single.items():
        found = together[name]
        if name in EXACT and wide:
            assert torch.equal(found, want), name
        elif wide:
            torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-11, msg=name)
        elif name.startswith("metric.") and name != "metric.n_dead":
            torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-4, msg=name)
    if case.activation == "batch-top-k":
        assert (single["threshold"] > 0).all()
