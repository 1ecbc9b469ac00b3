"""A small chain for real: labelled images, a tiny untrained ViT, an SAE, inference."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from saev import inference, storage
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
from saev.nn import SparseAutoencoder
from saev.shards import extract

HOSTILE_LABEL = "<script>alert('label')</script>"
HOSTILE_CLASS = '"><img src=x onerror=alert(1)> & co'
D_SAE = 24
DEAD = 5


@dataclasses.dataclass(frozen=True)
class Chain:
    """Where everything is."""

    photos: str
    shards: str
    run: str
    inference: str

    def config(self, **changes: object) -> VisualsConfig:
        keys = {"run": self.run, "shards": self.shards, "log_freq_range": (-6.0, 0.0), **changes}
        return VisualsConfig.from_dict({"n_latents": 4, "n_top": 3, "image_size": 96, **keys})


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_photos(root: str, n: int = 8) -> None:
    """Images of 80 x 64 pixels: noise on the left, a gradient on the right; masks say which."""
    rng = np.random.default_rng(0)
    rows = ["stem,label"]
    for i in range(n):
        pixels = rng.integers(0, 256, (64, 80, 3)).astype(np.uint8)
        pixels[:, 40:] = (np.linspace(0, 255, 40)[None, :, None] + 10 * i).clip(0, 255)
        mask = np.zeros((64, 80), np.uint8)
        mask[:, 40:] = 1 + i % 3
        storage.write_bytes(f"{root}/images/training/a&b {i}.png", png(pixels))
        storage.write_bytes(f"{root}/annotations/training/a&b {i}.png", png(mask))
        rows.append(f"a&b {i},{HOSTILE_LABEL if i % 2 else 'plain'}")
    storage.write_text(f"{root}/labels.csv", "\n".join(rows) + "\n")
    quoted = HOSTILE_CLASS.replace('"', '""')
    storage.write_text(f"{root}/classes.csv", f'label,name\n0,noise\n1,"{quoted}"\n2,ramp\n')


def make_run(run: str, shards: str, d_model: int) -> None:
    """A run folder as training leaves it, whose latent DEAD never fires."""
    cfg = SaeConfig(d_model=d_model, d_sae=D_SAE, activation=TopK(top_k=4))
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(cfg).requires_grad_(False)
    weights = torch.randn(D_SAE, d_model, generator=generator)
    sae.W_dec.copy_(torch.nn.functional.normalize(weights))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_enc[DEAD] = -1e6
    sae.save(storage.join(run, "checkpoint"))
    train = TrainConfig.from_dict({"train_data": {"shards": shards}, "sae": cfg.to_dict()})
    storage.write_json(storage.join(run, "config.json"), train.to_dict())


def make_chain(root: Path) -> Chain:
    photos = str(root / "photos")
    write_photos(photos)
    shards = extract.run(
        ShardsConfig(
            shards_root=str(root / "shards"), family="timm", layers=(1,), image_size=64,
            ckpt="vit_tiny_patch16_224/random", batch_size=8, device="cpu",
            data=ImgSegFolder(root=photos),
        )
    )  # fmt: skip
    run = str(root / "runs" / "r0")
    make_run(run, shards, d_model=192)
    measured = inference.run(
        InferenceConfig(run=run, data=DataConfig(shards=shards), n_dists=2, device="cpu")
    )
    return Chain(photos, shards, run, measured)
