"""Tokens per second of `saev inference` beside the bare encode + decode of the same SAE.

    python benchmarks/inference.py [--d-model 768] [--d-sae 24576] [--tokens 40000] [--device cpu]

Random activations and weights in a temporary folder; the page cache is warm. Bare is
`sae.forward` on batches that are already in memory: what a loop without metrics, statistics, top
examples or files would take at least.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from saev import inference, storage
from saev.config import DataConfig, InferenceConfig, Relu, SaeConfig, TopK
from saev.nn import SparseAutoencoder, load_sae
from saev.shards import Metadata, Shards
from saev.shards.parts import ExampleRow, Part, publish, write_part
from saev.shards.protocol import shard_name
from saev.shards.writer import ShardWriter

CONTENT_TOKENS = 196
LAYER = 11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=24_576)
    parser.add_argument("--top-k", type=int, default=32, help="0: ReLU")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--labels", type=int, default=0, help="classes; 0: none")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        shards = write_shards(Path(root), args)
        sae_url = write_sae(Path(root), args)
        bare = bench_bare(shards, sae_url, args)
        print(f"bare encode + decode        {bare:12,.0f} tokens/s")
        for name, kwargs in {
            "inference": {},
            "inference --no-save": {"save": False},
            "  and no concepts": {"save": False, "concepts": False},
        }.items():
            if not args.labels and "concepts" in kwargs:
                continue
            rate = bench_stage(shards, sae_url, storage.join(root, name.strip()), args, kwargs)
            print(f"{name:27s} {rate:12,.0f} tokens/s  {rate / bare:5.2f} of bare")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak resident memory        {peak:12.2f} GiB  (torch {torch.__version__})")


def write_shards(root: Path, args: argparse.Namespace) -> str:
    """Random activations, one layer."""
    n_examples = max(1, args.tokens // CONTENT_TOKENS)
    per_shard = -(-n_examples // args.shards)
    metadata = Metadata(
        family="benchmark", ckpt="random", layers=(LAYER,), cls_token=True, d_model=args.d_model,
        content_tokens_per_example=CONTENT_TOKENS, n_examples=n_examples, data={},
        max_tokens_per_shard=per_shard * (CONTENT_TOKENS + 1),
        pixel_agg="majority" if args.labels else None,
    )  # fmt: skip
    url = storage.join(str(root), metadata.hash)
    storage.write_json(storage.join(url, "metadata.json"), metadata.to_dict())
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    for shard in range(metadata.n_shards):
        first, last = metadata.shard_range(shard)
        n = last - first
        with ShardWriter(storage.join(url, shard_name(shard)), metadata, n) as writer:
            shape = (1, n, CONTENT_TOKENS + 1, args.d_model)
            writer.write(torch.randn(shape, generator=generator))
        rows = [ExampleRow(i, f"{i}", "", 0, 224, 224) for i in range(first, last)]
        labels = None
        if args.labels:
            labels = rng.integers(0, args.labels, (n, CONTENT_TOKENS)).astype(np.uint8)
        write_part(url, shard, Part(writer.written, rows, [], labels))
    publish(url, metadata, metadata.n_shards)
    return url


def write_sae(root: Path, args: argparse.Namespace) -> str:
    activation = TopK(top_k=args.top_k) if args.top_k else Relu()
    cfg = SaeConfig(d_model=args.d_model, d_sae=args.d_sae, activation=activation)
    sae = SparseAutoencoder(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(args.d_sae, args.d_model, generator=generator)
    sae.W_dec.copy_(torch.nn.functional.normalize(rows))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_enc.fill_(0.0 if args.top_k else -2.5)  # about 0.6% of the latents of a ReLU fire
    url = storage.join(str(root), "sae")
    sae.save(url)
    return url


def bench_bare(shards: str, sae_url: str, args: argparse.Namespace) -> float:
    sae = load_sae(sae_url, device=args.device)
    opened = Shards.open(shards)
    acts = torch.cat([
        opened.read(i, LAYER, 0, info.n_examples)[:, 1:].reshape(-1, args.d_model)
        for i, info in enumerate(opened.infos)
    ])  # fmt: skip
    with torch.no_grad():
        sae(acts[: args.batch_size].to(args.device))  # warm up
        _synchronize(args.device)
        began = time.perf_counter()
        for batch in acts.split(args.batch_size):
            sae(batch.to(args.device))
        _synchronize(args.device)
    return len(acts) / (time.perf_counter() - began)


def bench_stage(
    shards: str, sae_url: str, out: str, args: argparse.Namespace, kwargs: dict[str, bool]
) -> float:
    """From a config to a published metrics.json."""
    data = DataConfig(shards=shards, layer=LAYER)
    cfg = InferenceConfig(
        run=sae_url, data=data, out=out, batch_size=args.batch_size, device=args.device, **kwargs
    )
    began = time.perf_counter()
    url = inference.run(cfg)
    seconds = time.perf_counter() - began
    return storage.read_json(storage.join(url, "metrics.json"))["n_tokens"] / seconds


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
