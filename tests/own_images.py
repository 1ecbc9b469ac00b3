"""Images, a small model that recorded them, and an SAE: for `saev look` and the Image page."""

import io
import typing as tp
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from saev import storage
from saev.config import ImgFolder, SaeConfig, ShardsConfig, TopK
from saev.errors import ModelError
from saev.images.transforms import ImageSpec
from saev.inference.image import ImageCodes
from saev.nn import SparseAutoencoder
from saev.shards import Shards, extract
from saev.vit import Tower, register_family

D_MODEL = 32
PHOTO = "turned.jpg"


class Tiny(torch.nn.Module):
    """4 x 4 patches of 16 pixels and a class token."""

    n_passes = 0

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Conv2d(3, D_MODEL, 16, 16)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(D_MODEL, D_MODEL) for _ in range(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        Tiny.n_passes += 1
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x


@register_family("image-test")
def tiny(ckpt: str, image_size: tuple[int, int] | None) -> Tower:
    """The checkpoint is the seed of the weights."""
    if not ckpt.isdigit():
        raise ModelError(f"image-test has no checkpoint {ckpt!r}.")
    with torch.random.fork_rng():
        torch.manual_seed(int(ckpt))
        module = Tiny()
    return Tower(module, list(module.blocks), grid=(4, 4), spec=ImageSpec((64, 64), 72))


def encoded(image: Image.Image, kind: str = "JPEG", **options: tp.Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    """Smooth enough that JPEG keeps it."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8, width // 8, channels), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_photos(root: Path) -> str:
    """Images that are treated differently: turned by EXIF, transparent, grey, of another shape."""
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        PHOTO: encoded(noise(320, 240, seed=1), exif=exif),
        "see-through.png": encoded(noise(240, 320, 4, seed=2), "PNG"),
        "grey.png": encoded(noise(264, 232, seed=3).convert("L"), "PNG"),
        "wide.webp": encoded(noise(640, 200, seed=4), "WEBP"),
    }
    for name, data in files.items():
        storage.write_bytes(str(root / name), data)
    return str(root)


def make_run(
    run: str,
    shards: Shards,
    layer: int,
    *,
    tokens: str = "content",
    d_sae: int = 48,
    k: int = 4,
) -> str:
    """A run folder as training leaves it, whose SAE is random around the mean of the tokens."""
    cfg = SaeConfig(d_model=shards.d_model, d_sae=d_sae, activation=TopK(top_k=k))
    generator = torch.Generator().manual_seed(layer)
    sae = SparseAutoencoder(cfg).requires_grad_(False)
    rows = torch.randn(d_sae, shards.d_model, generator=generator)
    sae.W_dec.copy_(torch.nn.functional.normalize(rows))
    sae.W_enc.copy_(sae.W_dec.T)
    mean = shards.read(0, layer, 0, shards.n_examples).float().mean((0, 1))
    sae.b_dec.copy_(mean)
    sae.b_enc.copy_(-mean @ sae.W_enc)
    source = shards.metadata.source(layer, tp.cast(tp.Any, tokens))
    sae.save(storage.join(run, "checkpoint"), source.to_dict())
    data = {"shards": shards.url, "layer": layer, "tokens": tokens}
    storage.write_json(storage.join(run, "config.json"), {"train_data": data, "sae": cfg.to_dict()})
    return run


class Recorded(tp.NamedTuple):
    photos: str
    shards: Shards
    run: str
    """Of layer 1, content tokens."""


def record(root: Path, photos: str, **changes: tp.Any) -> Shards:
    keys = {"family": "image-test", "ckpt": "0", "layers": (0, 1), "device": "cpu", **changes}
    cfg = ShardsConfig(shards_root=str(root / "shards"), data=ImgFolder(root=photos), **keys)
    return Shards.open(extract.run(cfg))


def make_recorded(root: Path) -> Recorded:
    """Write the images, record them, and make a run of layer 1."""
    photos = write_photos(root / "photos")
    shards = record(root, photos)
    return Recorded(photos, shards, make_run(str(root / "runs/r1"), shards, 1))


def dense_of(codes: ImageCodes) -> np.ndarray:
    """Values of the class token and of each patch, [1 + patches, d_sae]."""
    out = np.zeros((1 + codes.shape[0] * codes.shape[1], codes.d_sae))
    out[codes.patches + 1, codes.latents] = codes.values
    return out
