"""Communication between processes that train together: sums of tensors, and small JSON objects.

Every rank holds all parameters and computes the gradients of its share of a batch. The sums over
ranks have the same bits on all ranks, and so have the weights. Tensors on the CPU use gloo, those
on GPUs use NCCL.
"""

import contextlib
import datetime
import functools
import json
import re
import typing as tp
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from saev.errors import RankError

_SMALL = 1 << 20
"""Tensors with fewer elements are sent together, because a call costs as much as sending so many
elements."""
_PATIENCE = datetime.timedelta(days=1)
"""Timeout for JSON objects. It is long, because another rank may be evaluating an SAE."""


class Ranks:
    """Rank ``rank`` of ``size``. With one rank, which is the default, nothing is sent.

    All ranks have to call the same methods in the same order, with tensors of the same shapes.
    With more than one rank, torch.distributed must be initialised before.

    Every method raises RankError if another rank does not answer.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank = rank
        self.size = size

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, logs and decides."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    def add_(self, *tensors: Tensor) -> None:
        """Replace each tensor (contiguous, all of one dtype and device) by its sum over ranks."""
        if self.alone:
            return
        small = [t for t in tensors if t.numel() < _SMALL]
        with _answered():
            for tensor in tensors:
                if tensor.numel() >= _SMALL:
                    dist.all_reduce(tensor)
            if small:
                flat = torch.cat([t.reshape(-1) for t in small])
                dist.all_reduce(flat)
                parts = flat.split([t.numel() for t in small])
                for tensor, part in zip(small, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def broadcast_(self, *tensors: Tensor) -> None:
        """Replace each tensor by that of rank 0."""
        if self.alone:
            return
        with _answered():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def counts(self, numbers: tp.Sequence[int]) -> list[list[int]]:
        """The numbers of all ranks. Every rank must pass equally many."""
        if self.alone:
            return [list(numbers)]
        found = [torch.zeros(len(numbers), dtype=torch.int64) for _ in range(self.size)]
        with _answered():
            dist.all_gather(found, torch.tensor(numbers), group=_patient())
        return [t.tolist() for t in found]

    def gather(self, tensor: Tensor, lengths: tp.Sequence[int]) -> list[Tensor]:
        """The tensors of all ranks.

        Args:
            tensor: the tensor of this rank.
            lengths: length of the first axis of every rank's tensor.
        """
        if self.alone:
            return [tensor]
        padded = tensor.new_zeros(max(1, *lengths), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        found = [torch.empty_like(padded) for _ in lengths]
        with _answered():
            group = _patient() if tensor.device.type == "cpu" else None
            dist.all_gather(found, padded, group=group)
        return [t[:n] for t, n in zip(found, lengths, strict=True)]

    def collect(self, obj: tp.Any) -> list[tp.Any]:
        """The objects (plain JSON) of all ranks."""
        if self.alone:
            return [obj]
        data = torch.frombuffer(bytearray(json.dumps(obj).encode()), dtype=torch.uint8)
        lengths = [length for (length,) in self.counts([len(data)])]
        return [json.loads(t.numpy().tobytes()) for t in self.gather(data, lengths)]

    def tell(self, obj: tp.Any) -> tp.Any:
        """The object (plain JSON) of rank 0."""
        return self.collect(obj if self.first else None)[0]


ALONE = Ranks()


class Agreement:
    """A yes-or-no flag that is combined over all ranks once per step: yes if any rank says yes.

    Each call returns the previous step's result, so the all-reduce overlaps with compute.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._asked: tuple[tp.Any, Tensor] | None = None

    def ask(self, yes: bool) -> bool:
        """Start an all-reduce of ``yes`` and return the previous one's result. With only one rank,
        return ``yes``."""
        if self._ranks.alone:
            return yes
        answer = self.finish()
        flag = torch.tensor([int(yes)])
        with _answered():
            self._asked = (dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True), flag)
        return answer

    def finish(self) -> bool:
        """Wait for the last all-reduce and return its result."""
        if self._asked is None:
            return False
        (work, flag), self._asked = self._asked, None
        with _answered():
            work.wait()
        return bool(flag)


@functools.cache
def _patient() -> dist.ProcessGroup:
    return tp.cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as err:  # gloo raises it plainly, NCCL a class of its own
        if isinstance(err, torch.OutOfMemoryError):
            raise
        # Without gloo's source location and its guess at the cause.
        first = (str(err).splitlines() or [type(err).__name__])[0]
        reason = re.sub(r"^\[\S+\] ", "", first).split(". ")[0]
        raise RankError(
            f"Another rank of this training does not answer ({reason}). It ended, or its machine "
            "cannot be reached; see the message of that rank. The same command continues from the "
            "last resume point."
        ) from err
