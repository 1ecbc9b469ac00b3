"""The common part of the shuffled and the ordered loader: iteration, state, closing, counters."""

import time
import typing as tp
import weakref
from collections.abc import Iterator

import torch

from saev import cores, storage
from saev.config.loaders import DataConfig
from saev.errors import ConfigError
from saev.limits import INDEX_BYTES_PER_TOKEN
from saev.loaders.batches import Batch, Cutter, join
from saev.loaders.order import ORDER_VERSION, Order, Sizes, cut_blocks
from saev.loaders.prefetch import Prefetcher
from saev.loaders.selection import Selection
from saev.loaders.windows import (
    N_BUFFERS,
    Buffers,
    Reading,
    Span,
    Window,
    windows,
)
from saev.shards import Shards

STATE_VERSION = 1
_DISK_THREADS = 4
"""Most reader threads for a disk; the least is two. More threads than cores slow each other and the
consumer down: on two cores with a warm page cache, four threads read 1.2 times slower than two.
With a cold cache, four were 1.1 times faster than two, and one 1.2 times slower."""
_STORE_THREADS = 16
"""Reader threads for an object store. One connection to a large store gives 50 to 100 MB/s. With a
near store, the extra threads cost nothing."""


class Loader:
    """Batches of activations, from the loader's current position.

    A loader is a cursor. ``for batch in loader`` continues after the last batch that was given,
    also after a ``break`` or :meth:`load_state_dict`. It ends after ``epochs`` epochs, and the next
    ``for`` gives the next ``epochs`` epochs. :meth:`reset` goes back to the first batch of epoch 0.

    Reader threads run from ``iter(loader)`` until the iterator has ended or is dropped (by a
    ``break``, an exception or the garbage collector), or :meth:`close` is called. A new iterator
    ends the previous one.
    """

    def __init__(
        self,
        shards: Shards,
        cfg: DataConfig,
        selection: Selection,
        sizes: Sizes,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        epochs: int | None,
        drop_last: bool,
        labels: bool,
        rank: int,
        world_size: int,
        device: str | torch.device,
        dtype: torch.dtype,
        n_threads: int,
        verify: bool,
    ):
        _check_arguments(batch_size, epochs, rank, world_size)
        self.shards = shards
        self.batch_size = batch_size
        self.drop_last = drop_last
        self._cfg = cfg
        self._selection = selection
        self._sizes = sizes
        self._epochs = epochs
        self._n_threads = n_threads
        blocks = cut_blocks(
            selection.shard_bounds,
            selection.cum_rows,
            n_layers=len(selection.layers),
            block_examples=sizes.block_examples,
        )
        self._order = Order(blocks, sizes.window_blocks, seed=seed, shuffle=shuffle)
        if drop_last and not self._usable(0):
            raise ConfigError(
                f"drop_last leaves no batch: batch_size is {batch_size}, the data have "
                f"{selection.n_tokens} tokens. Lower batch_size."
            )
        self._reading = Reading(
            shards=shards,
            selection=selection,
            order=self._order,
            block_examples=sizes.block_examples,
            labels=labels,
            device=_device(device),
            verify=verify,
            rank=rank,
            world_size=world_size,
        )
        self._fingerprints = {"data": self._data_fingerprint(), "order": self._order_fingerprint()}
        self._dtype = dtype
        self._epoch = self._position = 0
        self._end: int | None = None
        self._pass: weakref.ref[_Pass] | None = None
        self._counters = _Counters()

    # --- Batches ---------------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        """Wanted tokens of one epoch, over all layers and ranks."""
        return self._selection.n_tokens

    @property
    def layers(self) -> tuple[int, ...]:
        """Block numbers of the selected layers."""
        return self._selection.layers

    def n_batches(self, epoch: int = 0) -> int:
        """Batches of an epoch; the same on all ranks."""
        return -(-self._usable(epoch) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        if self._end is None and self._epochs is not None:
            self._end = self._epoch + self._epochs
        new = _Pass(self)
        self._pass = weakref.ref(new)
        return new

    def _usable(self, epoch: int) -> int:
        return self._order.usable_rows(epoch, self.batch_size, self.drop_last)

    def _spans(self) -> Iterator[Span]:
        epoch, position = self._epoch, self._position
        while self._end is None or epoch < self._end:
            yield Span(epoch, position, self._usable(epoch))
            epoch, position = epoch + 1, 0

    def _advance(self, rows: int) -> None:
        self._position += rows
        if self._position >= self._usable(self._epoch):
            self._epoch, self._position = self._epoch + 1, 0

    # --- State -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """The position of the consumer, as a few integers (JSON-able).

        It counts batches that were given, not those that were read ahead. After the same step it is
        the same on all ranks, and for any number of ranks.
        """
        return {
            "version": STATE_VERSION,
            "seed": self._order.seed,
            "epoch": self._epoch,
            "position": self._position,
            "end": -1 if self._end is None else self._end,
            **self._fingerprints,
        }

    def load_state_dict(self, state: tp.Mapping[str, int]) -> None:
        """Continue from a state: the next batch is the one that followed the state.

        Windows before this position are not read.

        Raises:
            ConfigError: the state is of other data, another order or another seed.
        """
        own = self.state_dict()
        missing = sorted(own.keys() - state.keys())
        if missing:
            raise ConfigError(f"Not a loader's state: it lacks {', '.join(missing)}.")
        remedies = {
            "version": "It was written by another version of saev; start the epoch anew.",
            "seed": "Give the loader the seed of the run that is resumed.",
            "data": "Give the same shards, layer, tokens, ignore_labels, split and val_fraction.",
            "order": "Give the same buffer_mb.",
        }
        for key, remedy in remedies.items():
            if state[key] != own[key]:
                raise ConfigError(
                    f"The loader's state does not fit: its {key} is {state[key]}, expected "
                    f"{own[key]}. {remedy}"
                )
        epoch, position = int(state["epoch"]), int(state["position"])
        usable = self._usable(epoch) if epoch >= 0 else 0
        if not 0 <= position < max(1, usable):
            raise ConfigError(
                f"The loader's state does not fit: position {position} is not in epoch {epoch}, "
                f"which has {usable} rows."
            )
        self.close()
        self._epoch, self._position = epoch, position
        self._end = None if state["end"] < 0 else int(state["end"])

    def reset(self) -> None:
        """Go back to the first batch of epoch 0."""
        self.close()
        self._epoch = self._position = 0
        self._end = None

    def _data_fingerprint(self) -> int:
        cfg, selection = self._cfg, self._selection
        return _fingerprint(
            self.shards.metadata.hash,
            [int(x) for x in self.shards.shard_starts],
            [int(selection.examples[i]) for i in (0, -1)] if len(selection.examples) else [],
            selection.layers,
            selection.tokens,
            sorted(set(cfg.ignore_labels)),
            cfg.split,
            cfg.val_fraction if cfg.split != "all" else 0,
            selection.n_tokens,
        )

    def _order_fingerprint(self) -> int:
        order = self._order
        return _fingerprint(
            ORDER_VERSION,
            order.shuffle,
            self._sizes.block_examples,
            order.n_windows,
        )

    # --- Ending ----------------------------------------------------------------------------

    def close(self) -> None:
        """End the reader threads and free the windows. The loader keeps its position."""
        current = self._pass() if self._pass is not None else None
        if current is not None:
            current.close()

    def __enter__(self) -> tp.Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- Counters --------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Counters of reading.

        - loader/read_mb: MB (10⁶ bytes) read since the loader was made;
        - loader/read_mb_s: MB/s since the previous call;
        - loader/wait_s: seconds that the consumer waited for rows since the previous call;
        - loader/buffer_fill: share of the windows' memory with rows still to be given, 0 to 1.
        """
        current = self._pass() if self._pass is not None else None
        if current is not None:
            current.count()
        return self._counters.report(current.fill() if current is not None else 0.0)


class _Pass:
    """The iterator of a loader. It owns the reader threads and windows."""

    def __init__(self, loader: Loader):
        self._loader = loader
        reading, selection = loader._reading, loader._selection
        self._cutter = Cutter(
            content_tokens=selection.content_tokens,
            kept_tokens=selection.kept_tokens,
            layer=selection.layers[0],
            d_model=loader.shards.d_model,
            dtype=loader._dtype,
            device=reading.device,
            in_order=not loader._order.shuffle,
        )
        self._buffers = Buffers(
            reading, -(-loader._order.max_window_examples // reading.world_size)
        )
        jobs = windows(reading, self._buffers, loader._spans())
        self._prefetcher: Prefetcher[Window] = Prefetcher(
            jobs, n_threads=loader._n_threads, depth=N_BUFFERS
        )
        # Not __del__: this also runs at interpreter exit, while threads can still be joined.
        self._finalizer = weakref.finalize(self, self._prefetcher.close)
        self._window: Window | None = None
        self._next_row = 0
        self._counted_bytes, self._counted_wait = 0, 0.0

    def __iter__(self) -> tp.Self:
        return self

    def __next__(self) -> Batch:
        try:
            batch = self._next_batch()
        except BaseException:
            self.close()
            raise
        if batch is None:
            if self._finalizer.alive:  # the epochs ended; close() was not called
                self._loader._end = None
            self.close()
            raise StopIteration
        return batch

    def _next_batch(self) -> Batch | None:
        if not self._finalizer.alive:
            return None
        self._prefetcher.check()
        wanted = self._wanted()
        if not wanted:
            return None
        act = self._cutter.new(wanted)
        parts: list[Batch] = []
        done = given = 0
        while done < wanted:
            window = self._current()
            if window is None:
                return None
            n = min(wanted - done, window.last - self._next_row)
            start, stop = window.own(self._next_row, self._next_row + n)
            rows = act[given : given + stop - start] if stop - start < wanted else act
            parts.append(self._cutter.gather(window, start, stop, rows))
            done += n
            given += stop - start
            self._next_row += n
            if self._next_row == window.last:
                self._buffers.mark_used(window)
                self._window = None
                self._prefetcher.release()
        self._loader._advance(wanted)
        return join(act[:given] if given < wanted else act, parts)

    def _wanted(self) -> int:
        """Rows of the next batch, over all ranks; 0 after the last batch. Skips empty epochs."""
        loader = self._loader
        while loader._end is None or loader._epoch < loader._end:
            left = loader._usable(loader._epoch) - loader._position
            if left > 0:
                return min(loader.batch_size, left)
            loader._advance(0)
        return 0

    def _current(self) -> Window | None:
        if self._window is None:
            self._window = self._prefetcher.take()
            if self._window is not None:
                self._next_row = self._window.first
        return self._window

    def close(self) -> None:
        self._finalizer()
        self._window = None
        self.count()

    def count(self) -> None:
        """Add the bytes and waiting time since the last call to the loader's counters."""
        counters = self._loader._counters
        n_bytes, wait_s = self._buffers.n_bytes, self._prefetcher.wait_s
        counters.n_bytes += n_bytes - self._counted_bytes
        counters.wait_s += wait_s - self._counted_wait
        self._counted_bytes, self._counted_wait = n_bytes, wait_s

    def fill(self) -> float:
        shares = self._prefetcher.fill()
        if self._loader._order.resident:
            return shares[0] if shares else 0.0
        if shares and self._window is not None:
            left = self._window.last - self._next_row
            shares[0] *= left / max(1, self._window.n_rows)
        return sum(shares) / N_BUFFERS


class _Counters:
    """Bytes and seconds, in total and since the last report."""

    def __init__(self) -> None:
        self.n_bytes, self.wait_s = 0, 0.0
        self._last = (0, 0.0, time.monotonic())

    def report(self, fill: float) -> dict[str, float]:
        n_bytes, wait_s, then = self._last
        now = time.monotonic()
        self._last = (self.n_bytes, self.wait_s, now)
        return {
            "loader/read_mb": self.n_bytes / 1e6,
            "loader/read_mb_s": (self.n_bytes - n_bytes) / 1e6 / max(now - then, 1e-9),
            "loader/buffer_fill": fill,
            "loader/wait_s": self.wait_s - wait_s,
        }


def reader_threads(shards: Shards, n_threads: int) -> int:
    """``n_threads``, or if it is 0, a number that suits the storage."""
    on_disk = storage.local_path(shards.url) is not None
    disk = max(2, min(_DISK_THREADS, cores.available() - 1))
    return n_threads or (disk if on_disk else _STORE_THREADS)


def kept_bytes(shards: Shards, selection: Selection) -> int:
    """Memory of one example in a window, with its share of the index."""
    vector = shards.d_model * shards.dtype.itemsize
    return max(1, selection.kept_tokens * (vector + INDEX_BYTES_PER_TOKEN))


def _check_arguments(batch_size: int, epochs: int | None, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1.")
    if epochs is not None and epochs < 0:
        raise ConfigError(f"epochs is {epochs}, expected None (endless) or at least 0.")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank}, expected 0 to {world_size - 1} (world_size - 1).")


def _device(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"Loaders give batches on cpu or cuda, not on {device}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device}, but torch sees no CUDA GPU here. Use cpu.")
    if device.type == "cuda" and device.index is None:  # the current device differs by thread
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _fingerprint(*parts: tp.Any) -> int:
    """A hash of 52 bits. JSON readers that turn integers into floats do not change it."""
    return int(storage.content_hash(parts, 13), 16)
