"""Whether SAEs have the L0 that was asked for, on images that they were not trained on.

    python benchmarks/sparsity.py                        # 10M tokens; minutes on a GPU
    python benchmarks/sparsity.py --shards URL --n-train 300_000 --d-sae 1536    # your own shards
    python benchmarks/sparsity.py --small --device cpu   # a trial anywhere

For each activation and each target, three seeds, all trained on one pass as `saev train` does it.
Without --shards, a folder is made first: each image has a few directions of a dictionary, the
frequencies of directions fall as 1/rank, tokens have some of their image's directions with
log-normal strengths, neighbours are alike, and there is noise. An eighth of the images is held out.

The rows of each activation and target, over the seeds: the largest miss of held-out L0 from its
target, which is to be below 10%; L0 on held-out tokens, on training tokens, and before calibration;
NMSE; and the share of latents that never fire on held-out tokens.
"""

import argparse
import tempfile
import typing as tp

import torch
from harness import Report, invocation, parser

from saev import storage, train
from saev.config import LoaderConfig, SaeConfig, TrainConfig
from saev.progress import Progress
from saev.shards import Metadata
from saev.shards.parts import ExampleRow, Part, publish, write_part
from saev.shards.protocol import shard_name
from saev.shards.writer import ShardWriter

LAYER, TOKENS, ACTIVE, OF_IMAGE = 11, 196, 24, 64
SEEDS = (0, 1, 2)


def write(root: str, n_images: int, d_model: int, n_features: int, device: str) -> str:
    """A folder of such activations below ``root``; returns its URL."""
    metadata = Metadata(
        family="benchmark", ckpt="sparse", layers=(LAYER,), content_tokens_per_example=TOKENS,
        cls_token=False, d_model=d_model, n_examples=n_images,
        max_tokens_per_shard=-(-n_images // 4) * TOKENS, data={}, dtype="bfloat16",
    )  # fmt: skip
    url = storage.join(root, metadata.hash)
    storage.write_json(storage.join(url, "metadata.json"), metadata.to_dict())
    generator = torch.Generator(device).manual_seed(0)
    dictionary = torch.randn(n_features, d_model, generator=generator, device=device)
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    mean = torch.randn(d_model, generator=generator, device=device)
    chance = 1 / torch.arange(1, n_features + 1, device=device)
    for shard in range(metadata.n_shards):
        first, last = metadata.shard_range(shard)
        with ShardWriter(storage.join(url, shard_name(shard)), metadata, last - first) as writer:
            for start in range(first, last, 64):
                n = min(64, last - start)
                acts = images(n, dictionary, chance, generator) + mean
                writer.write(acts[None].to("cpu", torch.bfloat16))
        rows = [ExampleRow(i, f"{i}", "", 0, 224, 224) for i in range(first, last)]
        write_part(url, shard, Part(writer.written, rows, [], None))
    publish(url, metadata, metadata.n_shards)
    return url


def images(
    n: int, dictionary: torch.Tensor, chance: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Activations of some images, float32 [n, TOKENS, d_model]."""
    kwargs: dict[str, tp.Any] = {"generator": generator, "device": dictionary.device}
    own = chance.expand(n, -1).multinomial(OF_IMAGE, generator=generator)
    score = torch.randn(n, TOKENS, OF_IMAGE, **kwargs)
    for _ in range(3):  # a token has much of what the one before it has
        score = (score + score.roll(1, 1)) / 2**0.5
    kept = torch.zeros_like(score).scatter_(-1, score.topk(ACTIVE, dim=-1).indices, 1.0)
    kept *= torch.rand(n, TOKENS, 1, **kwargs) > torch.rand(OF_IMAGE, **kwargs) * 0.7
    strength = torch.randn(n, TOKENS, OF_IMAGE, **kwargs).mul_(0.5).exp_()
    x = torch.bmm(kept * strength, dictionary[own])
    return x + 0.02 * torch.randn(x.shape, **kwargs)


def sweep(targets: tp.Sequence[int]) -> dict[str, tp.Any]:
    """The SAEs."""
    return {
        "seed": list(SEEDS),
        "grid": [
            {
                "sae": {"activation": {"kind": ["jump-relu", "relu"]}},
                "objective": {"target_l0": [*targets]},
            },
            {"sae": {"activation": {"kind": "batch-top-k", "top_k": [*targets]}}},
        ],
    }


class Found(tp.NamedTuple):
    """What one SAE came to."""

    held_out: float
    training: float
    before: float
    nmse: float
    dead: float


def measure(args: argparse.Namespace, shards: str, root: str) -> dict[tuple[str, int], list[Found]]:
    """Train all SAEs. Returns what each seed gave, by activation and target."""
    cfg = TrainConfig(
        runs_root=storage.join(root, "runs"),
        train_data=LoaderConfig(shards=shards, val_fraction=0.125),
        n_train=args.n_train,
        n_val=args.n_val,
        sae=SaeConfig(d_sae=args.d_sae),
        device=args.device,
        log_every=200,
        checkpoint_minutes=0,
    )
    found: dict[tuple[str, int], list[Found]] = {}
    with Progress() as progress:
        for url in train.run(cfg, progress=progress, table=sweep(args.targets)):
            config = TrainConfig.of_run(url)
            record = storage.read_json(storage.join(url, "run.json"))
            held_out, calibration = record["metrics"], record["calibration"]
            key = (config.sae.activation.kind, int(calibration["target_l0"]))
            found.setdefault(key, []).append(
                Found(
                    held_out["l0"],
                    record["train_metrics"]["l0"],
                    calibration["l0_before"],
                    held_out["normalized_mse"],
                    held_out["n_dead"] / held_out["n_latents"],
                )
            )
    return found


def main() -> None:
    """Run and print."""
    made = parser(tp.cast(str, __doc__), repeats=1)
    made.add_argument("--shards", default="", help="activations to use instead of made ones")
    made.add_argument("--targets", type=int, nargs="+", default=[16, 32, 64])
    made.add_argument("--n-train", type=int, default=10_000_000)
    made.add_argument("--n-val", type=int, default=200_000)
    made.add_argument("--d-model", type=int, default=384)
    made.add_argument("--d-sae", type=int, default=3072)
    made.add_argument("--n-images", type=int, default=6000)
    made.add_argument("--device", default="auto")
    made.add_argument("--root", default="", help="where to write; a temporary folder if not given")
    args = made.parse_args()
    if args.small:
        args.n_train, args.n_val, args.n_images, args.targets = 20_000, 3000, 60, [8]
        args.d_model, args.d_sae = 32, 96
    report = Report(invocation(), args.json)
    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    with tempfile.TemporaryDirectory(prefix="saev-bench-", dir=args.root or None) as root:
        shards = args.shards
        if not shards:
            shards = write(root, args.n_images, args.d_model, 4 * args.d_model, device)
        for (kind, target), seeds in measure(args, shards, root).items():
            misses = [abs(s.held_out / target - 1) for s in seeds]
            name = f"{kind}, target {target}"
            report.add(
                f"{name}: largest miss of L0, held out", [100 * max(misses)], "%", at_most=10
            )
            report.add("  L0 on held-out tokens", [s.held_out for s in seeds], "")
            report.add("  L0 on training tokens", [s.training for s in seeds], "")
            report.add("  L0 on held-out tokens before", [s.before for s in seeds], "")
            report.add("  NMSE on held-out tokens", [s.nmse for s in seeds], "")
            report.add("  never firing on held-out tokens", [100 * s.dead for s in seeds], "%")
    report.close()


if __name__ == "__main__":
    main()
