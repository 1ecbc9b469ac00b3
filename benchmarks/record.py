"""Images per second of `saev shards` beside the bare forward pass of the same model.

    python benchmarks/record.py [--ckpt vit_small_patch14_dinov2] [--n 256] [--device cpu]

Generated images, untrained weights, a temporary folder. Bare is the same images, decoded and
stacked beforehand, through `forward_features` in batches, with all threads of the machine in each
product: no decoding, no statistics, no checksums, no files. The two alternate, and the best of
each counts, because other programs only ever make them slower.
"""

import argparse
import tempfile
import time

import torch

from saev import storage, vit
from saev.config import ShardsConfig
from saev.images import open_dataset
from saev.shards import Shards, extract


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default="vit_small_patch14_dinov2")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--n", type=int, default=96, help="images")
    parser.add_argument(
        "--pixels", type=int, default=500, help="side of the images before resizing"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[-3, -2, -1])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--root", help="where to write; a temporary folder if not given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cfg = ShardsConfig.from_dict(
            {
                "shards_root": args.root or temporary,
                "family": "timm",
                "ckpt": f"{args.ckpt}/random",
                "image_size": args.image_size,
                "layers": args.layers,
                "batch_size": args.batch_size,
                "dtype": args.dtype,
                "device": args.device,
                "amp": args.amp,
                "data": {"kind": "fake-img", "n_examples": args.n, "image_size": args.pixels},
            }
        )
        compare(cfg, args.repeats)


def compare(cfg: ShardsConfig, repeats: int) -> None:
    """Print both speeds and their ratio."""
    model = vit.load(cfg.family, cfg.ckpt, image_size=cfg.image_size, device=cfg.device)
    dataset = open_dataset(cfg.data)
    images = torch.stack([model.spec.apply(dataset.load(i)) for i in range(len(dataset))])
    seconds: dict[str, list[float]] = {"bare": [], "recorded": []}
    n_bytes = 0
    bare(model, images[: cfg.batch_size], cfg)  # warm up
    for _ in range(repeats):
        seconds["bare"].append(bare(model, images, cfg))
        recording = extract.Recording(cfg)
        recording.model, recording.dataset = model, dataset  # loading them is not recording
        items = recording.plan()
        started = time.perf_counter()
        for item in items:
            recording.work(item)
        url = recording.finish()
        seconds["recorded"].append(time.perf_counter() - started)
        n_bytes = sum(info.n_bytes or 0 for info in Shards.open(url).infos)
        storage.delete(url, recursive=True)
    n = len(images)
    for name, times in seconds.items():
        rate = f", {n_bytes / 1e6 / min(times):.1f} MB/s" if name == "recorded" else ""
        print(f"{name:>9}: {n / min(times):8.1f} img/s{rate}")
    print(f"    ratio: {min(seconds['bare']) / min(seconds['recorded']):8.2f}")


@torch.inference_mode()
def bare(model: vit.VisionModel, images: torch.Tensor, cfg: ShardsConfig) -> float:
    """Seconds of the forward pass alone."""
    started = time.perf_counter()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=cfg.amp):
        for batch in images.split(cfg.batch_size):
            model.module.forward_features(batch.to(model.device))
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
