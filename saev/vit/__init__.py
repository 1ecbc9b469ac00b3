"""Vision transformers behind one interface: :func:`load` a model, then call its ``record``."""

import saev.vit.dino
import saev.vit.open_clip_models
import saev.vit.timm_models  # noqa: F401 - these register their families
from saev.vit import checkpoints
from saev.vit.layers import check_expectations, resolve_layers
from saev.vit.model import Tower, VisionModel
from saev.vit.registry import families, identity, load, register_family

__all__ = [
    "Tower",
    "VisionModel",
    "check_expectations",
    "checkpoints",
    "families",
    "identity",
    "load",
    "register_family",
    "resolve_layers",
]
