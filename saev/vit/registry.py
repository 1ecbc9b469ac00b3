"""The registry of model families."""

import contextlib
import importlib.metadata
import logging
import sys
from collections.abc import Callable

import torch

from saev import storage
from saev.errors import ModelError, did_you_mean
from saev.vit import checkpoints
from saev.vit.model import Tower, VisionModel

logger = logging.getLogger(__name__)

ENTRY_POINTS = "saev.families"
"""Group of packaging entry points. Families of packages that declare one are available in all
commands."""

Loader = Callable[[str, tuple[int, int] | None], Tower]
"""(checkpoint, image size in pixels or None for the model's own) -> Tower."""

_families: dict[str, Loader] = {}


def register_family(name: str) -> Callable[[Loader], Loader]:
    """Decorator: make a loader available as ``--family NAME``.

    The loader gets the checkpoint as the user wrote it, and (height, width) or None. It returns a
    :class:`Tower`. It should raise ModelError for a checkpoint that does not exist.

    Raises:
        ModelError: another loader is registered under this name.
    """

    def decorate(loader: Loader) -> Loader:
        known = _families.get(name)
        same = known is not None and (known.__module__, known.__qualname__) == (
            loader.__module__,
            loader.__qualname__,
        )
        if known is not None and not same:  # `same`: a notebook cell that runs again
            raise ModelError(
                f"Model family '{name}' is already registered by {known.__module__}; "
                "choose another name."
            )
        _families[name] = loader
        return loader

    return decorate


def families() -> list[str]:
    """Names of all families, sorted: built in, registered, and declared by installed packages."""
    return sorted({*_families, *_entry_points()})


def load(
    family: str,
    ckpt: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
) -> VisionModel:
    """Load a model for recording.

    Args:
        family: a registered family.
        ckpt: checkpoint in the family's naming; ARCH/random for untrained weights; ARCH@URL for
            weights in a file.
        image_size: side in pixels, or (height, width), if not the model's own.
        device: where to run.

    Raises:
        ModelError: the family, the architecture or the weights do not exist or do not fit.
        StorageError: the weights file cannot be read.
    """
    loader = _find(family)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and min(size) < 1:
        raise ModelError(f"image_size is {size[0]} x {size[1]}, expected at least 1 pixel.")
    # Standard output is only for the URL of the result, but libraries print to it (timm's EVA
    # checkpoint filter does).
    with contextlib.redirect_stdout(sys.stderr):
        tower = loader(ckpt, size)
    model = VisionModel(tower, family=family, ckpt=ckpt, device=device)
    logger.info(
        "%s: %d blocks, d_model %d, %d x %d content tokens, class token: %s",
        model.name,
        model.n_layers,
        model.d_model,
        *model.grid,
        "yes" if model.has_cls_token else "no",
    )
    return model


def identity(family: str, ckpt: str) -> str | None:
    """A text that identifies the weights of a checkpoint, made without loading the network.

    Returns:
        The name and, if the weights are in a file, the file's checksum. None for families that are
        not saev's own, and for folders: their weights are known only after loading.

    Raises:
        ModelError: there is no such family, or the name is incomplete.
        StorageError: the weights file cannot be read.
    """
    if not _find(family).__module__.startswith("saev.") or ckpt.startswith(checkpoints.LOCAL_DIR):
        return None
    url = checkpoints.parse(ckpt).url
    if url is None:
        return ckpt
    return f"{ckpt} {storage.format_checksum(storage.crc32c(storage.read_bytes(url)))}"


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {p.name: p for p in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _find(family: str) -> Loader:
    if family in _families:
        return _families[family]
    declared = _entry_points()
    if family in declared:
        loader: Loader = declared[family].load()
        return loader
    known = families()
    raise ModelError(
        f"Unknown model family '{family}'.{did_you_mean(family, known)} There are "
        f"{', '.join(known)}."
    )
