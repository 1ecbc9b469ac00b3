"""An image of one's own in the live explorer: from its bytes to its latents.

    python benchmarks/own_image.py            # DINOv2 ViT-S/14 at 224 and 518 pixels; minutes
    python benchmarks/own_image.py --small    # a trial, with a tiny network

For each size, a few made images are recorded, an SAE of 6,144 latents (TopK 32) is trained for a
moment and measured, and `saev serve` starts in a process of its own. A JPEG of 12 megapixels, as a
phone takes it, is then sent. The first image waits for Python's packages, the weights and the SAE,
all in the page cache; the later ones for the model only. Times are until the whole answer is there.
The weights are those of the demo.
"""

import contextlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import typing as tp
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from harness import Report, invocation, parser
from PIL import Image

from saev import inference, storage, train
from saev.config import (
    DataConfig,
    ImgFolder,
    InferenceConfig,
    LoaderConfig,
    SaeConfig,
    ShardsConfig,
    TopK,
    TrainConfig,
)
from saev.demo import weights
from saev.serve.catalogue import Catalogue
from saev.shards import extract

N_IMAGES = 6
TARGETS = {224: 1.0, 518: 3.0}
"""Seconds of a later image, on two idle cores."""
FIRST_TARGET = 10.0


def photo(seed: int, width: int, height: int) -> bytes:
    """A JPEG that compresses about as a photograph does."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    image = Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_root(root: Path, family: str, ckpt: str, size: int, d_sae: int) -> str:
    """Record, train and measure. Returns the SAE's key in addresses."""
    for i in range(N_IMAGES):
        storage.write_bytes(str(root / "photos" / f"{i}.jpg"), photo(i, 800, 600))
    shards = extract.run(
        ShardsConfig(
            shards_root=str(root / "shards"), family=family, ckpt=ckpt, image_size=size,
            layers=(-1,), device="cpu", data=ImgFolder(root=str(root / "photos")),
        )
    )  # fmt: skip
    cfg = TrainConfig(
        runs_root=str(root / "runs"), n_train=2_000, batch_size=500, device="cpu",
        sae=SaeConfig(d_sae=d_sae, activation=TopK(top_k=32)),
        train_data=LoaderConfig(shards=shards),
    )  # fmt: skip
    (run,) = train.run(cfg)
    inference.run(InferenceConfig(run=run, data=DataConfig(shards=shards), device="cpu"))
    return next(entry.key for entry in Catalogue.of(str(root)).entries() if entry.results)


@contextlib.contextmanager
def serving(root: Path) -> Iterator[str]:
    """The address of `saev serve`, in a process of its own."""
    command = [sys.executable, "-m", "saev", "serve", "--root", str(root), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert process.stdout
        yield process.stdout.readline().strip()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


class Answer(tp.NamedTuple):
    """How long an answer took, in seconds."""

    first_word: float
    """Until the first line."""
    whole: float


def send(address: str, key: str, data: bytes) -> Answer:
    """Send an image."""
    place = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(place.netloc, timeout=600)
    start = time.perf_counter()
    connection.request("POST", f"/api/runs/{key}/own?name=a.jpg", body=data)
    answer = connection.getresponse()
    answer.readline()
    first = time.perf_counter() - start
    last = answer.read().splitlines()[-1]
    whole = time.perf_counter() - start
    assert "image" in json.loads(last), last[:500]
    connection.close()
    return Answer(first, whole)


def main() -> None:
    """Measure, print, write."""
    args = parser(__doc__, repeats=10).parse_args()
    report = Report(invocation(), args.json)
    data = photo(99, *((640, 480) if args.small else (4000, 3000)))
    with tempfile.TemporaryDirectory(prefix="saev-bench-") as made:
        folder = Path(made)
        if args.small:
            family, ckpt, sizes, d_sae = "timm", "test_vit/random", {64: None}, 128
        else:
            url = weights.write_weights(str(folder / "dinov2_vits14.safetensors"))
            family, ckpt, sizes, d_sae = "dinov2", f"vits14@{url}", TARGETS, 6144
        for size, target in sizes.items():
            root = folder / str(size)
            key = make_root(root, family, ckpt, size, d_sae)
            with serving(root) as address:
                first = send(address, key, data)
                later = [send(address, key, data).whole for _ in range(args.repeats)]
            what = f"{size} pixels"
            report.add(f"first word, {what}", [first.first_word], "s")
            report.add(f"first image, {what}", [first.whole], "s", at_most=FIRST_TARGET)
            report.add(f"later image, {what}", later, "s", at_most=target)
    report.close()


if __name__ == "__main__":
    main()
