"""``params.npz`` as in Gemma Scope (Lieberum et al. 2024, arXiv:2408.05147): JumpReLU SAEs.

    W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec, threshold [d_sae]

Gemma Scope's transcoders have the same arrays: a file does not tell them apart from SAEs.
"""

from saev.config.sae import JumpRelu
from saev.nn.folding import fold_rectifier
from saev.nn.io import files
from saev.nn.io.imported import Imported, Options, Reader

FILE = "params.npz"
_ARRAYS = {"W_enc": "DS", "b_enc": "S", "W_dec": "SD", "b_dec": "D", "threshold": "S"}


def read(url: str, options: Options) -> Imported:
    """Read such a file. Raises CheckpointError."""
    arrays = files.read_npz(url)
    renamed = {f"W_{name[2:]}" if name.startswith("w_") else name: t for name, t in arrays.items()}
    weights = files.take(renamed, _ARRAYS, url)
    return Imported(JumpRelu(), weights | {"threshold": fold_rectifier(weights["threshold"])}, url)


READER = Reader("Gemma Scope", (FILE,), read)
