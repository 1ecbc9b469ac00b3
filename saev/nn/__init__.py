"""Sparse autoencoders: the model, its activations and objectives, the bank that trains many, files.

``SparseAutoencoder`` is what a user loads; ``SaeBank`` is how it was trained.
"""

import os

# MKL splits the sums of some matrix products among however many threads there are. In its strict
# mode a product has the same bits for any number of threads, at no measured cost
# (benchmarks/bank.py). MKL reads this when it first multiplies, so it stands before torch.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

from saev.nn.bank import SaeBank, StepMetrics
from saev.nn.checkpoints import load_sae
from saev.nn.folding import fold_normalization
from saev.nn.sae import EncoderOutput, SaeOutput, SparseAutoencoder, TopLatents
from saev.nn.saelens import load_saelens, to_saelens

__all__ = [
    "EncoderOutput",
    "SaeBank",
    "SaeOutput",
    "SparseAutoencoder",
    "StepMetrics",
    "TopLatents",
    "fold_normalization",
    "load_sae",
    "load_saelens",
    "to_saelens",
]
