"""Sparse autoencoders: model, activations, objectives, training of many at once, and files.

Users load a ``SparseAutoencoder``. A ``SaeBank`` trains many of them.
"""

from saev.nn.bank import SaeBank, StepMetrics
from saev.nn.folding import fold_normalization
from saev.nn.io.load import load_sae
from saev.nn.io.saelens import load_saelens, to_saelens
from saev.nn.sae import EncoderOutput, SaeOutput, SparseAutoencoder, TopLatents

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
