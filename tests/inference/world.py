"""Small recorded datasets and SAEs, and the same results by brute force."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from saev import storage
from saev.config import SaeConfig, TopK, TrainConfig
from saev.nn import SparseAutoencoder
from saev.shards import Metadata
from saev.shards.parts import ExampleRow, Part, publish, write_part
from saev.shards.protocol import shard_name
from saev.shards.writer import ShardWriter

LAYERS = (3, 7)
LAYER = 7


@dataclasses.dataclass(frozen=True)
class World:
    """A shards folder, a run folder, and what they were made of."""

    shards: str
    run: str
    acts: np.ndarray
    """Of LAYER, as recorded, float32 [n_examples, 1 + content_tokens, d_model]."""
    labels: np.ndarray | None
    """uint8 [n_examples, content_tokens]."""
    classes: np.ndarray | None = None
    """Class of each image, int64 [n_examples]; without classes all 0."""

    @property
    def sae(self) -> SparseAutoencoder:
        from saev.nn import load_sae

        return load_sae(self.run)


def make_world(
    root: Path | str,
    *,
    n_examples: int = 30,
    per_shard: int = 7,
    content_tokens: int = 9,
    d_model: int = 16,
    d_sae: int = 48,
    top_k: int = 5,
    labelled: bool = True,
    n_labels: int = 4,
    seed: int = 0,
    dtype: str = "float32",
    n_classes: int = 0,
    train: dict | None = None,
) -> World:
    """Activations around a mean, shifted by their label, so that some latents find some classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_labels, (n_examples, content_tokens)).astype(np.uint8)
    shift = 2 * rng.standard_normal((n_labels, d_model)).astype(np.float32)
    tokens = 1 + content_tokens
    shape = (len(LAYERS), n_examples, tokens, d_model)
    acts = rng.standard_normal(shape).astype(np.float32) + 1
    acts[:, :, 1:] += shift[labels]
    classes = np.arange(n_examples) * 7 % max(n_classes, 1)
    if n_classes:
        acts += shift[classes % n_labels][:, None]
    stored = torch.from_numpy(acts).to(getattr(torch, dtype))

    metadata = Metadata(
        family="synthetic", ckpt="dictionary", layers=LAYERS, cls_token=True, d_model=d_model,
        content_tokens_per_example=content_tokens, n_examples=n_examples, dtype=dtype,
        max_tokens_per_shard=per_shard * tokens * len(LAYERS), data={"seed": seed},
        pixel_agg="majority" if labelled else None,
    )  # fmt: skip
    url = storage.join(str(root), "shards", metadata.hash)
    storage.write_json(storage.join(url, "metadata.json"), metadata.to_dict())
    for shard in range(metadata.n_shards):
        first, last = metadata.shard_range(shard)
        with ShardWriter(storage.join(url, shard_name(shard)), metadata, last - first) as writer:
            writer.write(stored[:, first:last].contiguous())
        rows = [
            ExampleRow(i, f"{i}.png", f"c{c}" if n_classes else "", c, 8, 8)
            for i, c in enumerate(classes.tolist())
        ][first:last]
        part_labels = labels[first:last] if labelled else None
        write_part(url, shard, Part(writer.written, rows, [], part_labels))
    publish(url, metadata, metadata.n_shards)
    run = make_run(root, url, d_model=d_model, d_sae=d_sae, top_k=top_k, seed=seed, train=train)
    recorded = stored[LAYERS.index(LAYER)].float().numpy()
    return World(url, run, recorded, labels if labelled else None, classes)


def make_run(
    root: Path | str, shards: str, *, d_model: int, d_sae: int, top_k: int, seed: int = 0,
    train: dict | None = None,
) -> str:  # fmt: skip
    """A run folder as training leaves it; latents 0 and 1 never fire."""
    cfg = SaeConfig(d_model=d_model, d_sae=d_sae, activation=TopK(top_k=top_k))
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(cfg).requires_grad_(False)
    sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(d_sae, d_model, generator=generator)))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_enc.copy_(0.1 * torch.randn(d_sae, generator=generator))
    sae.b_enc[:2] = -1e6
    sae.b_dec.copy_(torch.randn(d_model, generator=generator))
    run = storage.join(str(root), "runs", "r0")
    sae.save(storage.join(run, "checkpoint"))
    data = {"shards": shards, "layer": LAYER, **(train or {})}
    config = TrainConfig.from_dict({"train_data": data, "sae": cfg.to_dict()})
    storage.write_json(storage.join(run, "config.json"), config.to_dict())
    return run


@dataclasses.dataclass(frozen=True)
class Truth:
    """Dense values of every selected token, in dataset order."""

    x: np.ndarray
    """float64 [n, d_model]."""
    f: np.ndarray
    """float32 [n, d_sae]."""
    x_hat: np.ndarray
    """float64 [n, d_model]."""
    example_idx: np.ndarray
    token_idx: np.ndarray
    labels: np.ndarray
    """-1 for class tokens."""

    def keep(self, mask: np.ndarray) -> "Truth":
        """Some of the rows."""
        return Truth(*(getattr(self, field.name)[mask] for field in dataclasses.fields(self)))


def brute_force(world: World, tokens: str = "content", ignore: tuple[int, ...] = ()) -> Truth:
    """All at once, from the arrays that were recorded."""
    n_examples, n_tokens, d_model = world.acts.shape
    example, token = np.divmod(np.arange(n_examples * n_tokens), n_tokens)
    token -= 1
    label = np.full(len(token), -1)
    if world.labels is not None:
        label[token >= 0] = world.labels[example[token >= 0], token[token >= 0]]
    wanted = {"content": token >= 0, "special": token < 0, "all": token >= -1}[tokens]
    wanted &= ~np.isin(label, ignore)
    x = torch.from_numpy(world.acts.reshape(-1, d_model)[wanted])
    with torch.no_grad():
        out = world.sae(x)
    return Truth(
        x.double().numpy(), out.acts.numpy(), out.x_hat.double().numpy(),
        example[wanted], token[wanted], label[wanted],
    )  # fmt: skip


def contents(url: str, *, leave_out: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Every file below a local folder, temporaries too."""
    root = Path(url)
    files = [path for path in root.rglob("*") if path.is_file() and path.name not in leave_out]
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(files)}
