"""Runs the model over decoded images, with the same bits on every run.

The last bits of a matrix product depend on the number of threads and the number of rows. This was
seen with MKL on a DINOv2-S (float32, 2 threads, batches of 3), and with bfloat16 autocast at most
numbers of threads. So on the CPU both numbers are fixed: images are processed in groups of
:data:`CPU_BATCH`, counted from the start of the shard, and one thread computes a group. Several
groups are computed in parallel. This is not slower (ViT-S/16, 2 cores: 15.1 images/s, against 13.7
with both cores in every product).
"""

import collections
import concurrent.futures
import contextlib
import itertools
import typing as tp
from collections.abc import Callable, Generator, Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

CPU_BATCH = 8
"""Images per forward pass on the CPU."""

_T = tp.TypeVar("_T")


class Forward(tp.Generic[_T]):
    """A model's forward pass over a stream of examples.

    Args:
        record: the model: images [batch, 3, height, width] -> [n_layers, batch, tokens, d_model].
        pixels: returns an example's image [3, height, width].
        device: device of `record`.
        dtype: dtype of the result.
        batch_size: images per forward pass on a GPU.
        amp: run in bfloat16 autocast.
    """

    def __init__(
        self,
        record: Callable[[Tensor], Tensor],
        pixels: Callable[[_T], Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        amp: bool,
    ):
        self._record, self._pixels = record, pixels
        self._device, self._dtype, self._amp = device, dtype, amp
        self._batch_size = batch_size

    def __call__(
        self, examples: Iterable[_T]
    ) -> Generator[tuple[list[_T], Float[Tensor, "n_layers batch tokens d_model"]], None, None]:
        """Groups of examples in order, each with its activations (contiguous, in CPU memory).

        Close the generator if you leave it early, because this ends its threads.
        """
        return self._cpu(examples) if self._device.type == "cpu" else self._gpu(examples)

    def _compute(self, group: list[_T]) -> Tensor:
        images = torch.stack([self._pixels(example) for example in group])
        if self._device.type == "cuda":
            images = images.pin_memory()
        with (
            torch.inference_mode(),  # this and autocast are settings of the thread
            torch.autocast(self._device.type, torch.bfloat16, enabled=self._amp),
        ):
            acts = self._record(images.to(self._device, non_blocking=True))
            return acts.to(self._dtype).contiguous()

    def _cpu(self, examples: Iterable[_T]) -> Generator[tuple[list[_T], Tensor], None, None]:
        pending: collections.deque[tuple[list[_T], concurrent.futures.Future[Tensor]]]
        pending = collections.deque()
        with _one_thread_per_product() as n_threads:
            pool = concurrent.futures.ThreadPoolExecutor(n_threads, "saev-forward")
            try:
                for group in _groups(examples, CPU_BATCH):
                    pending.append((group, pool.submit(self._compute, group)))
                    if len(pending) > n_threads:
                        group, future = pending.popleft()
                        yield group, future.result()
                while pending:
                    group, future = pending.popleft()
                    yield group, future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _gpu(self, examples: Iterable[_T]) -> Generator[tuple[list[_T], Tensor], None, None]:
        """Compute the next batch while the consumer uses the previous one."""
        previous: tuple[list[_T], Tensor, torch.cuda.Event | None] | None = None
        for group in _groups(examples, self._batch_size):
            acts = self._compute(group)
            done = None
            if acts.is_cuda:
                host = torch.empty(acts.shape, dtype=acts.dtype, pin_memory=True)
                host.copy_(acts, non_blocking=True)
                done = torch.cuda.Event()
                done.record(torch.cuda.current_stream(acts.device))
            else:
                host = acts.cpu()
            if previous is not None:
                yield _arrived(*previous)
            previous = (group, host, done)
        if previous is not None:
            yield _arrived(*previous)


def _arrived(
    group: list[_T], acts: Tensor, done: "torch.cuda.Event | None"
) -> tuple[list[_T], Tensor]:
    if done is not None:
        done.synchronize()
    return group, acts


def _groups(examples: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(examples)
    while group := list(itertools.islice(iterator, size)):
        yield group


@contextlib.contextmanager
def _one_thread_per_product() -> Iterator[int]:
    """Use one thread per torch operation in the block. Yields the previous number of threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield n_threads
    finally:
        torch.set_num_threads(n_threads)
