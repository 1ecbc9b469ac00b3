"""Sparse autoencoders for vision transformers.

``import saev`` is cheap on purpose: torch and the model libraries are imported by the functions
that need them.
"""

import importlib
import os
import typing as tp

from saev.version import __version__

# The bits of some matrix products of MKL depend on the number of threads. In MKL's strict mode they
# do not, at no measured cost (benchmarks/training.py). MKL reads this variable at its first
# product, so it is set here, before any module of saev is imported.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

if tp.TYPE_CHECKING:
    from saev.explorer.frame import Frame
    from saev.nn import SparseAutoencoder

__all__ = ["__version__", "load_sae", "register_family", "show"]

_PACKAGES = frozenset(
    (
        *("config", "images", "inference", "loaders", "nn", "shards", "storage", "tables"),
        *("train", "visuals", "vit"),
    )
)
"""Imported when they are first asked for: ``import saev; saev.train.run(cfg)``."""


def __getattr__(name: str) -> tp.Any:
    if name in _PACKAGES:
        return importlib.import_module(f"saev.{name}")
    raise AttributeError(f"module 'saev' has no attribute {name!r}")


def load_sae(url: str, device: str = "cpu", **options: tp.Any) -> "SparseAutoencoder":
    """Load a trained SAE from a run, a checkpoint folder, files of other projects, or the hub.

    See :func:`saev.nn.load_sae`, which this forwards to.
    """
    from saev import nn

    return nn.load_sae(url, device=device, **options)


def show(run: str | list[str], **options: tp.Any) -> "Frame":
    """Look at all latents of SAEs in a notebook, in a frame that needs no server.

    See :func:`saev.explorer.frame.show`, which this forwards to.
    """
    from saev.explorer import frame

    return frame.show(run, **options)


def register_family(*args: tp.Any, **kwargs: tp.Any) -> tp.Any:
    """Register a model family. See :func:`saev.vit.register_family`, which this forwards to."""
    from saev import vit

    return vit.register_family(*args, **kwargs)
