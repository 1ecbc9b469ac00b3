"""Windows: buffers of vectors that reader threads fill, and the order in which rows are given."""

import contextlib
import functools
import itertools
import threading
import typing as tp
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from saev.loaders.order import Order, share
from saev.loaders.selection import Selection
from saev.shards import Shards
from saev.shards.reader import raw_bytes

N_BUFFERS = 2
"""Number of windows in memory: one is filled while batches are cut from the other."""
_TASK_BYTES = 2 << 20
"""Least bytes of a task. Small blocks are read together, because each task takes a lock."""


class Span(tp.NamedTuple):
    """The rows of an epoch that are still to be given. Rows are counted over all ranks."""

    epoch: int
    """Number of the epoch."""
    start: int
    """First row to give."""
    stop: int
    """Last row to give + 1."""


class Window:
    """One window: a job for the reader threads, then vectors and their order for cutting batches.

    Its rows are [slots × kept_tokens], flattened. A *slot* holds one example of one layer. With
    several ranks it holds the share of one rank, and ``places`` are the positions of its rows in
    the order of all ranks.
    """

    def __init__(self, epoch: int, first: int, last: int, n_rows: int, data: Tensor):
        self.epoch = epoch
        self.first = first
        """First row to give, in the window's order. Earlier rows were given before a resume."""
        self.last = last
        """Last row to give + 1."""
        self.n_rows = n_rows
        """Wanted rows of all ranks."""
        self.data = data
        """Vectors in the stored dtype, [slots × kept_tokens, d_model]."""
        self.tasks: list[Callable[[], None]] = []
        self.order: Tensor = torch.empty(0, dtype=torch.int64)
        """Wanted rows in the order in which they are given, int64."""
        self.places: np.ndarray | None = None
        """Position of each entry of `order` in the order of all ranks, int64, ascending; None with
        one rank."""
        self.example_idx: Tensor = self.order
        """Example of each entry of `order`, int64."""
        self.token_idx: Tensor = self.order
        """Content token of each entry of `order`, or -1 for the class token, int64."""
        self.slot_layers: Tensor | None = None
        """Block number of each slot, int64 [slots]; None if there is one layer."""
        self.slot_labels: Tensor | None = None
        """Labels of each slot's content tokens, uint8 [slots, content_tokens]."""

    def own(self, start: int, stop: int) -> tuple[int, int]:
        """The entries of `order` that are at positions [start, stop) of the order of all ranks."""
        if self.places is None:
            return start, stop
        first, last = np.searchsorted(self.places, (start, stop))
        return int(first), int(last)


class Reading(tp.NamedTuple):
    """What a loader reads, and how."""

    shards: Shards
    selection: Selection
    order: Order
    block_examples: int
    labels: bool
    device: torch.device
    verify: bool
    rank: int
    world_size: int


class Buffers:
    """The memory of the windows, and the code that reads examples into it.

    On the CPU, examples are read directly into a window. On a GPU the windows are on the device,
    and each thread reads a block into pinned memory, from which it is copied. If only special
    tokens are wanted, each thread reads a block into memory of its own, too, and copies the class
    tokens from there.
    """

    def __init__(self, reading: Reading, n_slots: int):
        self._r = reading
        self._n_slots = n_slots
        self._buffers: list[Tensor | None] = [None] * N_BUFFERS
        self._raw: list[memoryview] = [memoryview(b"")] * N_BUFFERS
        self._slot_bytes = (
            reading.selection.kept_tokens * reading.shards.d_model * reading.shards.dtype.itemsize
        )
        self._used: list[torch.cuda.Event | None] = [None] * N_BUFFERS
        self._local = threading.local()
        self._cuda = reading.device.type == "cuda"
        self.staged = self._cuda or reading.selection.tokens == "special"
        self.n_bytes = 0
        """Bytes read from storage so far."""
        self._count = threading.Lock()

    def get(self, number: int) -> Tensor:
        """Buffer number 0 or 1, [slots, kept_tokens, d_model]. Waits until it is not in use."""
        event, self._used[number] = self._used[number], None
        if event is not None:
            event.synchronize()
        buffer = self._buffers[number]
        if buffer is None:
            shape = (self._n_slots, self._r.selection.kept_tokens, self._r.shards.d_model)
            buffer = torch.empty(shape, dtype=self._r.shards.dtype, device=self._r.device)
            if self._cuda:  # queued kernels may still read tensors that had this memory before
                torch.cuda.current_stream(self._r.device).synchronize()
            self._buffers[number] = buffer
            if not self._cuda:
                self._raw[number] = raw_bytes(buffer)
        return buffer

    def mark_used(self, window: Window) -> None:
        """Record that the consumer has queued its last gather from a window."""
        if not self._cuda:
            return
        stream = torch.cuda.current_stream(self._r.device)
        index = (window.order, window.example_idx, window.token_idx)
        for tensor in (window.data, *index, window.slot_layers, window.slot_labels):
            if tensor is not None:
                tensor.record_stream(stream)  # allocated on the stream of a reader thread
        for number, buffer in enumerate(self._buffers):
            if buffer is not None and buffer.data_ptr() == window.data.data_ptr():
                self._used[number] = stream.record_event()

    def read(self, number: int, slot: int, shard: int, layer: int, start: int, stop: int) -> None:
        """Read examples [start, stop) of a shard into buffer ``number``, from slot ``slot`` on."""
        shards, verify, n = self._r.shards, self._r.verify, stop - start
        if not self.staged:
            raw = self._raw[number][slot * self._slot_bytes : (slot + n) * self._slot_bytes]
            shards.read_bytes(shard, layer, start, stop, raw, verify=verify)
        else:
            stage, buffer = self._stage()[:n], self._buffers[number]
            assert buffer is not None
            shards.read(shard, layer, start, stop, out=stage, verify=verify)
            with self.copying():
                buffer[slot : slot + n].copy_(stage[:, : buffer.shape[1]], non_blocking=True)
        with self._count:
            self.n_bytes += n * shards.layouts[shard].row_bytes

    def place(self, array: np.ndarray) -> Tensor:
        """Copy an index array to the device of the windows."""
        tensor = torch.from_numpy(array)
        if not self._cuda:
            return tensor
        with self.copying():
            return tensor.to(self._r.device)

    def _stage(self) -> Tensor:
        stage = getattr(self._local, "stage", None)
        if stage is None:
            shards = self._r.shards
            shape = (self._r.block_examples, shards.tokens_per_example, shards.d_model)
            stage = torch.empty(shape, dtype=shards.dtype, pin_memory=self._cuda)
            self._local.stage = stage
        return tp.cast(Tensor, stage)

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Run copies to a GPU on this thread's stream. They are complete at the end of the
        block."""
        if not self._cuda:
            yield
            return
        stream = getattr(self._local, "stream", None)
        if stream is None:
            stream = self._local.stream = torch.cuda.Stream(self._r.device)
        with torch.cuda.stream(stream):
            yield
            stream.synchronize()


def windows(reading: Reading, buffers: Buffers, spans: Iterator[Span]) -> Iterator[Window]:
    """The windows from the consumer's position on. Earlier windows are not read."""
    order = reading.order
    number = 0
    resident = False
    for span in spans:
        end = 0
        for w, n_rows in enumerate(order.epoch(span.epoch).window_rows.tolist()):
            begin, end = end, end + n_rows
            first, last = max(span.start - begin, 0), min(span.stop, end) - begin
            if first >= last:
                continue
            data = buffers.get(number)
            window = Window(span.epoch, first, last, n_rows, data.flatten(0, 1))
            _add_tasks(window, reading, buffers, w, number, read=not resident)
            if order.resident:
                resident = True
            else:
                number = (number + 1) % N_BUFFERS
            yield window


def _add_tasks(
    window: Window, reading: Reading, buffers: Buffers, w: int, number: int, *, read: bool
) -> None:
    """Add the tasks that read this rank's share of a window's blocks and make its index."""
    order, selection, shards = reading.order, reading.selection, reading.shards
    numbers = order.window_blocks(window.epoch, w)
    blocks = order.blocks
    starts, stops, layers = blocks.start[numbers], blocks.stop[numbers], blocks.layer[numbers]
    slots = np.append(0, np.cumsum(stops - starts))
    window.tasks.append(
        functools.partial(_make_index, window, reading, buffers, w, starts, stops, layers)
    )
    if not read:
        return
    shard_of = np.searchsorted(selection.shard_bounds, starts, side="right") - 1
    first, last = share(int(slots[-1]), reading.rank, reading.world_size)
    begins, ends = np.clip(slots[:-1], first, last), np.clip(slots[1:], first, last)
    wanted = begins < ends
    places = (
        begins - first,
        shard_of,
        np.asarray(selection.layers)[layers],
        starts + begins - slots[:-1],
        starts + ends - slots[:-1],
    )
    reads = [_Read(*row) for row in zip(*(x[wanted].tolist() for x in places), strict=True)]
    per_task = max(1, _TASK_BYTES // (reading.block_examples * shards.layouts[0].row_bytes or 1))
    for i in range(0, len(reads), per_task):
        some = reads[i : i + per_task]
        window.tasks.append(functools.partial(_read_blocks, reading, buffers, number, some))


class _Read(tp.NamedTuple):
    """A block to read."""

    slot: int
    """Slot of its first example."""
    shard: int
    layer: int
    first: int
    """First example, as a position among the wanted examples."""
    last: int
    """Last example + 1."""


def _read_blocks(reading: Reading, buffers: Buffers, number: int, reads: list[_Read]) -> None:
    """Read blocks, with one read per run of adjacent wanted examples."""
    for slot, shard, layer, first, last in reads:
        examples = reading.selection.examples[first:last] - reading.shards.shard_starts[shard]
        cuts = [0, last - first]
        if examples[-1] - examples[0] >= last - first:
            cuts = [0, *(np.flatnonzero(np.diff(examples) > 1) + 1).tolist(), last - first]
        for a, b in itertools.pairwise(cuts):
            buffers.read(number, slot + a, shard, layer, int(examples[a]), int(examples[b - 1]) + 1)


def _make_index(
    window: Window,
    reading: Reading,
    buffers: Buffers,
    w: int,
    starts: np.ndarray,
    stops: np.ndarray,
    layers: np.ndarray,
) -> None:
    """Make the order of the wanted rows, and the example, token and layer of each.

    This runs on a reader thread for the whole window, so that the consumer only takes slices. Every
    operation on the consumer's thread may lose the interpreter's lock to a reader and wait for it.
    """
    selection = reading.selection
    lengths = stops - starts
    offsets = np.repeat(starts - np.append(0, np.cumsum(lengths))[:-1], lengths)
    examples = selection.examples[np.arange(len(offsets)) + offsets]
    rows = selection.rows(examples)
    if reading.order.shuffle:
        rows = rows[reading.order.row_order(len(rows), window.epoch, w)]
    numbers = np.repeat(np.asarray(selection.layers, dtype=np.int64)[layers], lengths)
    if reading.world_size > 1:
        first, last = share(len(examples), reading.rank, reading.world_size)
        kept = selection.kept_tokens
        window.places = np.flatnonzero((rows >= first * kept) & (rows < last * kept))
        rows = rows[window.places] - first * kept
        examples, numbers = examples[first:last], numbers[first:last]
    window.order = buffers.place(rows)
    slot = rows // selection.kept_tokens
    window.example_idx = buffers.place(examples[slot])
    slot *= -selection.kept_tokens
    slot += rows
    slot -= int(selection.has_cls)
    window.token_idx = buffers.place(slot)
    if len(selection.layers) > 1:
        window.slot_layers = buffers.place(numbers)
    if reading.labels and selection.labels is not None:
        window.slot_labels = buffers.place(selection.labels[examples])
