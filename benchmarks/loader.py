"""How fast and how well the shuffled loader shuffles, against the storage and a plain DataLoader.

    python benchmarks/loader.py --mb 1000 --buffer-mb 256

Writes a folder of random activations (or takes one with --shards), reads it once so that the page
cache is warm, and then measures in one run, over the same files:

- sequential: the storage's own speed, each file read from its beginning into one reused buffer;
- parts: what the loader adds to that, each alone: checksums, order of rows, gather;
- loader: an epoch of ShuffledLoader, and of OrderedLoader;
- baseline: a torch DataLoader over IndexedActivations, one random read per row;
- mixing: entropies of the loader's batches.

One JSON object per line. MB are 10^6 bytes of the layer that is read, class tokens included.
"""

import argparse
import concurrent.futures
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler

from saev import storage
from saev.config import DataConfig, LoaderConfig
from saev.loaders import IndexedActivations, OrderedLoader, ShuffledLoader, batch_metrics
from saev.loaders.order import permutation
from saev.shards import Metadata, Shards
from saev.shards.protocol import CHECKSUMS, METADATA, SHARDS, shard_name
from saev.shards.reader import TORCH_DTYPES

CHUNK = 8 << 20


def write_folder(url: str, args: argparse.Namespace) -> None:
    """A folder of one layer whose vectors are random."""
    tokens, dtype = args.content_tokens + 1, TORCH_DTYPES[args.dtype]
    row_bytes = tokens * args.d_model * dtype.itemsize
    n_examples = max(args.n_shards, int(args.mb * 1e6) // row_bytes)
    per_shard = -(-n_examples // args.n_shards)
    metadata = Metadata(
        family="random",
        ckpt="random",
        layers=(0,),
        content_tokens_per_example=args.content_tokens,
        cls_token=True,
        d_model=args.d_model,
        n_examples=n_examples,
        max_tokens_per_shard=per_shard * tokens,
        data={},
        dtype=args.dtype,
    )
    infos, checksums = [], []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, tokens, args.d_model, generator=generator).to(dtype)
    rows = noise.view(torch.uint8).numpy().reshape(64, row_bytes)
    for shard in range(metadata.n_shards):
        start, stop = metadata.shard_range(shard)
        with storage.open_write(storage.join(url, shard_name(shard))) as raw:
            file = storage.ChecksumWriter(raw)
            for i in range(start, stop):
                file.write(rows[i % 64])
                checksums.append(storage.crc32c(rows[i % 64]))
        infos.append(
            {
                "name": shard_name(shard),
                "n_examples": stop - start,
                "n_bytes": file.n_bytes,
                "checksum": file.checksum,
            }
        )
    storage.write_bytes(storage.join(url, CHECKSUMS), np.array(checksums, dtype="<u4").tobytes())
    storage.write_json(storage.join(url, METADATA), metadata.to_dict())
    storage.write_json(storage.join(url, SHARDS), infos)


def report(name: str, **values: float | str) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"what": name, **rounded}), flush=True)


def best(run: Callable[[], float], repeats: int) -> float:
    """The largest of some speeds: the others had to share the machine."""
    return max(run() for _ in range(repeats))


def sequential(shards: Shards, layer: int, n_threads: int) -> float:
    """MB/s of reading the layer from first to last byte."""
    index = shards.layer_index(layer)

    def read(shard: int) -> int:
        layout = shards.layouts[shard]
        size = layout.n_examples * layout.row_bytes
        buffer = buffers[shard % n_threads]
        with storage.RangeReader(storage.join(shards.url, shards.infos[shard].name)) as reader:
            for offset in range(0, size, CHUNK):
                part = buffer[: min(CHUNK, size - offset)]
                reader.readinto(layout.offset(index, 0) + offset, part)
        return size

    buffers = [memoryview(bytearray(CHUNK)) for _ in range(n_threads)]
    start = time.perf_counter()
    if n_threads == 1:
        total = sum(map(read, range(len(shards.infos))))
    else:
        with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
            total = sum(pool.map(read, range(len(shards.infos))))
    return total / 1e6 / (time.perf_counter() - start)


def epochs(loader: ShuffledLoader | OrderedLoader, read_mb: float) -> list[dict[str, float]]:
    """Speed of each epoch of one pass; the first includes filling and mapping the first window.

    CPU seconds (of all threads) say what it costs also where other processes share the machine.
    """
    loader.metrics()
    found: list[dict[str, float]] = []
    rows, start, cpu = 0, time.perf_counter(), time.process_time()
    for batch in loader:
        rows += len(batch.act)
        if rows < loader.n_tokens:
            continue
        seconds = time.perf_counter() - start
        counters = loader.metrics()
        found.append(
            {
                "mb_s": read_mb / seconds,
                "rows_s": rows / seconds,
                "wait_s": counters["loader/wait_s"],
                "cpu_s_per_gb": (time.process_time() - cpu) / read_mb * 1e3,
            }
        )
        rows, start, cpu = 0, time.perf_counter(), time.process_time()
    return found


def parts(shards: Shards, args: argparse.Namespace) -> None:
    """Each thing that the loader does beside reading, alone."""
    n = shards.tokens_per_example * min(shards.n_examples, 512)
    data = torch.randn(n, shards.d_model).to(shards.dtype)
    n_bytes, row_bytes = data.nbytes, shards.layouts[0].row_bytes
    raw = memoryview(data.view(-1).view(torch.uint8).numpy().data)
    out = torch.empty(args.batch_size, shards.d_model)
    order = torch.from_numpy(permutation(n, seed=0, epoch=0, stream=9))

    def timed(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return 1 / (time.perf_counter() - start)

    def crc() -> None:
        for offset in range(0, n_bytes, row_bytes):
            storage.crc32c(raw[offset : offset + row_bytes])

    def gather() -> None:
        for i in range(0, n, args.batch_size):
            index = order[i : i + args.batch_size]
            if data.dtype == out.dtype:
                torch.index_select(data, 0, index, out=out[: len(index)])
            else:
                out[: len(index)].copy_(data.index_select(0, index))

    speeds = {
        "crc_mb_s": best(lambda: timed(crc), args.repeats) * n_bytes / 1e6,
        "order_mrows_s": best(
            lambda: timed(lambda: permutation(n, seed=1, epoch=0, stream=9)), args.repeats
        ) * n / 1e6,
        "gather_mb_s": best(lambda: timed(gather), args.repeats) * n_bytes / 1e6,
        "copy_mb_s": best(lambda: timed(data.clone), args.repeats) * n_bytes / 1e6,
    }  # fmt: skip
    report("parts", **speeds)


def baseline(shards: Shards, data: DataConfig, args: argparse.Namespace) -> float:
    """Rows/s of a DataLoader that reads every row where it lies, over a part of an epoch."""
    dataset = IndexedActivations(shards, data, verify=False)
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(dataset, args.batch_size, sampler=sampler, num_workers=args.workers)
    rows, start = 0, time.perf_counter()
    for item in loader:
        rows += len(item.act)
        if time.perf_counter() - start > args.baseline_s:
            break
    return rows / (time.perf_counter() - start)


def mixing(shards: Shards, cfg: LoaderConfig, args: argparse.Namespace) -> None:
    """Entropies of batches of 4096, mean over an epoch, beside those of a perfect shuffle."""
    batches = []
    with ShuffledLoader(shards, cfg, 4096, epochs=1, drop_last=True) as loader:
        for batch in loader:
            batches.append(
                batch_metrics(
                    batch, n_examples=shards.n_examples, content_tokens=shards.content_tokens
                )
            )
    rng = np.random.default_rng(0)
    ideal = []
    for support in (shards.n_examples, shards.content_tokens):
        p = np.bincount(rng.integers(0, support, 4096)) / 4096
        ideal.append(float(-(p[p > 0] * np.log(p[p > 0])).sum() / np.log(support)))
    report(
        "mixing",
        **{k.removeprefix("loader/"): statistics.mean(b[k] for b in batches) for k in batches[0]},
        perfect_example_entropy_normalized=ideal[0],
        perfect_token_entropy_normalized=ideal[1],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shards", default="", help="an existing folder, instead of a random one")
    parser.add_argument("--layer", type=int, default=None)
    parser.add_argument("--root", default="", help="URL below which to write the random folder")
    parser.add_argument("--mb", type=float, default=1000, help="size of the random folder")
    parser.add_argument("--n-shards", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--content-tokens", type=int, default=196)
    parser.add_argument("--dtype", default="float32", choices=sorted(TORCH_DTYPES))
    parser.add_argument("--batch-size", type=int, default=16_384)
    parser.add_argument("--buffer-mb", type=float, default=256)
    parser.add_argument("--block-kb", type=int, default=0)
    parser.add_argument("--threads", type=int, default=4, help="reader threads")
    parser.add_argument("--workers", type=int, default=2, help="processes of the baseline")
    parser.add_argument("--baseline-s", type=float, default=10, help="seconds for the baseline")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    scratch = "" if args.shards or args.root else tempfile.mkdtemp(prefix="saev-bench-")
    url = args.shards or storage.join(args.root or scratch, "loader-benchmark")
    try:
        if not args.shards:
            write_folder(url, args)
        with Shards.open(url) as shards:
            measure(shards, args)
    finally:
        if scratch:
            shutil.rmtree(scratch)


def measure(shards: Shards, args: argparse.Namespace) -> None:
    layer = shards.layers[shards.layer_index(args.layer)]
    data = DataConfig(layer=layer)
    cfg = LoaderConfig(
        layer=layer, buffer_mb=args.buffer_mb, block_kb=args.block_kb, n_threads=args.threads
    )
    read_mb = sum(x.n_examples * x.row_bytes for x in shards.layouts) / 1e6
    report(
        "data", mb=read_mb, examples=shards.n_examples, shards=len(shards.infos),
        dtype=shards.metadata.dtype, torch_threads=torch.get_num_threads(), device="cpu",
    )  # fmt: skip
    sequential(shards, layer, 1)  # warms the page cache
    one = best(lambda: sequential(shards, layer, 1), args.repeats)
    many = best(lambda: sequential(shards, layer, args.threads), args.repeats)
    cpu = time.process_time()
    sequential(shards, layer, 1)
    cpu = (time.process_time() - cpu) / read_mb * 1e3
    report("sequential", mb_s=one, mb_s_all_threads=many, cpu_s_per_gb=cpu)
    parts(shards, args)
    unverified = cfg.model_copy(update={"verify": False})
    n = args.repeats + 1
    fastest = 0.0
    for name, loader in {
        "shuffled": ShuffledLoader(shards, cfg, args.batch_size, epochs=n),
        "shuffled, verify=False": ShuffledLoader(shards, unverified, args.batch_size, epochs=n),
        "ordered": OrderedLoader(shards, data, args.batch_size, epochs=n),
    }.items():
        with loader:
            first, *later = epochs(loader, read_mb)
        run = max(later, key=lambda r: r["mb_s"])
        report(
            name,
            **run,
            first_epoch_mb_s=first["mb_s"],
            read_per_epoch=loader.metrics()["loader/read_mb"] / read_mb / n,
            ratio_to_sequential=run["mb_s"] / one,
            ratio_to_all_threads=run["mb_s"] / many,
        )
        fastest = fastest or run["rows_s"]
    slow = baseline(shards, data, args)
    report("baseline", rows_s=slow, shuffled_is_times_faster=fastest / slow)
    mixing(shards, cfg, args)


if __name__ == "__main__":
    main()
