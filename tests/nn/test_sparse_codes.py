"""Sparse steps against the SAE's own dense ones."""

import numpy as np
import pytest
import torch

from saev.config import BatchTopK, JumpRelu, Relu, SaeConfig, TopK
from saev.nn import SparseAutoencoder
from saev.nn.codes import encode

ACTIVATIONS = {
    "sparse top-k": TopK(top_k=3),
    "published top-k": TopK(top_k=3, rectify=False),
    "dense top-k": TopK(top_k=60),
    "relu": Relu(),
    "batch-top-k": BatchTopK(top_k=4),
    "jump-relu": JumpRelu(),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shift", [0.0, -1.5, -30.0])  # many, few and no latents fire
def test_a_step_is_what_the_sae_computes(name, shift) -> None:
    torch.manual_seed(0)
    cfg = SaeConfig(d_model=12, d_sae=200, activation=ACTIVATIONS[name])
    sae = SparseAutoencoder(cfg).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape) / 3)
    sae.b_enc += shift
    if sae.threshold is not None:
        sae.threshold.fill_(0.3)
    x = torch.randn(50, 12)
    want = sae(x)
    found = encode(sae, x)
    dense = np.zeros((50, 200), np.float32)
    dense[np.repeat(np.arange(50), found.row_nnz), found.latents] = found.values
    np.testing.assert_array_equal(dense, want.acts.numpy())
    assert len(found.values) == (dense != 0).sum()
    torch.testing.assert_close(found.x_hat, want.x_hat)
