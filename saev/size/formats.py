"""Sizes of the files that the stages write, as arithmetic. Tests compare them with real files."""

import json
import typing as tp

Tensors = tp.Mapping[str, tuple[str, tuple[int, ...]]]
"""Name → (safetensors' name of the dtype, shape)."""

_ITEMSIZE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U8": 1}
_RANK = {"I64": 4, "F64": 3, "F32": 2, "I32": 1, "U8": 0}
"""Order of dtypes in a safetensors file: wider types first. Equal types are sorted by name."""

RNG_BYTES = 5056
"""State of one of torch's CPU generators (a Mersenne Twister)."""


def tensor_bytes(tensors: Tensors) -> int:
    """Bytes of the values."""
    return sum(_n_bytes(dtype, shape) for dtype, shape in tensors.values())


def _n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    n = _ITEMSIZE[dtype]
    for length in shape:
        n *= length
    return n


def safetensors(tensors: Tensors, *, ordered: bool = False) -> int:
    """Bytes of a safetensors file: length of the header, header padded to 8 bytes, values.

    Args:
        tensors: the tensors of the file.
        ordered: the tensors are in the given order (as in resume points), not in the library's.
    """
    rows = list(tensors.items())
    if not ordered:
        rows.sort(key=lambda row: (-_RANK[row[1][0]], row[0]))
    header, offset = {}, 0
    for name, (dtype, shape) in rows:
        end = offset + _n_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + offset


def npz(members: tp.Mapping[str, int]) -> int:
    """Bytes of an `.npz` as :mod:`saev.inference.npz` writes it: stored, with ZIP64 headers.

    Args:
        members: bytes of each array by name.
    """
    total, large = 22, 0  # the end of the directory
    for name, n_bytes in members.items():
        file = len(f"{name}.npy")
        array = 128 + n_bytes  # the header of a .npy file
        before = total - 22
        total += 30 + file + 20 + array + 24 + 46 + file
        if array >= 1 << 31 or before >= 1 << 31:  # a longer entry of the directory
            large += 28
    return total + large + (76 if large else 0)


def checkpoint(d_model: int, d_sae: int, activation: str) -> Tensors:
    """checkpoint/sae.safetensors."""
    tensors = {
        "W_enc": ("F32", (d_model, d_sae)),
        "b_enc": ("F32", (d_sae,)),
        "W_dec": ("F32", (d_sae, d_model)),
        "b_dec": ("F32", (d_model,)),
    }
    if activation == "batch-top-k":
        tensors["threshold"] = ("F32", ())
    if activation == "jump-relu":
        tensors["threshold"] = ("F32", (d_sae,))
    return tensors


def bank_parameters(n: int, d_model: int, d_sae: int, activation: str) -> Tensors:
    """Parameters of a bank of n SAEs."""
    names = {
        "W_enc": ("F32", (n, d_sae, d_model)),
        "b_enc": ("F32", (n, d_sae)),
        "W_dec": ("F32", (n, d_sae, d_model)),
        "b_dec": ("F32", (n, d_model)),
    }
    if activation == "jump-relu":
        names["log_threshold"] = ("F32", (n, d_sae))
    return names


def bank_state(n: int, d_model: int, d_sae: int, activation: str, optim: str) -> Tensors:
    """All state of a bank: parameters, the optimiser's moments, counters."""
    params = bank_parameters(n, d_model, d_sae, activation)
    adam = [k for k in params if optim == "adam" or k not in ("W_enc", "W_dec")]
    muon = [k for k in params if k not in adam]
    return {
        **params,
        **{f"adam.{k}.{moment}": params[k] for k in adam for moment in ("m", "v")},
        **{f"muon.{k}.m": params[k] for k in muon},
        "threshold": ("F32", (n,)),
        "since_fired": ("I64", (n, d_sae)),
        "rng": ("U8", (n, RNG_BYTES)),
        "counters": ("I64", (2,)),
    }


def stats(n_layers: int, d_model: int) -> Tensors:
    """stats.safetensors of a shards folder."""
    return {
        f"{kind}.{name}": tensor
        for kind in ("content", "special")
        for name, tensor in (
            ("mean", ("F64", (n_layers, d_model))),
            ("mean_sq_norm", ("F64", (n_layers,))),
            ("count", ("I64", (1,))),
        )
    }


def sparsity(d_sae: int) -> Tensors:
    """sparsity.safetensors of an inference folder."""
    return {
        "sparsity": ("F32", (d_sae,)),
        "frequency": ("F64", (d_sae,)),
        "counts": ("I64", (d_sae,)),
    }


def mean_values(d_sae: int) -> Tensors:
    """mean_values.safetensors of an inference folder."""
    return {"mean_values": ("F64", (d_sae,)), "max_values": ("F32", (d_sae,))}


def top_examples(d_sae: int, n_entries: int, n_tokens: int) -> Tensors:
    """top_examples.safetensors.

    Args:
        d_sae: latents.
        n_entries: examples of all latents.
        n_tokens: firing tokens of all entries.
    """
    return {
        "indptr": ("I64", (d_sae + 1,)),
        "example_idx": ("I64", (n_entries,)),
        "value": ("F32", (n_entries,)),
        "token_indptr": ("I64", (n_entries + 1,)),
        "token_idx": ("I32", (n_tokens,)),
        "token_value": ("F32", (n_tokens,)),
    }


# Tables of an inference folder, compressed. Most bytes of each:
PATCHES_OF_LATENT = 4
"""Patches of an image on which a latent is active that is active at all; a guess."""
PAIR_BYTES = 7
"""A latent and an image, in both orders."""
CODE_BYTES = 7
"""A code, in both orders."""
LATENT_BYTES = 2048
"""A row of latents.parquet, and those of classes.parquet that are a latent's best."""
EXAMPLE_BYTES = 24
"""A row of examples.parquet, without patches."""
PATCH_BYTES = 5
"""A patch of it."""
IMAGE_BYTES = 96
"""A row of images.parquet."""
EMBEDDING_BYTES = 2
"""A number of embeddings.parquet."""
FOOTER_BYTES = 32_768
"""Footers and lists of all tables."""


def token_acts(n_tokens: int, nnz: int) -> dict[str, int]:
    """Members of token_acts.npz."""
    index = 4 if nnz < 1 << 31 else 8
    return {
        "data": 4 * nnz,
        "indices": 4 * nnz,
        "indptr": index * (n_tokens + 1),
        "format": 3,
        "shape": 16,
        "example_idx": 8 * n_tokens,
        "token_idx": 4 * n_tokens,
    }
