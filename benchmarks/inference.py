"""Tokens/s and memory of `saev inference`, beside the bare encode + decode of the same SAE.

    python benchmarks/inference.py              # 15 minutes and 8 GB, most of them for 5 M tokens
    python benchmarks/inference.py --small      # a trial

Random activations and weights; the page cache is warm. Everything is saved: statistics, codes,
distributions, top examples. Measured in turn:

- bare: `sae.forward` on batches that are already in memory, which is what a loop without metrics,
  statistics, top examples or files takes at least, if it keeps codes dense as it does;
- the stage from a config to a published metrics.json;
- the stage with --no-save.

And in processes of their own: the memory that the stage adds for 50 k and for 5 M tokens.
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
from saev.config import DataConfig, InferenceConfig, Relu, SaeConfig, TopK
from saev.nn import SparseAutoencoder, load_sae
from saev.shards import Shards

CONTENT_TOKENS = 256


def folder(n_tokens: float, args: argparse.Namespace) -> Folder:
    """Enough of them for that many tokens."""
    mb = n_tokens * (CONTENT_TOKENS + 1) / CONTENT_TOKENS * args.d_model * 4 / 1e6
    shards = max(2, round(n_tokens / 600_000))
    return Folder(mb, args.d_model, content_tokens=CONTENT_TOKENS, n_shards=shards,
                  n_labels=args.labels)  # fmt: skip


def write_sae(root: str, args: argparse.Namespace) -> str:
    """A random SAE; about 0.6% of the latents of a ReLU fire."""
    activation = TopK(top_k=args.top_k) if args.top_k else Relu()
    cfg = SaeConfig(d_model=args.d_model, d_sae=args.d_sae, activation=activation)
    sae = SparseAutoencoder(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(args.d_sae, args.d_model, generator=generator)
    sae.W_dec.copy_(torch.nn.functional.normalize(rows))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_enc.fill_(0.0 if args.top_k else -2.5)
    url = storage.join(root, "sae")
    sae.save(url)
    return url


def bare(shards_url: str, sae_url: str, args: argparse.Namespace) -> Callable[[], float]:
    """Tokens/s of encode + decode."""
    sae = load_sae(sae_url, device=args.device)
    opened = Shards.open(shards_url)
    acts = opened.read(0, LAYER, 0, opened.infos[0].n_examples)[:, 1:].reshape(-1, args.d_model)

    @torch.no_grad()
    def run() -> float:
        start = time.perf_counter()
        for batch in acts.split(args.batch_size):
            sae(batch.to(args.device))
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        return len(acts) / (time.perf_counter() - start)

    return run


def stage(
    shards_url: str, sae_url: str, out: str, args: argparse.Namespace, *, save: bool = True
) -> Callable[[], float]:
    """Tokens/s of the stage."""
    cfg = InferenceConfig(
        run=sae_url, data=DataConfig(shards=shards_url, layer=LAYER), out=out, save=save,
        batch_size=args.batch_size, device=args.device,
    )  # fmt: skip

    def run() -> float:
        storage.delete(out, recursive=True)
        start = time.perf_counter()
        url = inference.run(cfg)
        seconds = time.perf_counter() - start
        return storage.read_json(storage.join(url, "metrics.json"))["n_tokens"] / seconds

    return run


def child(args: argparse.Namespace) -> None:
    """Print tokens/s of the stage and the MB of memory that it adds."""
    shards_url, sae_url, out = args.child
    inference.run  # noqa: B018 - imports what is imported late
    held = Memory()
    found = stage(shards_url, sae_url, out, args)()
    print(json.dumps({"rate": found, "added": held.added()}))


def memory(report: Report, sae_url: str, root: str, args: argparse.Namespace) -> None:
    """Rows about memory."""
    few, many = (2_000, 8_000) if args.small else (50_000, args.most_tokens)
    added = {}
    for n in (few, many):
        place = storage.join(root, f"tokens-{n}")
        shards_url = write(place, folder(n, args))
        flags = [f"--{k.replace('_', '-')}={getattr(args, k)}" for k in _SHAPE]
        command = [
            sys.executable, __file__, *flags, "--child", shards_url, sae_url,
            storage.join(place, "out"),
        ]  # fmt: skip
        ran = subprocess.run(command, check=True, capture_output=True)
        found = json.loads(ran.stdout)
        added[n] = found["added"]
        report.add(f"{n:,} tokens, everything saved", [found["rate"]], "tokens/s",
                   at_least=12e3 if n >= 50_000 and not args.small else None)  # fmt: skip
        report.add(f"{n:,} tokens: memory added", [found["added"]], "MB")
        storage.delete(place, recursive=True)
    # Flat: 100 times the tokens may not cost more than what a few more pieces in flight take.
    growth = added[many] - added[few]
    report.add(f"memory of {many:,} tokens − that of {few:,}", [growth], "MB", at_most=300)


_SHAPE = ("d_model", "d_sae", "top_k", "batch_size", "device")


def main() -> None:
    """Run and print."""
    made = parser(tp.cast(str, __doc__), repeats=5)
    made.add_argument("--d-model", type=int, default=384)
    made.add_argument("--d-sae", type=int, default=6144)
    made.add_argument("--top-k", type=int, default=32, help="0: ReLU")
    made.add_argument("--tokens", type=int, default=200_000)
    made.add_argument("--most-tokens", type=int, default=5_000_000)
    made.add_argument("--batch-size", type=int, default=8192)
    made.add_argument("--labels", type=int, default=0, help="classes; 0: none")
    made.add_argument("--device", default="cpu")
    made.add_argument("--root", default="", help="where to write; a temporary folder if not given")
    made.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.child:
        child(args)
        return
    if args.small:
        args.tokens, args.d_sae = 4_000, 1536
    report = Report(invocation(), args.json)
    with tempfile.TemporaryDirectory(prefix="saev-bench-", dir=args.root or None) as root:
        shards_url, sae_url = write(root, folder(args.tokens, args)), write_sae(root, args)
        found = alternate(
            {
                "bare": bare(shards_url, sae_url, args),
                "saved": stage(shards_url, sae_url, storage.join(root, "out"), args),
                "unsaved": stage(shards_url, sae_url, storage.join(root, "out"), args, save=False),
            },
            args.repeats,
        )
        name = f"{args.tokens:,} tokens"
        report.add("bare encode + decode, dense", found["bare"], "tokens/s")
        report.add(f"{name}, everything saved", found["saved"], "tokens/s", at_least=12e3)
        report.share(f"{name}, everything saved ÷ bare", found["saved"], found["bare"])
        report.add(f"{name}, --no-save", found["unsaved"], "tokens/s")
        memory(report, sae_url, root, args)
    report.close()


if __name__ == "__main__":
    main()
