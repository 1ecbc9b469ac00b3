"""CPU seconds of measuring and showing SAEs one after another, and all of them together.

    python benchmarks/many.py                   # three to four minutes
    python benchmarks/many.py --small           # a trial

The images are the crops of photographs of `make demo`, the activations those of a ViT-S/14 with
random weights. The SAEs' latents are activations of random patches. What is measured: `inference`
and `visuals` (24 latents of 8 images) from configs to published results, for a few SAEs one after
another, and for more SAEs together. CPU seconds count all threads, also those of OpenMP that wait
for work and look for it all the time. Where other jobs run, these take more than a third:

    OMP_WAIT_POLICY=passive python benchmarks/many.py       # without them
"""

import argparse
import tempfile
import time
import typing as tp
from collections.abc import Callable

import torch
from harness import Report, alternate, invocation, parser

from saev import inference, storage, visuals
from saev.config import (
    DataConfig,
    ImgSegFolder,
    InferenceConfig,
    SaeConfig,
    ShardsConfig,
    TopK,
    TrainConfig,
    VisualsConfig,
)
from saev.demo import photos
from saev.nn import SparseAutoencoder
from saev.shards import Shards, extract

TOP_K = 32


def record(root: str, args: argparse.Namespace) -> str:
    """Crops and their activations. Returns the URL of the shards."""
    ckpt, size = ("test_vit", 160) if args.small else ("vit_small_patch14_dinov2", 224)
    crops = photos.write_crops(storage.join(root, "crops"), args.images)
    return extract.run(
        ShardsConfig(
            shards_root=storage.join(root, "shards"), family="timm", ckpt=f"{ckpt}/random",
            image_size=size, layers=(-1,), dtype="float16", device="cpu",
            data=ImgSegFolder(root=crops, split="training"),
        )
    )  # fmt: skip


def write_sae(root: str, shards_url: str, d_sae: int, seed: int) -> str:
    """A run folder."""
    with Shards.open(shards_url) as shards:
        acts = shards.read(0, None, 0, shards.infos[0].n_examples)[:, 1:].flatten(0, 1).float()
        layer = shards.layers[0]
    generator = torch.Generator().manual_seed(seed)
    rows = acts[torch.randperm(len(acts), generator=generator)[:d_sae]]
    cfg = SaeConfig(d_model=acts.shape[1], d_sae=d_sae, activation=TopK(top_k=TOP_K))
    sae = SparseAutoencoder(cfg).requires_grad_(False)
    sae.b_dec.copy_(acts.mean(0))
    sae.W_dec.copy_(torch.nn.functional.normalize(rows - acts.mean(0)))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_enc.copy_(-sae.b_dec @ sae.W_enc)
    url = storage.join(root, "runs", str(seed))
    sae.save(storage.join(url, "checkpoint"))
    keys = {"train_data": {"shards": shards_url, "layer": layer}, "sae": cfg.to_dict()}
    storage.write_json(storage.join(url, "config.json"), TrainConfig.from_dict(keys).to_dict())
    return url


class Timed:
    """Repeats something for some runs, of which nothing is measured or drawn.

    Args:
        do: what.
        runs: URLs of the runs.
    """

    def __init__(self, do: Callable[[tp.Sequence[str]], object], runs: tp.Sequence[str]):
        self._do, self._runs = do, runs

    def __call__(self) -> float:
        """CPU seconds."""
        for run in self._runs:
            place = storage.join(run, "inference")
            if storage.exists(place):
                storage.delete(place, recursive=True)
        start = time.process_time()
        self._do(self._runs)
        return time.process_time() - start


def main() -> None:
    """Run and print."""
    made = parser(tp.cast(str, __doc__), repeats=1)
    made.add_argument("--images", type=int, default=600)
    made.add_argument("--d-sae", type=int, default=768)
    made.add_argument("--few", type=int, default=5, help="SAEs one after another")
    made.add_argument("--many", type=int, default=16, help="SAEs together")
    made.add_argument("--root", default="", help="where to write; a temporary folder if not given")
    args = made.parse_args()
    if args.small:
        args.images, args.d_sae, args.few, args.many = 32, 96, 1, 2
    report = Report(invocation(), args.json)
    with tempfile.TemporaryDirectory(prefix="saev-bench-", dir=args.root or None) as root:
        shards = record(root, args)
        runs = [write_sae(root, shards, args.d_sae, seed) for seed in range(args.many)]
        data = DataConfig(shards=shards)

        def measuring(run: str) -> InferenceConfig:
            return InferenceConfig(run=run, data=data, n_top=8, device="cpu")

        def showing(run: str) -> VisualsConfig:
            return VisualsConfig(run=run, shards=shards, n_latents=24, log_freq_range=(-4.0, -1.0))

        def in_turn(of: tp.Sequence[str]) -> None:
            for run in of:
                inference.run(measuring(run))
            for run in of:
                visuals.run(showing(run))

        def together(of: tp.Sequence[str]) -> None:
            inference.run_all([measuring(run) for run in of])
            visuals.run_all([showing(run) for run in of])

        few, many = f"{args.few} SAEs one after another", f"{args.many} SAEs together"
        ways = {few: Timed(in_turn, runs[: args.few]), many: Timed(together, runs)}
        in_turn(runs[:1])  # imports, and the page cache
        found = alternate(ways, args.repeats, warm_up=False)
        for name in ways:
            report.add(name, found[name], "CPU s")
        pairs = [of / limit for of, limit in zip(found[many], found[few], strict=True)]
        report.add(f"{many} ÷ {few}", pairs, "×", at_most=1.0)
    report.close()


if __name__ == "__main__":
    main()
