"""State dicts of overcomplete (on PyPI), as ``torch.save(sae.state_dict(), …)`` writes them.

    encoder    encoder.final_block.0.{weight,bias} of the linear encoder (the default), or
               encoder.{weight,bias?} untied, or encoder.tied_to.… (and encoder.bias?) tied
    dictionary dictionary._weights [d_sae, d_model], whose rows are scaled to norm 1 when used, or
               dictionary.{C,W,Relax} of an archetypal SAE: rows W·C + Relax
               dictionary.multiplier: all rows are multiplied by its exponential
    thresholds of JumpSAE: θ is their exponential

There is no b_dec. TopKSAE does not record its k. SAE (a ReLU), TopKSAE and BatchTopKSAE have the
same tensors. The threshold of BatchTopKSAE is not stored.
"""

import torch
from torch import Tensor

from saev.config.sae import Activation, JumpRelu, TopK
from saev.errors import CheckpointError
from saev.nn.folding import Weights
from saev.nn.io import files
from saev.nn.io.imported import Imported, Options, Reader

_LINEAR = {"encoder.final_block.0.weight": "SD", "encoder.final_block.0.bias": "S"}
_SPHERE = {"dictionary._weights": "SD", "dictionary.multiplier": ""}
_ARCHETYPAL = {
    "dictionary.C": "CD",
    "dictionary.W": "SC",
    "dictionary.Relax": "SD",
    "dictionary.multiplier": "",
}
_TIED = "encoder.tied_to."


def fits(tensors: dict[str, Tensor]) -> bool:
    """Whether these look like the tensors of an SAE of overcomplete."""
    return "dictionary.multiplier" in tensors


def read(url: str, options: Options) -> Imported:
    """Read a state dict. Raises CheckpointError."""
    return convert(files.read_state_dict(url), url, options)


def convert(tensors: dict[str, Tensor], url: str, options: Options) -> Imported:
    """An SAE of these tensors, which are at `url`. Raises CheckpointError."""
    # A tied encoder lists the tensors of the dictionary a second time.
    tensors = {name: t for name, t in tensors.items() if not name.startswith(_TIED)}
    wanted = dict(_ARCHETYPAL if "dictionary.C" in tensors else _SPHERE)
    if "encoder.final_block.0.weight" in tensors:
        wanted |= _LINEAR
    optional = {"encoder.weight": "SD", "encoder.bias": "S", "thresholds": "S"}
    found = files.take(tensors, wanted | {n: optional[n] for n in optional if n in tensors}, url)
    w_dec = _dictionary(found, url)
    d_sae, d_model = w_dec.shape
    encoder = found.get("encoder.final_block.0.weight", found.get("encoder.weight", w_dec))
    bias = found.get("encoder.final_block.0.bias", found.get("encoder.bias", torch.zeros(d_sae)))
    weights = {"W_enc": encoder.T, "b_enc": bias, "W_dec": w_dec, "b_dec": torch.zeros(d_model)}
    activation, threshold = _activation(found, url, options, d_sae)
    return Imported(activation, weights | threshold, url)


def _dictionary(found: dict[str, Tensor], url: str) -> Tensor:
    """The rows that are multiplied with codes at evaluation."""
    if "dictionary.C" in found:
        mix, relax = found["dictionary.W"].double(), found["dictionary.Relax"].double()
        row_sums = mix.sum(dim=1)
        if (mix < 0).any() or not torch.allclose(row_sums, torch.ones_like(row_sums), atol=1e-5):
            raise CheckpointError(
                f"{url} is of an archetypal SAE that was saved in the middle of a training step: "
                "rows of dictionary.W are no convex combinations. Call eval() on it, and save its "
                "state_dict() again."
            )
        rows = mix @ found["dictionary.C"].double() + relax
    else:
        rows = found["dictionary._weights"].double()
        norm = rows.norm(dim=1, keepdim=True)
        if ((norm - 1).abs() > 0.1).any():
            raise CheckpointError(
                f"{url}: rows of dictionary._weights have norms from {norm.min():.3g} to "
                f"{norm.max():.3g}. Only normalization='l2' can be imported, and state dicts do "
                "not record it. If it was trained with that, call eval() on it, and save its "
                "state_dict() again."
            )
        rows = rows / (norm + 1e-8)
    return rows * found["dictionary.multiplier"].double().exp()


def _activation(
    found: dict[str, Tensor], url: str, options: Options, d_sae: int
) -> tuple[Activation, Weights]:
    if "thresholds" in found:
        if options.top_k is not None:
            raise CheckpointError(f"{url} is of a JumpSAE, which has no top_k. Leave it out.")
        return JumpRelu(), {"threshold": found["thresholds"].double().exp()}
    if options.top_k is None:
        raise CheckpointError(
            f"{url} is a state dict of overcomplete, which does not record how many latents are "
            f"kept per token. Give it as `top_k`: TopKSAE's default is d_sae // 10 = "
            f"{max(d_sae // 10, 1)}; for a plain SAE (a ReLU) it is d_sae = {d_sae}."
        )
    return TopK(top_k=options.top_k), {}


READER = Reader("overcomplete", (), read, frozenset({"top_k"}))
