"""How fast and how well the loaders read a local disk, beside the limits of the machine.

    python benchmarks/loader.py                 # the page cache is warm; 3 minutes
    python benchmarks/loader.py --small         # a trial

Writes folders of random activations (one layer, 257 tokens an example) below --root, and measures
in turn, over the same files:

- plain read: every file from its beginning, in pieces of 4 MiB, into one reused buffer of a
  window's size, so that the data end in memory; into memory that is not aligned as the file is (by
  16 bytes, as malloc gives it), as most programs do; and into 8 MiB, which stay in the cache;
- gather: `index_select` of shuffled rows into a reused batch, with all of torch's threads;
- shuffled, ordered: rows/s of the second epoch of a fresh loader (the first also maps memory);
- baseline: torch's DataLoader over IndexedActivations, one read per row.

GB are 10⁹ bytes of the layer, class tokens included, although batches leave them out.
"""

import argparse
import collections
import concurrent.futures
import json
import statistics
import subprocess
import sys
import tempfile
import time
import typing as tp
from collections.abc import Callable

import numpy as np
import torch
from activations import LAYER, Folder, write
from harness import Memory, Report, alternate, invocation, parser, synchronize
from torch.utils.data import DataLoader, RandomSampler

from saev import storage
from saev.config import DataConfig, LoaderConfig
from saev.loaders import IndexedActivations, OrderedLoader, ShuffledLoader, batch_metrics
from saev.loaders.order import permutation
from saev.shards import Shards

PIECE = 4 << 20
CACHED = 8 << 20
GATHERED = 128 << 20
WIDTHS = {384: 1.5e6, 768: 0.7e6}
"""Target in rows/s by width, float32."""
BATCHES = (4096, 16_384)


def layer_bytes(shards: Shards) -> int:
    """Bytes of the recorded layer."""
    return sum(layout.n_examples * layout.row_bytes for layout in shards.layouts)


def plain_read(shards: Shards, buffer: torch.Tensor, n_threads: int = 1) -> float:
    """GB/s of reading the layer into a buffer over and over."""
    index = shards.layer_index(LAYER)
    share = len(buffer) // n_threads

    def read(number: int) -> int:
        view = memoryview(buffer[number * share : (number + 1) * share].numpy().data)
        total = place = 0
        for shard in range(number, len(shards.infos), n_threads):
            layout = shards.layouts[shard]
            size = layout.n_examples * layout.row_bytes
            with storage.RangeReader(storage.join(shards.url, shards.infos[shard].name)) as reader:
                for offset in range(0, size, PIECE):
                    n = min(PIECE, size - offset)
                    place = place if place + n <= share else 0
                    reader.readinto(layout.offset(index, 0) + offset, view[place : place + n])
                    place += n
            total += size
        return total

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
        total = sum(pool.map(read, range(n_threads)))
    return total / 1e9 / (time.perf_counter() - start)


def gather(shards: Shards, batch_size: int) -> Callable[[], float]:
    """Rows/s of a gather and nothing else."""
    n = GATHERED // (shards.d_model * shards.dtype.itemsize)
    data = torch.zeros(n, shards.d_model, dtype=shards.dtype)
    order = torch.from_numpy(permutation(n, seed=0, epoch=0, stream=9))
    out = torch.zeros(batch_size, shards.d_model, dtype=shards.dtype)

    def run() -> float:
        start = time.perf_counter()
        for i in range(0, n - batch_size + 1, batch_size):
            torch.index_select(data, 0, order[i : i + batch_size], out=out)
        return n // batch_size * batch_size / (time.perf_counter() - start)

    return run


def second_epoch(make: Callable[[], ShuffledLoader | OrderedLoader]) -> Callable[[], float]:
    """Rows/s once memory is mapped and the readers are ahead."""

    def run() -> float:
        with make() as loader:
            rows, start = 0, 0.0
            for batch in loader:
                if not start and rows >= loader.n_tokens:
                    synchronize()
                    start, first = time.perf_counter(), rows
                rows += len(batch.act)
            synchronize()
            return (rows - first) / (time.perf_counter() - start)

    return run


def baseline(shards: Shards, batch_size: int, seconds: float) -> float:
    """Rows/s of a DataLoader that reads every row where it lies, over a part of an epoch."""
    dataset = IndexedActivations(shards, DataConfig(layer=LAYER), verify=False)
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(0))
    rows, start = 0, time.perf_counter()
    for item in DataLoader(dataset, batch_size, sampler=sampler, num_workers=2):
        rows += len(item.act)
        if time.perf_counter() - start > seconds:
            break
    return rows / (time.perf_counter() - start)


def speeds(report: Report, args: argparse.Namespace, root: str, d_model: int) -> None:
    """Rows of one width."""
    full, half = (
        Shards.open(write(root, Folder(args.mb / k, d_model, dtype)))
        for k, dtype in ((1, "float32"), (2, "bfloat16"))
    )
    cfg = LoaderConfig(layer=LAYER, buffer_mb=args.mb / 6, n_threads=args.threads)
    window, cached = (
        torch.zeros(n, dtype=torch.uint8) for n in (max(PIECE, int(args.mb / 12 * 2**20)), CACHED)
    )
    odd = torch.zeros(len(window) + 16, dtype=torch.uint8)[16:]
    reads: dict[str, Callable[[], float]] = {
        "plain read into memory": lambda: plain_read(full, window),
        "plain read into memory, 2 threads": lambda: plain_read(full, window, 2),
        "plain read into memory that is not aligned": lambda: plain_read(full, odd),
        "plain read into cache": lambda: plain_read(full, cached),
    }
    found: dict[str, list[float]] = {}
    for size in BATCHES:
        runs = {
            **reads,
            "gather": gather(full, size),
            "shuffled": second_epoch(lambda size=size: ShuffledLoader(full, cfg, size, epochs=2)),
            "shuffled, bfloat16": second_epoch(
                lambda size=size: ShuffledLoader(half, cfg, size, epochs=2)
            ),
            "shuffled, bfloat16 batches": second_epoch(
                lambda size=size: ShuffledLoader(half, cfg, size, epochs=2, dtype=torch.bfloat16)
            ),
            "ordered": second_epoch(
                lambda size=size: OrderedLoader(full, DataConfig(layer=LAYER), size, epochs=2)
            ),
        }
        found = alternate(runs, args.repeats)
        n_gb = layer_bytes(full) / 1e9
        n_rows = full.n_examples * full.content_tokens
        name = f"d {d_model}, batch {size}"
        if size == BATCHES[0]:
            for limit in reads:
                report.add(f"d {d_model}: {limit}", found[limit], "GB/s")
        report.add(f"{name}: gather alone", found["gather"], "rows/s")
        report.add(f"{name}: shuffled", found["shuffled"], "rows/s", at_least=WIDTHS[d_model])
        in_gb = {k: [v / n_rows * n_gb for v in found[k]] for k in ("shuffled", "ordered")}
        plain = found["plain read into memory"]
        report.share(f"{name}: shuffled ÷ plain read", in_gb["shuffled"], plain, at_least=0.4)
        report.share(
            f"{name}: bfloat16 ÷ float32 rows/s", found["shuffled, bfloat16"], found["shuffled"],
            at_least=1.6,
        )  # fmt: skip
        report.share(
            f"{name}: bfloat16, not converted ÷ float32 rows/s",
            found["shuffled, bfloat16 batches"], found["shuffled"],
        )  # fmt: skip
        report.add(f"{name}: ordered", found["ordered"], "rows/s")
        report.share(f"{name}: ordered ÷ plain read", in_gb["ordered"], plain, at_least=0.6)
    slow = [baseline(full, BATCHES[0], 1 if args.small else 5)]
    report.add(f"d {d_model}: DataLoader, one read per row", slow, "rows/s")


# --- In a process of its own: memory, first batch, close -----------------------------------


def child(url: str, buffer_mb: float, n_threads: int) -> None:
    """Print seconds to the first batch, seconds to close, and MB of memory that a loader adds."""
    shards = Shards.open(url)
    cfg = LoaderConfig(layer=LAYER, buffer_mb=buffer_mb, n_threads=n_threads)
    shards.read(0, LAYER, 0, 1)  # checksums are read once, whoever asks first
    held = Memory()
    loader = ShuffledLoader(shards, cfg, BATCHES[1], epochs=2)
    start = time.perf_counter()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - start
    collections.deque(batches, maxlen=0)
    added = held.added()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    start = time.perf_counter()
    loader.close()
    closing = time.perf_counter() - start
    print(json.dumps({"first": first, "close": closing, "added": added}))


def processes(report: Report, args: argparse.Namespace, url: str) -> None:
    """Rows of what needs a fresh process."""
    for buffer_mb in (args.mb / 6, args.mb * 2 / 3):
        command = [sys.executable, __file__, "--child", url, str(buffer_mb), str(args.threads)]
        found = [
            json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            for _ in range(args.repeats)
        ]
        budget = buffer_mb * 2**20 / 1e6
        name = f"windows of {buffer_mb:.0f} MiB"
        report.add(f"{name}: first batch", [f["first"] for f in found], "s", at_most=0.3)
        report.add(f"{name}: close", [f["close"] for f in found], "s", at_most=0.2)
        added = [f["added"] - budget for f in found]
        report.add(f"{name}: peak memory over the budget", added, "MB", at_most=300)


def mixing(report: Report, url: str, args: argparse.Namespace) -> None:
    """Entropy of the examples in batches of 4096, as a share of a perfect shuffle's."""
    shards = Shards.open(url)
    cfg = LoaderConfig(layer=LAYER, buffer_mb=args.mb / 6)
    with ShuffledLoader(shards, cfg, BATCHES[0], epochs=1, drop_last=True) as loader:
        found = [
            batch_metrics(b, n_examples=shards.n_examples, content_tokens=shards.content_tokens)
            for b in loader
        ]
    drawn = np.random.default_rng(0).integers(0, shards.n_examples, BATCHES[0])
    share = np.bincount(drawn) / BATCHES[0]
    ideal = float(-(share[share > 0] * np.log(share[share > 0])).sum())
    entropy = statistics.mean(m["loader/example_entropy"] for m in found)
    report.add("entropy of a batch's examples ÷ that of a perfect shuffle", [entropy / ideal], "×")


def main() -> None:
    """Run and print."""
    made = parser(tp.cast(str, __doc__), repeats=5)
    made.add_argument("--root", default="", help="where to write; a temporary folder if not given")
    made.add_argument("--mb", type=float, default=1500, help="size of a float32 folder")
    made.add_argument("--threads", type=int, default=0, help="reader threads; 0: the default")
    made.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.child:
        child(args.child[0], float(args.child[1]), int(args.child[2]))
        return
    if args.small:
        args.mb = 40
    report = Report(invocation(), args.json)
    with tempfile.TemporaryDirectory(prefix="saev-bench-", dir=args.root or None) as root:
        for d_model in WIDTHS:
            speeds(report, args, root, d_model)
        url = write(root, Folder(args.mb))
        processes(report, args, url)
        mixing(report, url, args)
    report.close()


if __name__ == "__main__":
    main()
