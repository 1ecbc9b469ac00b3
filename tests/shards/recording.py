"""Small recordings for tests: an untrained model of timm, generated images."""

import os
import typing as tp
from pathlib import Path

from saev.config import ShardsConfig

MODEL = {"family": "timm", "ckpt": "test_vit/random", "image_size": 64}
"""6 blocks of width 64; images of 64 pixels make 4 x 4 content tokens."""


def config(root: object, **changes: tp.Any) -> ShardsConfig:
    """17 images with masks in shards of 5, layers 1 and 5."""
    keys = {
        **MODEL,
        "shards_root": str(root),
        "layers": [1, -1],
        "max_tokens_per_shard": 5 * 2 * 17,
        "n_workers": 2,
        "device": "cpu",
        "data": {"kind": "fake-img-seg", "n_examples": 17, "image_size": 48},
    }
    return ShardsConfig.from_dict({**keys, **changes})


def tree(root: str | Path) -> dict[str, bytes]:
    """Every file below a local folder, hidden ones too."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder) / name
            found[str(path.relative_to(root))] = path.read_bytes()
    return found
