"""Trains small banks on batches that several ranks share; see test_distributed.py.

    python rank_cases.py RANK SIZE PORT FOLDER

As a module: the cases, and how one of them is trained.
"""

import sys
import typing as tp
from datetime import timedelta
from pathlib import Path

import safetensors.torch
import torch

from saev.config import BatchTopK, JumpRelu, Matryoshka, Relu, SaeConfig, TopK, Vanilla
from saev.nn import SaeBank
from saev.nn.encode import batch_top_k_codes
from saev.nn.ranks import ALONE, Agreement, Ranks
from saev.nn.weights import Weights

D, S, STEPS = 23, 71, 12
SIZES = (130, 97, 5)
"""Batches take turns with these; the last has fewer rows than some ranks would want."""


class Case(tp.NamedTuple):
    """What a bank is made of."""

    activation: str
    objective: str
    optim: str = "adam"
    dtype: torch.dtype = torch.float64
    """float64, so that no choice among latents hangs on how a sum was rounded."""

    @property
    def name(self) -> str:
        return "-".join(map(str, self)).replace("torch.", "")


ACTIVATIONS = {
    "top-k": TopK(top_k=5), "batch-top-k": BatchTopK(top_k=5), "relu": Relu(),
    "jump-relu": JumpRelu(),
}  # fmt: skip
CASES = [
    *(Case(a, o) for a in ACTIVATIONS for o in ("vanilla", "matryoshka")),
    *(Case(a, "matryoshka", "muon") for a in ACTIVATIONS),
    *(Case(a, "matryoshka", dtype=torch.float32) for a in ACTIVATIONS),
]


def batches(size: int) -> tp.Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches, and which of `size` ranks has each row: unevenly, and rank 1 nothing of some."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(30, D, generator=generator)
    for step in range(STEPS):
        n = SIZES[step % len(SIZES)]
        codes = torch.rand(n, 30, generator=generator)
        owner = torch.randint(size, (n,), generator=torch.Generator().manual_seed(step))
        if step in (1, 7) and size > 1:
            owner[owner == 1] = 0
        yield (codes * (codes > 0.85)) @ directions + 3, owner


def bank_of(case: Case, ranks: Ranks = ALONE, seed: int = 0) -> SaeBank:
    """Two members that differ, whose first ten latents die."""
    act = ACTIVATIONS[case.activation]
    activations = [
        act.model_copy(update={"top_k": act.top_k + i} if hasattr(act, "top_k") else {})
        for i in range(2)
    ]
    objective = Vanilla() if case.objective == "vanilla" else Matryoshka(n_prefixes=4)
    aiming = case.activation in ("relu", "jump-relu")
    penalties = [{"sparsity_coeff": 1e-3}, {"target_l0": 5.0} if aiming else {}]
    bank = SaeBank(
        [SaeConfig(d_sae=S, activation=a, reinit_blend=0.8) for a in activations],
        [objective.model_copy(update={**penalty, "k_aux": 4}) for penalty in penalties],
        [1e-3, 2e-3], [seed, seed + 1], D, optim=case.optim, dead_after=300,
        dtype=case.dtype, ranks=ranks, data=torch.cat([x for x, _ in batches(1)]),
    )  # fmt: skip
    bank.params["b_enc"][:, :10] -= 20
    return bank


def train(bank: SaeBank, start: int = 0) -> dict[str, torch.Tensor]:
    """The state after all steps, and each step's metrics."""
    rank, size = bank.ranks.rank, bank.ranks.size
    metrics = []
    for step, (x, owner) in list(enumerate(batches(size)))[start:]:
        m = bank.step(x[owner == rank], 1 / (1 + step), min(1, step / 5), n_tokens=len(x))
        metrics.append(m)
    found = {
        f"metric.{k}": torch.stack([getattr(m, k) for m in metrics]) for k in metrics[0]._fields
    }
    return found | bank.state_dict()


def check_ties(ranks: Ranks) -> None:
    """Of many equal values exactly k·B are kept over all ranks, whichever they are."""
    x, owner = torch.ones(40, 2), torch.arange(40) % ranks.size
    eye = torch.eye(6, 2)[None]
    weights = Weights(eye, torch.tensor([[0.0, 1, 0, 0, 2, 0]]), eye, torch.zeros(1, 2))
    for k, threshold, least in ((1, 0.0, 2.0), (2, 0.0, 2.0), (2, 2.9, 2.0), (3, 0.0, 1.0)):
        mine = x[owner == ranks.rank]
        codes, smallest = batch_top_k_codes(
            weights, mine, [k], torch.tensor([threshold]), 7, False, len(x), ranks
        )
        assert sum(sum(n) for n in ranks.counts([len(codes.values)])) == 40 * k
        assert smallest.tolist() == [least]


def main(rank: int, size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore(
        "127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60)
    )
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    ranks = Ranks(rank, size)
    for case in CASES:
        bank = bank_of(case, ranks, seed=0 if rank == 0 else 50)  # rank 0's start counts
        bank.begin_together()
        safetensors.torch.save_file(train(bank), folder / f"{case.name}.{rank}")
    check_ties(ranks)
    numbers = torch.arange(rank + 1)
    assert [t.tolist() for t in ranks.gather(numbers, range(1, size + 1))] == [
        list(range(r + 1)) for r in range(size)
    ]
    assert ranks.collect({"rank": rank}) == [{"rank": r} for r in range(size)]
    assert ranks.tell(f"rank {rank}") == "rank 0"
    agreement = Agreement(ranks)
    answers = [agreement.ask(step == 2 and rank == size - 1) for step in range(5)]
    assert answers == [False, False, False, True, False]
    assert not agreement.finish()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
