"""``ae.pt`` of dictionary_learning (dictionary-learning on PyPI), a state dict of torch.save.

    AutoEncoder              encoder.{weight,bias}, decoder.weight, bias; the encoder sees x - bias
    AutoEncoderNew           encoder.{weight,bias}, decoder.{weight,bias}
    GatedAutoEncoder         {encoder,decoder}.weight, decoder_bias, r_mag, gate_bias, mag_bias
    JumpReluAutoEncoder      W_enc, b_enc, W_dec, b_dec, threshold
    AutoEncoderTopK          encoder.{weight,bias}, decoder.weight, b_dec, k, threshold
    BatchTopKSAE             the same
    MatryoshkaBatchTopKSAE   W_enc, b_enc, W_dec, b_dec, k, threshold, group_sizes

``config.json`` beside it names the class as trainer.dict_class. It is needed only to tell
AutoEncoderTopK and BatchTopKSAE apart.
"""

import torch
from torch import Tensor

from saev import storage
from saev.config.sae import BatchTopK, JumpRelu, Relu, TopK
from saev.errors import CheckpointError
from saev.nn.folding import Weights, fold_decoder_norm, fold_gate, fold_rectifier, fold_shift
from saev.nn.io import files
from saev.nn.io.imported import Imported, Options, Reader

FILE = "ae.pt"
CONFIG = "config.json"

_LINEAR = {"encoder.weight": "SD", "decoder.weight": "DS"}
_PLAIN = {"W_enc": "DS", "b_enc": "S", "W_dec": "SD", "b_dec": "D"}
_CLASSES = {
    "AutoEncoder": _LINEAR | {"encoder.bias": "S", "bias": "D"},
    "AutoEncoderNew": _LINEAR | {"encoder.bias": "S", "decoder.bias": "D"},
    "GatedAutoEncoder": _LINEAR
    | {"decoder_bias": "D", "r_mag": "S", "gate_bias": "S", "mag_bias": "S"},
    "JumpReluAutoEncoder": _PLAIN | {"threshold": "S"},
    "AutoEncoderTopK": _LINEAR | {"encoder.bias": "S", "b_dec": "D", "threshold": ""},
    "BatchTopKSAE": _LINEAR | {"encoder.bias": "S", "b_dec": "D", "threshold": ""},
    "MatryoshkaBatchTopKSAE": _PLAIN | {"threshold": ""},
}
_COUNTS = {"AutoEncoderTopK": {"k"}, "BatchTopKSAE": {"k"}}
_COUNTS["MatryoshkaBatchTopKSAE"] = {"k", "group_sizes"}
"""Tensors of integers."""

_OWN_NAMES = {
    "encoder.weight": "W_enc",
    "decoder.weight": "W_dec",
    "encoder.bias": "b_enc",
    "decoder.bias": "b_dec",
    "decoder_bias": "b_dec",
    "bias": "b_dec",
}


def fits(tensors: dict[str, Tensor]) -> bool:
    """Whether these are the tensors of one of its classes."""
    return bool(_candidates(tensors))


def read(url: str, options: Options) -> Imported:
    """Read ``ae.pt``. Raises CheckpointError."""
    return convert(files.read_state_dict(url), url)


def convert(tensors: dict[str, Tensor], url: str) -> Imported:
    """An SAE of the tensors of ``ae.pt``, which is at `url`. Raises CheckpointError."""
    name = _class_of(tensors, url)
    counts = {n: tensors[n] for n in _COUNTS.get(name, ())}
    found = files.take({n: t for n, t in tensors.items() if n not in counts}, _CLASSES[name], url)
    weights = {
        _OWN_NAMES.get(n, n): t.T if n in ("encoder.weight", "decoder.weight") else t
        for n, t in found.items()
    }
    threshold = weights.pop("threshold", None)
    match name:
        case "AutoEncoder":
            weights = _normalized(fold_shift(weights, weights["b_dec"]))
            return Imported(Relu(), weights, url)
        case "AutoEncoderNew":
            return Imported(Relu(), weights, url)
        case "GatedAutoEncoder":
            weights = fold_gate(weights, "gate_bias", "mag_bias", "r_mag")
            return Imported(JumpRelu(), fold_shift(weights, weights["b_dec"]), url)
    k = _count(counts["k"], url) if "k" in counts else 0
    if name == "AutoEncoderTopK":  # its threshold is for another way to encode
        return Imported(TopK(top_k=k), fold_shift(weights, weights["b_dec"]), url)
    assert threshold is not None
    weights["threshold"] = fold_rectifier(threshold)  # θ is -1 before it is learned
    if name == "JumpReluAutoEncoder":
        return Imported(JumpRelu(), weights, url)
    return Imported(BatchTopK(top_k=k), fold_shift(weights, weights["b_dec"]), url)


def _class_of(tensors: dict[str, Tensor], url: str) -> str:
    """The class whose tensors these are, by config.json where there are two."""
    candidates = _candidates(tensors)
    place = storage.join(storage.parent(url), CONFIG)
    said = None
    if storage.exists(place):
        said = files.section(files.read_config(place), "trainer", place).get("dict_class")
    if said is not None and said not in candidates:
        raise CheckpointError(
            f"{url} has {files.names(tensors)}, but {place} says that it is a {said!r:.60}, which "
            f"saev reads as {', '.join(_CLASSES)}. It cannot be imported."
            if said not in _CLASSES
            else f"{url} has {files.names(tensors)}, but {place} says that it is a {said}, whose "
            f"tensors are {files.names(_CLASSES[said].keys() | _COUNTS.get(said, set()))}."
        )
    if said is None and len(candidates) != 1:
        raise CheckpointError(
            f"{url} has the tensors of {' and of '.join(candidates)}, which encode in different "
            f"ways. Put the {CONFIG} that dictionary_learning wrote beside it."
            if candidates
            else f"{url} has {files.names(tensors)}, which are of no class of dictionary_learning."
        )
    return str(said or candidates[0])


def _candidates(tensors: dict[str, Tensor]) -> list[str]:
    return [n for n, own in _CLASSES.items() if own.keys() | _COUNTS.get(n, set()) == set(tensors)]


def _count(k: Tensor, url: str) -> int:
    if k.numel() != 1 or k.is_floating_point() or not int(k) > 0:
        raise CheckpointError(f"{url} has k = {k.tolist()!r:.60}, expected a positive integer.")
    return int(k)


def _normalized(weights: Weights) -> Weights:
    """Unit decoder rows, which AutoEncoder.from_pretrained makes unless they are there."""
    norm = weights["W_dec"].norm(dim=1)
    is_unit = torch.allclose(norm, torch.ones_like(norm))
    return weights if is_unit else fold_decoder_norm(weights)


READER = Reader("dictionary_learning", (FILE,), read)
