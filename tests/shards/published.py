"""Writes folders in the published saev's protocol 2.1, from its description alone."""

import json
from pathlib import Path

import numpy as np


def write(
    folder: Path,
    acts: np.ndarray,
    *,
    layers: tuple[int, ...],
    cls_token: bool,
    per_shard: int,
    padded: bool = True,
    extra_empty_shard: bool = False,
    labels: np.ndarray | None = None,
    old_keys: bool = False,
) -> str:
    """Write activations float32 [n_examples, n_layers, tokens, d_model]; returns the folder's URL.

    With ``padded`` every file has the full shard size, zeros at the end, as the published writer
    makes them.
    """
    n, n_layers, tokens, d_model = acts.shape
    folder.mkdir(parents=True)
    metadata = {
        "family": "clip",
        "ckpt": "ViT-B-16/openai",
        "layers": list(layers),
        "content_tokens_per_example": tokens - int(cls_token),
        "cls_token": cls_token,
        "d_model": d_model,
        "n_examples": n,
        "max_tokens_per_shard": per_shard * n_layers * tokens,
        "data": "gASVKAAAAAAAAACMCGJ1aWx0aW5zlIwEZXZhbJSTlIwIMS8wICMgaGmUhZRSlC4=",
        "dataset": "/somewhere/else",
        "pixel_agg": "majority" if labels is not None else None,
        "dtype": "float32",
        "protocol": "2.1",
    }
    if old_keys:
        renamed = {
            "family": "vit_family", "ckpt": "vit_ckpt", "d_model": "d_vit", "n_examples": "n_imgs",
            "content_tokens_per_example": "n_patches_per_img",
            "max_tokens_per_shard": "max_patches_per_shard",
        }  # fmt: skip
        metadata = {renamed.get(key, key): value for key, value in metadata.items()}
        metadata["seed"] = 42  # a key that has gone since
    (folder / "metadata.json").write_text(json.dumps(metadata))
    infos = []
    starts = list(range(0, n, per_shard)) + ([n] if extra_empty_shard else [])
    for shard, start in enumerate(starts):
        rows = acts[start : start + per_shard].astype("<f4")
        infos.append({"name": f"acts{shard:06d}.bin", "n_examples": len(rows)})
        data = rows.tobytes()
        if padded:
            data += bytes((per_shard - len(rows)) * n_layers * tokens * d_model * 4)
        (folder / infos[-1]["name"]).write_bytes(data)
    (folder / "shards.json").write_text(json.dumps(infos))
    if labels is not None:
        (folder / "labels.bin").write_bytes(labels.astype(np.uint8).tobytes())
    return str(folder)
