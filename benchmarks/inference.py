"""Tokens/s and memory of `saev inference`, beside the encoder's product and selection alone.

    python benchmarks/inference.py                          # four to five minutes
    python benchmarks/inference.py --most-tokens 5000000    # and three more, with 4 GB on a disk
    python benchmarks/inference.py --small                  # a trial

Random activations and weights; the page cache is warm. Measured in turn:

- bare: `sae.forward` on batches that are already in memory, which is what a loop without metrics,
  statistics, top examples or files takes at least, if it keeps codes dense as it does;
- product and selection: the codes of batches that are already in memory, without a reconstruction;
- the stage from configs to published results, for one SAE and for eight in one pass: everything
  saved (statistics, codes, distributions, top examples), and statistics only (--no-save).

It also counts the bytes of activations that a pass with all SAEs reads, as a multiple of the layer.
SAE-tokens/s are tokens/s times the number of SAEs. CPU seconds count all threads; on a machine that
others use, too, their shares say more than those of rates.

And in processes of their own: the most resident memory that the stage adds for 50 k, 500 k and more
tokens, and for several SAEs. These have activations of width 64, because memory is taken by codes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import typing as tp
from collections.abc import Callable

import torch
from activations import LAYER, Folder, write
from harness import Memory, Report, alternate, invocation, parser

from saev import inference, storage
from saev.config import DataConfig, InferenceConfig, Relu, SaeConfig, TopK, TrainConfig
from saev.nn import SparseAutoencoder, codes, load_sae
from saev.shards import Shards

CONTENT_TOKENS = 256
MEMORY_D_MODEL = 64
"""Width of the activations where memory is measured."""


def folder(n_tokens: float, args: argparse.Namespace) -> Folder:
    """Enough of them for that many tokens."""
    mb = n_tokens * (CONTENT_TOKENS + 1) / CONTENT_TOKENS * args.d_model * 4 / 1e6
    shards = max(2, round(n_tokens / 600_000))
    return Folder(mb, args.d_model, content_tokens=CONTENT_TOKENS, n_shards=shards,
                  n_labels=args.labels)  # fmt: skip


def write_sae(root: str, shards: str, args: argparse.Namespace, seed: int = 0) -> str:
    """A run folder of a random SAE; about 0.6% of the latents of a ReLU fire."""
    activation = TopK(top_k=args.top_k) if args.top_k else Relu()
    cfg = SaeConfig(d_model=args.d_model, d_sae=args.d_sae, activation=activation)
    sae = SparseAutoencoder(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(args.d_sae, args.d_model, generator=generator)
    sae.W_dec.copy_(torch.nn.functional.normalize(rows))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_enc.fill_(0.0 if args.top_k else -2.5)
    url = storage.join(root, "runs", str(seed))
    sae.save(storage.join(url, "checkpoint"))
    keys = {"train_data": {"shards": shards, "layer": LAYER}, "sae": cfg.to_dict()}
    storage.write_json(storage.join(url, "config.json"), TrainConfig.from_dict(keys).to_dict())
    return url


class Timed:
    """Repeats something, which returns the number of its SAE-tokens, and keeps CPU times, too."""

    def __init__(self, do: Callable[[], int]):
        self._do = do
        self.cpu: list[float] = []
        """Microseconds per SAE-token, of every call."""

    def __call__(self) -> float:
        """SAE-tokens/s."""
        start, cpu = time.perf_counter(), time.process_time()
        n = self._do()
        self.cpu.append((time.process_time() - cpu) / n * 1e6)
        return n / (time.perf_counter() - start)


def in_memory(
    shards_url: str,
    run: str,
    args: argparse.Namespace,
    do: Callable[[SparseAutoencoder, tp.Any], object],
) -> Timed:
    """Something with batches that are in memory already."""
    sae = load_sae(run, device=args.device)
    opened = Shards.open(shards_url)
    acts = opened.read(0, LAYER, 0, opened.infos[0].n_examples)[:, 1:].reshape(-1, args.d_model)

    @torch.no_grad()
    def work() -> int:
        for batch in acts.split(args.batch_size):
            do(sae, batch.to(args.device))
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        return len(acts)

    return Timed(work)


def select(sae: SparseAutoencoder, x: torch.Tensor) -> None:
    """Product and selection, as the stage does them."""
    for part in x.split(len(x) if x.is_cuda else codes.chunk_rows(sae)):
        codes.select(sae, part)


def stage(
    shards_url: str, runs: tp.Sequence[str], args: argparse.Namespace, *, save: bool = True
) -> Timed:
    """The stage."""
    data = DataConfig(shards=shards_url, layer=LAYER)
    cfgs = [
        InferenceConfig(
            run=run, data=data, save=save, batch_size=args.batch_size, device=args.device
        )
        for run in runs
    ]  # fmt: skip

    def work() -> int:
        for run in runs:
            storage.delete(storage.join(run, "inference"), recursive=True)
        urls = inference.run_all(cfgs)
        found = [storage.read_json(storage.join(url, "metrics.json")) for url in urls]
        return sum(metrics["n_tokens"] for metrics in found)

    return Timed(work)


def child(args: argparse.Namespace) -> None:
    """Print SAE-tokens/s of the stage and the MB of memory that it adds."""
    shards_url, *runs = args.child
    inference.run_all([])  # imports what is imported late
    held = Memory()
    found = stage(shards_url, runs, args)()
    print(json.dumps({"rate": found, "added": held.added()}))


def memory(report: Report, root: str, args: argparse.Namespace) -> None:
    """Rows about memory."""
    shape = argparse.Namespace(**{**vars(args), "d_model": MEMORY_D_MODEL})
    sizes = (2_000, 8_000) if args.small else (50_000, 500_000, args.most_tokens)
    sizes = tuple(n for n in sizes if n <= max(sizes[1], args.most_tokens))
    few, many = sizes[0], max(sizes)
    several = 2 if args.small else 4
    added = {}
    for n, n_saes in [*((n, 1) for n in sorted(set(sizes))), (few, several)]:
        place = storage.join(root, f"tokens-{n}-{n_saes}")
        shards_url = write(place, folder(n, shape))
        runs = [write_sae(place, shards_url, shape, seed) for seed in range(n_saes)]
        flags = [f"--{k.replace('_', '-')}={getattr(shape, k)}" for k in _SHAPE]
        command = [sys.executable, __file__, *flags, "--child", shards_url, *runs]
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        added[n, n_saes] = json.loads(ran.stdout)["added"]
        what = f"{n:,} tokens, N = {n_saes}, everything saved: memory added"
        report.add(what, [added[n, n_saes]], "MB")
        storage.delete(place, recursive=True)
    growth = added[many, 1] - added[few, 1]
    report.add(f"memory of {many:,} tokens − that of {few:,}", [growth], "MB", at_most=300)
    more = (added[few, several] - added[few, 1]) / (several - 1)
    report.add("memory of one more SAE", [more], "MB")


def reads(shards_url: str, runs: tp.Sequence[str], args: argparse.Namespace) -> float:
    """Bytes of activations that one pass reads, as a multiple of the layer."""
    n_bytes = 0
    readinto = storage.RangeReader.readinto

    def counted(self: storage.RangeReader, offset: int, buffer: memoryview) -> None:
        nonlocal n_bytes
        if storage.name(self.url).startswith("acts"):
            n_bytes += memoryview(buffer).nbytes
        readinto(self, offset, buffer)

    storage.RangeReader.readinto = counted  # type: ignore[method-assign]
    try:
        stage(shards_url, runs, args, save=False)()
    finally:
        storage.RangeReader.readinto = readinto  # type: ignore[method-assign]
    with Shards.open(shards_url) as shards:
        return n_bytes / sum(layout.n_examples * layout.row_bytes for layout in shards.layouts)


_SHAPE = ("d_model", "d_sae", "top_k", "batch_size", "device")


def main() -> None:
    """Run and print."""
    made = parser(tp.cast(str, __doc__), repeats=2)
    made.add_argument("--d-model", type=int, default=384)
    made.add_argument("--d-sae", type=int, default=6144)
    made.add_argument("--top-k", type=int, default=32, help="0: ReLU")
    made.add_argument("--tokens", type=int, default=100_000)
    made.add_argument("--most-tokens", type=int, default=500_000)
    made.add_argument("--batch-size", type=int, default=8192)
    made.add_argument("--labels", type=int, default=0, help="classes; 0: none")
    made.add_argument("--device", default="cpu")
    made.add_argument("--root", default="", help="where to write; a temporary folder if not given")
    made.add_argument("--saes", type=int, default=8, help="SAEs in one pass")
    made.add_argument("--no-memory", action="store_true", help="leave out the rows of memory")
    made.add_argument("--no-rates", action="store_true", help="leave out the rows of time")
    made.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.child:
        child(args)
        return
    if args.small:
        args.tokens, args.d_sae, args.saes = 4_000, 1536, 2
    report = Report(invocation(), args.json)
    with tempfile.TemporaryDirectory(prefix="saev-bench-", dir=args.root or None) as root:
        shards_url = write(root, folder(args.tokens, args))
        runs = [write_sae(root, shards_url, args, seed) for seed in range(args.saes)]
        if not args.no_rates:
            rates(report, shards_url, runs, args)
        if not args.no_memory:
            memory(report, root, args)
    report.close()


def rates(
    report: Report, shards_url: str, runs: tp.Sequence[str], args: argparse.Namespace
) -> None:
    """Rows about time."""
    several = f"N = {len(runs)}"
    ways = {
        "bare encode + decode, dense": in_memory(
            shards_url, runs[0], args, lambda sae, x: sae(x)
        ),
        "product and selection": in_memory(shards_url, runs[0], args, select),
        "N = 1, statistics only": stage(shards_url, runs[:1], args, save=False),
        "N = 1, everything saved": stage(shards_url, runs[:1], args),
        f"{several}, statistics only": stage(shards_url, runs, args, save=False),
        f"{several}, everything saved": stage(shards_url, runs, args),
    }  # fmt: skip
    ways["N = 1, everything saved"]()  # imports, and the page cache
    for way in ways.values():
        way.cpu.clear()
    found = alternate(ways, args.repeats, warm_up=False)
    for name in ways:
        report.add(name, found[name], "SAE-tokens/s")
    n = reads(shards_url, runs, args)
    at_most = None if args.small else 1.05  # of little data, the sample of latents is a large part
    report.add(f"{several}: bytes read ÷ bytes of the layer", [n], "×", at_most=at_most)
    _, limit, *stages = ways
    selecting = ways[limit]
    for name in stages:
        way = ways[name]
        target = 0.8 if "only" in name else 0.65
        report.share(f"{name} ÷ product and selection", found[name], found[limit], at_least=target)
        shares = [of / cpu for of, cpu in zip(selecting.cpu, way.cpu, strict=True)]
        report.add(f"{name}: the same share of CPU seconds", shares, "×", at_least=target)


if __name__ == "__main__":
    main()
