"""Images per second of `saev shards` beside the bare model, and MB/s of its writer beside the disk.

    python benchmarks/extraction.py [--ckpt vit_small_patch14_dinov2] [--device cpu]   # 6 minutes
    python benchmarks/extraction.py --small                                            # a trial

Images are JPEG files of a common size and untrained weights; nothing else is made up. Measured in
turn:

- bare: the same images, decoded and stacked beforehand, through `forward_features` in batches: no
  decoding, no statistics, no checksums, no files. On the CPU once with all threads in each product,
  and once as `saev shards` computes, with one thread for each of several groups of images;
- recorded: plan, work and finish, from JPEG files to a published folder;
- disk: one file of the same bytes, written from memory in large pieces and flushed to the disk;
- writer: those bytes as activations through ShardWriter: checksums and statistics included.
"""

import argparse
import os
import tempfile
import time
import typing as tp
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import Report, alternate, invocation, parser
from PIL import Image

from saev import driver, storage, vit
from saev.config import ShardsConfig
from saev.images import open_dataset
from saev.shards import Metadata, extract
from saev.shards.forward import CPU_BATCH, Forward
from saev.shards.writer import ShardWriter


def write_images(folder: Path, n: int, pixels: int) -> None:
    """JPEG files that compress as photographs do: smooth shapes and some noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((pixels, pixels * 3 // 4)), np.int16)
        image = image + rng.integers(-9, 9, image.shape, dtype=np.int16)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.jpg")


def recording_runs(cfg: ShardsConfig) -> dict[str, Callable[[], float]]:
    """Images/s of the bare model and of the stage."""
    model = vit.load(cfg.family, cfg.ckpt, image_size=cfg.image_size, device=cfg.device)
    dataset = open_dataset(cfg.data)
    images = torch.stack([model.spec.apply(dataset.load(i)) for i in range(len(dataset))])
    n = len(images)

    @torch.inference_mode()
    def bare() -> float:
        start = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=cfg.amp):
            for batch in images.split(cfg.batch_size):
                model.module.forward_features(batch.to(model.device))
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return n / (time.perf_counter() - start)

    def grouped() -> float:
        forward: Forward[torch.Tensor] = Forward(
            lambda x: model.module.forward_features(x)[None], lambda image: image,
            device=model.device, dtype=torch.float32, batch_size=cfg.batch_size, amp=cfg.amp,
        )  # fmt: skip
        start = time.perf_counter()
        for _ in forward(images):
            pass
        return n / (time.perf_counter() - start)

    def recorded() -> float:
        recording = extract.Recording(cfg)
        recording.model, recording.dataset = model, dataset  # loading them is not recording
        start = time.perf_counter()
        (url,) = driver.run_job(recording).urls
        seconds = time.perf_counter() - start
        storage.delete(url, recursive=True)
        return n / seconds

    return {"bare": bare, "grouped": grouped, "recorded": recorded}


def writing_runs(root: str, mb: float) -> dict[str, Callable[[], float]]:
    """MB/s of the disk and of the writer."""
    tokens, d_model, layers = 257, 384, (0, 1, 2)
    n = max(CPU_BATCH, int(mb * 1e6 / (tokens * d_model * 4 * len(layers))))
    metadata = Metadata(
        family="benchmark", ckpt="random", layers=layers, content_tokens_per_example=tokens - 1,
        cls_token=True, d_model=d_model, n_examples=n, max_tokens_per_shard=n * tokens * 3, data={},
    )  # fmt: skip
    batch = torch.randn(len(layers), CPU_BATCH, tokens, d_model)
    n_batches = n // CPU_BATCH
    written = n_batches * batch.nbytes / 1e6
    raw = memoryview(batch.view(-1).view(torch.uint8).numpy().data)
    place = Path(root) / "written.bin"

    def disk() -> float:
        start = time.perf_counter()
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for _ in range(n_batches):
            os.write(fd, raw)
        os.fsync(fd)
        os.close(fd)
        seconds = time.perf_counter() - start
        place.unlink()
        return written / seconds

    def writer() -> float:
        start = time.perf_counter()
        with ShardWriter(str(place), metadata, n_batches * CPU_BATCH) as out:
            for _ in range(n_batches):
                out.write(batch)
        seconds = time.perf_counter() - start
        place.unlink()
        return written / seconds

    return {"disk": disk, "writer": writer}


def main() -> None:
    """Run and print."""
    made = parser(tp.cast(str, __doc__), repeats=3)
    made.add_argument("--ckpt", default="vit_small_patch14_dinov2")
    made.add_argument("--image-size", type=int, default=224)
    made.add_argument("--n", type=int, default=256, help="images")
    made.add_argument("--pixels", type=int, default=500, help="width of the images before resizing")
    made.add_argument("--layers", type=int, nargs="+", default=[-3, -2, -1])
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--dtype", default="float32")
    made.add_argument("--device", default="cpu")
    made.add_argument("--amp", action="store_true")
    made.add_argument("--mb", type=float, default=1000, help="size of the file that is written")
    made.add_argument("--root", default="", help="where to write; a temporary folder if not given")
    args = made.parse_args()
    if args.small:
        args.n, args.ckpt, args.mb = 16, "vit_tiny_patch16_224", 50
    report = Report(invocation(), args.json)
    with tempfile.TemporaryDirectory(prefix="saev-bench-", dir=args.root or None) as root:
        recording(report, args, root)
        found = alternate(writing_runs(root, args.mb), args.repeats)
    report.add("disk: plain write and flush", found["disk"], "MB/s")
    report.add("writer", found["writer"], "MB/s")
    report.share("writer ÷ disk", found["writer"], found["disk"], at_least=0.8)
    report.close()


def recording(report: Report, args: argparse.Namespace, root: str) -> None:
    """Rows about images per second."""
    images = Path(root) / "images"
    write_images(images, args.n, args.pixels)
    cfg = ShardsConfig.from_dict(
        {
            "shards_root": root,
            "family": "timm",
            "ckpt": f"{args.ckpt}/random",
            "image_size": args.image_size,
            "layers": args.layers,
            "batch_size": args.batch_size,
            "dtype": args.dtype,
            "device": args.device,
            "amp": args.amp,
            "data": {"kind": "img-folder", "root": str(images)},
        }
    )
    found = alternate(recording_runs(cfg), args.repeats)
    report.add("bare model", found["bare"], "images/s")
    report.add("bare model, in saev's groups", found["grouped"], "images/s")
    report.add("recorded", found["recorded"], "images/s")
    report.share("recorded ÷ bare model", found["recorded"], found["bare"], at_least=0.95)


if __name__ == "__main__":
    main()
