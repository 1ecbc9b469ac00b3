"""SAEs of a few latents, for tests of files."""

import torch

from saev.config import BatchTopK, JumpRelu, Relu, SaeConfig, TopK
from saev.nn import SparseAutoencoder

D, S = 6, 14
ACTIVATIONS = [
    Relu(),
    TopK(top_k=3),
    TopK(top_k=13, rectify=False),
    BatchTopK(top_k=3),
    JumpRelu(),
]
IDS = ["relu", "top-k", "signed-top-k", "batch-top-k", "jump-relu"]


def make_sae(act, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(D, S, generator=g),
        "b_enc": torch.randn(S, generator=g) * 0.3,
        "W_dec": torch.nn.functional.normalize(torch.randn(S, D, generator=g), dim=1),
        "b_dec": torch.randn(D, generator=g),
    }
    if act.kind == "batch-top-k":
        tensors["threshold"] = torch.tensor(0.8)
    if act.kind == "jump-relu":
        tensors["threshold"] = torch.rand(S, generator=g)
    return SparseAutoencoder.from_tensors(SaeConfig(d_model=D, d_sae=S, activation=act), tensors)


def inputs(n=40):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(5)) * 2 + 1


def equal_saes(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
