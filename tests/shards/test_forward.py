"""The forward pass over a stream: order, sizes, and an end to its threads."""

import threading

import pytest
import torch
from torch import Tensor

from saev.shards.forward import CPU_BATCH, Forward


def record(images: Tensor) -> Tensor:
    """Two layers of two tokens of width 3: doubles of the pixels."""
    return torch.stack([images.flatten(1)[:, :6].reshape(-1, 2, 3)] * 2) * 2


def forward(dtype: torch.dtype = torch.float32, batch_size: int = 4) -> Forward:
    return Forward(
        record, lambda i: torch.full((3, 2, 2), float(i)),
        device=torch.device("cpu"), dtype=dtype, batch_size=batch_size, amp=False,
    )  # fmt: skip


@pytest.mark.parametrize("way", ["_cpu", "_gpu"])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 33])
def test_every_example_once_and_in_order(way: str, n: int) -> None:
    """The pipeline for GPUs is run without one, to see that it loses and reorders nothing."""
    groups = list(getattr(forward(torch.float16), way)(iter(range(n))))
    assert [i for group, _ in groups for i in group] == list(range(n))
    size = CPU_BATCH if way == "_cpu" else 4
    assert [len(group) for group, _ in groups] == [size] * (n // size) + [n % size] * (n % size > 0)
    for group, acts in groups:
        assert acts.shape == (2, len(group), 2, 3)
        assert acts.dtype == torch.float16
        assert acts.is_contiguous()
        assert torch.equal(acts[0, :, 0, 0].float(), 2.0 * torch.tensor(group))


def test_an_error_or_an_early_end_leaves_no_thread() -> None:
    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("the model is broken")

    n_threads = torch.get_num_threads()
    run = forward()
    stream = run(iter(range(100)))
    next(stream)
    assert torch.get_num_threads() == 1
    stream.close()
    run._record = broken
    with pytest.raises(RuntimeError, match="the model is broken"):
        list(run(iter(range(100))))
    assert torch.get_num_threads() == n_threads
    assert not [t for t in threading.enumerate() if t.name.startswith("saev-forward")]
