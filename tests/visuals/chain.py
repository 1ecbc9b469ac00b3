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
from saev.images.transforms import ImageSpec
from saev.nn import SparseAutoencoder
from saev.shards import extract
from saev.vit import Tower, register_family

HOSTILE_LABEL = "<script>alert('label')</script>"
HOSTILE_CLASS = '"><img src=x onerror=alert(1)> & co'
D_MODEL = 32
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
        return VisualsConfig.from_dict({"n_latents": 4, "n_top": 3, "image_size": 56, **keys})


class TinyViT(torch.nn.Module):
    """4 x 4 patches of 16 pixels and a class token; its blocks mix channels only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Conv2d(3, D_MODEL, 16, 16)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(D_MODEL, D_MODEL) for _ in range(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x


@register_family("visuals-test")
def tiny(ckpt: str, image_size: tuple[int, int] | None) -> Tower:
    """A family of one; timm alone would take longer to import than all these tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = TinyViT()
    return Tower(module, list(module.blocks), grid=(4, 4), spec=ImageSpec((64, 64), 72))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_png(path: Path, seed: int, size: tuple[int, int] = (80, 64)) -> None:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    storage.write_bytes(str(path), png(pixels))


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


def make_run(run: str, shards: str, d_model: int, seed: int = 0, val_fraction: float = 0.0) -> None:
    """A run folder as training leaves it; DEAD never fires, 1 and 2 do on many patches."""
    cfg = SaeConfig(d_model=d_model, d_sae=D_SAE, activation=TopK(top_k=4))
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(cfg).requires_grad_(False)
    weights = torch.randn(D_SAE, d_model, generator=generator)
    sae.W_dec.copy_(torch.nn.functional.normalize(weights))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_enc[DEAD] = -1e6
    sae.b_enc[1:3] = 0.4
    sae.save(storage.join(run, "checkpoint"))
    data = {"shards": shards, "split": "train" if val_fraction else "all"}
    train = TrainConfig.from_dict(
        {"train_data": {**data, "val_fraction": val_fraction}, "sae": cfg.to_dict()}
    )
    storage.write_json(storage.join(run, "config.json"), train.to_dict())


def make_chain(root: Path, n: int = 8, val_fraction: float = 0.0) -> Chain:
    photos = str(root / "photos")
    write_photos(photos, n)
    shards = extract.run(
        ShardsConfig(
            shards_root=str(root / "shards"), family="visuals-test", ckpt="tiny", layers=(1,),
            batch_size=8, device="cpu",
            data=ImgSegFolder(root=photos),
        )
    )  # fmt: skip
    run = str(root / "runs" / "r0")
    make_run(run, shards, d_model=D_MODEL, val_fraction=val_fraction)
    measured = inference.run(
        InferenceConfig(run=run, data=DataConfig(shards=shards), n_dists=2, device="cpu")
    )
    return Chain(photos, shards, run, measured)
