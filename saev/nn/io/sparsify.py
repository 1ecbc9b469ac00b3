"""Folders of sparsify (eai-sparsify on PyPI, EleutherAI), by ``SparseCoder.save_to_disk``.

    cfg.json          k, d_in, num_latents or expansion_factor, activation, transcode, …
    sae.safetensors   encoder.weight [d_sae, d_in], encoder.bias, W_dec [d_sae, d_in], b_dec

Its encoder sees x - b_dec, and its top-k is taken of rectified values.
"""

from saev import storage
from saev.config.sae import TopK
from saev.errors import CheckpointError
from saev.nn.folding import fold_shift
from saev.nn.io import files
from saev.nn.io.imported import Imported, Options, Reader

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"

_TENSORS = {"encoder.weight": "SD", "encoder.bias": "S", "W_dec": "SD", "b_dec": "D"}
_REFUSED = {
    "transcode": "it reconstructs what a module makes of its input, so it is not an autoencoder",
    "skip_connection": "it adds a linear map of its input to the reconstruction",
    "signed": "it keeps the values of largest magnitude, negative ones too",
}
_TRAINING_FLAGS = ("multi_topk", "normalize_decoder")


def read(url: str, options: Options) -> Imported:
    """Read a folder of sparsify. Raises CheckpointError."""
    source, weights_url = storage.join(url, CONFIG), storage.join(url, WEIGHTS)
    config = files.read_config(source)
    for flag, why in _REFUSED.items():
        if config.get(flag):
            raise CheckpointError(f"{source} has {flag} = true, which cannot be imported: {why}.")
    files.refuse_flags(config, source=source, project="sparsify", known=_TRAINING_FLAGS)
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise CheckpointError(
            f"{source} has activation = {activation!r:.60}, expected 'topk'. It cannot be imported."
        )
    d_in = files.integer(config, "d_in", source)
    if config.get("num_latents"):
        d_sae = files.integer(config, "num_latents", source)
    else:
        d_sae = d_in * files.integer(config, "expansion_factor", source)
    tensors = files.read_safetensors(weights_url)
    found = files.take(tensors, _TENSORS, weights_url, {"D": d_in, "S": d_sae})
    weights = {
        "W_enc": found["encoder.weight"].T,
        "b_enc": found["encoder.bias"],
        "W_dec": found["W_dec"],
        "b_dec": found["b_dec"],
    }
    top_k = TopK(top_k=files.integer(config, "k", source))
    return Imported(top_k, fold_shift(weights, weights["b_dec"]), weights_url)


READER = Reader("sparsify", (CONFIG, WEIGHTS), read)
