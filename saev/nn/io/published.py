"""Import of ``sae.pt``, the checkpoint of the published saev (OSU-NLP-Group/saev).

Line 1 is a JSON header, the rest a ``torch.save`` state dict. The headers of all versions:

    none   flat keys: d_vit, exp_factor, …; ReLU
    1      {"schema": 1, "cls": "Relu"|"TopK"|"BatchTopK", "cfg": {d_vit, exp_factor, top_k?, …}}
           or {"schema": 1, "cls": "SparseAutoencoderConfig", "cfg": {…, activation?: {…}}}
    2–5    {"schema": n, "cfg": {d_vit|d_model, exp_factor|d_sae, activation: {cls, params}, …}, …}

Only the activation is read from the header; shapes come from the tensors and must agree with it.
"""

import logging
import typing as tp

from torch import Tensor

from saev import storage
from saev.config.sae import Activation, BatchTopK, Relu, TopK
from saev.errors import CheckpointError
from saev.nn.folding import fold_shift
from saev.nn.io import files
from saev.nn.io.imported import Imported, Options, Reader
from saev.once import say_once

logger = logging.getLogger(__name__)

FILE = "sae.pt"
SCHEMAS = (None, 1, 2, 3, 4, 5)

_TENSORS = {"W_enc": "DS", "b_enc": "S", "W_dec": "SD", "b_dec": "D"}
_THRESHOLD = "activation.threshold"


def read(url: str, options: Options) -> Imported:
    """Read a published ``sae.pt``. Its tensors and header must agree.

    ``subtract_b_dec`` means that its encoder takes x - b_dec (files from before August 2025, and
    all of MatryoshkaSparseAutoencoder). It is folded into the weights:
    b_enc ← b_enc - b_dec·W_enc.

    Raises:
        CheckpointError: not such a file, damaged, or of an unknown schema or activation.
    """
    header, tensors = storage.read_parsed(url, lambda data: _parse(data, url))
    threshold = tensors.pop(_THRESHOLD, None)
    weights = files.take(tensors, _TENSORS, url, _sizes(header, url))
    activation = _activation(header, threshold is not None, url)
    if options.subtract_b_dec:
        weights = fold_shift(weights, weights["b_dec"])
    if isinstance(activation, BatchTopK):
        # The published code evaluates with ReLU if the threshold is not positive.
        assert threshold is not None
        theta = files.take({_THRESHOLD: threshold.reshape(-1)}, {_THRESHOLD: "1"}, url, {"1": 1})
        weights["threshold"] = theta[_THRESHOLD].clamp(min=0).reshape(())
    # Before schema 2, the published loaders centred and scaled by default. Later ones cannot.
    return Imported(activation, weights, url, may_need_scale=header.get("schema") in (None, 1))


def _parse(data: bytes, url: str) -> tuple[dict[str, tp.Any], dict[str, Tensor]]:
    """Header and tensors."""
    end = data.find(b"\n", 0, files.MAX_CONFIG_BYTES)
    if end < 0 or not data.startswith(b"{"):
        raise CheckpointError(
            f"{url} is not a checkpoint of the published saev: its first line is not a JSON header."
        )
    header = files.parse_config(data[:end], f"{url}: its first line")
    schema = header.get("schema")
    if isinstance(schema, bool) or schema not in SCHEMAS:
        raise CheckpointError(
            f"{url} has schema {schema!r:.60}, this saev reads 1 to 5 and files without one."
        )
    return header, files.parse_state_dict(data[end + 1 :], url)


def _cfg(header: dict[str, tp.Any], url: str) -> dict[str, tp.Any]:
    return files.section(header, "cfg", url) if "schema" in header else header


def _activation(header: dict[str, tp.Any], has_threshold: bool, url: str) -> Activation:
    cfg = _cfg(header, url)
    if cfg.get("activation") is not None:
        payload = files.section(cfg, "activation", url)
        name, params = payload.get("cls"), files.section(payload, "params", url)
    elif header.get("schema") == 1 and header.get("cls") in ("Relu", "TopK", "BatchTopK"):
        name, params = header["cls"], cfg
    else:
        name, params = "Relu", {}
    if name == "Relu":
        return Relu()
    if name not in ("TopK", "BatchTopK"):
        raise CheckpointError(
            f"{url} has activation {name!r:.60}, expected Relu, TopK or BatchTopK. It cannot be "
            "imported."
        )
    top_k = files.integer({"top_k": 32} | params, "top_k", url)
    if name == "TopK":
        return TopK(top_k=top_k, rectify=False)
    if not has_threshold:
        say_once(logger, f"{url}: its BatchTopK had no threshold and was a TopK per token.")
        return TopK(top_k=top_k, rectify=False)
    momentum = params.get("momentum", 0.1)  # there it is the weight of the new value
    if not isinstance(momentum, int | float) or not 0 < momentum <= 1:
        raise CheckpointError(
            f"{url} has momentum = {momentum!r:.60}, expected a number in (0, 1]."
        )
    return BatchTopK(top_k=top_k, threshold_momentum=1 - momentum)


def _sizes(header: dict[str, tp.Any], url: str) -> dict[str, int]:
    """The sizes in the header, which the tensors must have."""
    cfg, sizes = _cfg(header, url), {}
    for key in ("d_model", "d_vit"):
        if key in cfg:
            sizes["D"] = files.integer(cfg, key, url)
    if cfg.get("d_sae") is not None:
        sizes["S"] = files.integer(cfg, "d_sae", url)
    elif "D" in sizes and cfg.get("exp_factor") is not None:
        sizes["S"] = sizes["D"] * files.integer(cfg, "exp_factor", url)
    return sizes


READER = Reader("the published saev", (FILE,), read, frozenset({"subtract_b_dec"}))
