"""Sparse autoencoders: the model, its activations and objectives, the bank that trains many, files.

``SparseAutoencoder`` is what a user loads; ``SaeBank`` is how it was trained.
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
