"""Import of ``sae.pt``, the checkpoint of the published saev (OSU-NLP-Group/saev).

Line 1 is a JSON header, the rest a ``torch.save`` state dict. The headers of all versions:

    none   flat keys: d_vit, exp_factor, …; ReLU
    1      {"schema": 1, "cls": "Relu"|"TopK"|"BatchTopK", "cfg": {d_vit, exp_factor, top_k?, …}}
           or {"schema": 1, "cls": "SparseAutoencoderConfig", "cfg": {…, activation?: {…}}}
    2–5    {"schema": n, "cfg": {d_vit|d_model, exp_factor|d_sae, activation: {cls, params}, …}, …}

Only the activation is read from the header; shapes come from the tensors and must agree with it.
"""

import io
import json
import logging
import pickle
import typing as tp

import torch
from torch import Tensor

from saev import storage
from saev.config.sae import Activation, BatchTopK, Relu, SaeConfig, TopK
from saev.errors import CheckpointError
from saev.nn.folding import project
from saev.nn.sae import SparseAutoencoder

logger = logging.getLogger(__name__)

FILE = "sae.pt"
SCHEMAS = (None, 1, 2, 3, 4, 5)
_MAX_HEADER = 1 << 20


def load_published(url: str, *, subtract_b_dec: bool = False) -> SparseAutoencoder:
    """Read a published ``sae.pt``.

    Args:
        url: the file.
        subtract_b_dec: its encoder saw x - b_dec (files from before August 2025, and all of
            MatryoshkaSparseAutoencoder's): fold b_enc ← b_enc - b_dec·W_enc.

    Raises:
        CheckpointError: not such a file, damaged, or of an unknown schema or activation.
    """
    data = storage.read_bytes(url)
    header, body = _split(data, url)
    tensors = _state_dict(body, url)
    activation = _activation(header, "activation.threshold" in tensors, url)
    d_model, d_sae = _shapes(header, tensors, url)
    weights = {name: tensors[name].float() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if subtract_b_dec:
        shift = project(weights["b_dec"].double(), weights["W_enc"].double())
        weights["b_enc"] = (weights["b_enc"].double() - shift).float()
    if isinstance(activation, BatchTopK):
        # Its evaluation falls back to ReLU for a threshold that is not positive.
        weights["threshold"] = tensors["activation.threshold"].float().clamp(min=0).reshape(())
    cfg = SaeConfig(d_model=d_model, d_sae=d_sae, activation=activation)
    return SparseAutoencoder.from_tensors(cfg, weights, source=url)


def _split(data: bytes, url: str) -> tuple[dict[str, tp.Any], bytes]:
    end = data.find(b"\n", 0, _MAX_HEADER)
    try:
        header = json.loads(data[:end]) if end >= 0 else None
    except (json.JSONDecodeError, UnicodeDecodeError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{url} is not a checkpoint of the published saev: its first line is not a JSON header."
        )
    if header.get("schema") not in SCHEMAS:
        raise CheckpointError(
            f"{url} has schema {header['schema']}, this saev reads 1 to 5 and files without one."
        )
    return header, data[end + 1 :]


def _state_dict(body: bytes, url: str) -> dict[str, Tensor]:
    try:
        tensors = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, pickle.UnpicklingError) as err:
        reason = str(err).strip().split("\n")[0]
        raise CheckpointError(
            f"{url}: its state dict cannot be read ({reason}). It may be truncated; copy it again."
        ) from err
    needed = {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1}
    if not isinstance(tensors, dict) or any(
        not isinstance(tensors.get(name), Tensor) or tensors[name].ndim != ndim
        for name, ndim in needed.items()
    ):
        raise CheckpointError(f"{url} does not hold W_enc, b_enc, W_dec and b_dec.")
    return tensors


def _cfg(header: dict[str, tp.Any]) -> dict[str, tp.Any]:
    cfg = header.get("cfg") if "schema" in header else header
    return cfg if isinstance(cfg, dict) else {}


def _activation(header: dict[str, tp.Any], has_threshold: bool, url: str) -> Activation:
    cfg = _cfg(header)
    payload = cfg.get("activation")
    if isinstance(payload, dict):
        name, params = payload.get("cls"), payload.get("params") or {}
    elif header.get("schema") == 1 and header.get("cls") in ("Relu", "TopK", "BatchTopK"):
        name, params = header["cls"], cfg
    else:
        name, params = "Relu", {}
    top_k = params.get("top_k", 32)
    if name in ("TopK", "BatchTopK") and not (isinstance(top_k, int) and top_k >= 1):
        raise CheckpointError(f"{url} has top_k {top_k!r}, expected a positive integer.")
    if name == "Relu":
        return Relu()
    if name == "BatchTopK" and has_threshold:
        momentum = params.get("momentum", 0.1)  # there, the weight of the new value
        return BatchTopK(top_k=top_k, threshold_momentum=1 - momentum)
    if name in ("TopK", "BatchTopK"):
        if name == "BatchTopK":
            logger.warning("%s: its BatchTopK had no threshold and was a TopK per token", url)
        return TopK(top_k=top_k, rectify=False)
    raise CheckpointError(
        f"{url} has activation {name!r}, expected Relu, TopK or BatchTopK. It cannot be imported."
    )


def _shapes(header: dict[str, tp.Any], tensors: dict[str, Tensor], url: str) -> tuple[int, int]:
    cfg = _cfg(header)
    d_model, d_sae = tensors["W_enc"].shape
    said_model = cfg.get("d_model", cfg.get("d_vit"))
    said_sae = cfg.get("d_sae")
    if said_sae is None and said_model is not None and cfg.get("exp_factor") is not None:
        said_sae = said_model * cfg["exp_factor"]
    for key, said, found in (("d_model", said_model, d_model), ("d_sae", said_sae, d_sae)):
        if said is not None and said != found:
            raise CheckpointError(
                f"{url}: its header says {key} {said}, but W_enc has {found}. It is damaged."
            )
    return d_model, d_sae
