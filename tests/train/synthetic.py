"""Shards whose activations are sparse sums of known directions, so that training can be judged."""

import io
import typing as tp

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from described import list_files
from safetensors.numpy import save as save_safetensors

from saev import storage
from saev.shards import Metadata
from saev.shards.protocol import shard_name


class Truth(tp.NamedTuple):
    """What the activations were made of."""

    dictionary: np.ndarray
    """Unit rows, float32 [n_features, d_model]."""
    mean: np.ndarray
    """Added to every token, float32 [d_model]."""


def make_truth(d_model: int = 32, n_features: int = 48, seed: int = 0) -> Truth:
    """Random directions and a mean that is larger than the signal."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n_features, d_model)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Truth(rows, 3 * rng.standard_normal(d_model).astype(np.float32))


def write_shards(
    root: str,
    truth: Truth,
    *,
    n_examples: int = 300,
    content_tokens: int = 16,
    layers: tuple[int, ...] = (3, 7),
    n_active: int = 3,
    per_shard: int = 128,
    seed: int = 1,
    protocol: tp.Literal["3.0", "2.1"] = "3.0",
    labels: bool = False,
) -> str:
    """A complete folder below ``root``, of sums of `n_active` directions; returns its URL."""
    rng = np.random.default_rng(seed)
    n_features, d_model = truth.dictionary.shape
    tokens = content_tokens + 1
    codes = np.zeros((n_examples * tokens * len(layers), n_features), np.float32)
    for row in codes:
        row[rng.choice(n_features, n_active, replace=False)] = rng.uniform(1, 2, n_active)
    acts = (codes @ truth.dictionary + truth.mean).reshape(len(layers), n_examples, tokens, d_model)
    return write_acts(root, acts, layers, per_shard, protocol, rng if labels else None, seed)


def write_acts(
    root: str,
    acts: np.ndarray,
    layers: tuple[int, ...],
    per_shard: int,
    protocol: tp.Literal["3.0", "2.1"] = "3.0",
    labels: np.random.Generator | None = None,
    name: int = 0,
) -> str:
    """A complete folder of the given vectors, float32 [layer, example, token, d_model]."""
    _, n_examples, tokens, d_model = acts.shape
    content_tokens = tokens - 1
    metadata = Metadata(
        protocol=protocol, family="synthetic", ckpt="dictionary", layers=layers,
        content_tokens_per_example=content_tokens, cls_token=True, d_model=d_model,
        n_examples=n_examples, max_tokens_per_shard=per_shard * tokens * len(layers),
        data={"seed": name}, pixel_agg=None if labels is None else "majority",
    )  # fmt: skip
    url = storage.join(root, metadata.hash if protocol == "3.0" else metadata.hash[:8])
    raw = metadata.to_dict()
    if protocol == "2.1":
        known = (
            "protocol family ckpt layers content_tokens_per_example cls_token d_model n_examples "
            "max_tokens_per_shard data dtype"
        )
        raw = {key: raw[key] for key in known.split()}
    storage.write_json(storage.join(url, "metadata.json"), raw)
    infos, sums = [], []
    for i, start in enumerate(range(0, n_examples, per_shard)):
        part = acts[:, start : start + per_shard]
        if protocol == "2.1":
            part = part.transpose(1, 0, 2, 3)
        data = np.ascontiguousarray(part).tobytes()
        file = shard_name(i)
        storage.write_bytes(storage.join(url, file), data)
        info: dict[str, tp.Any] = {"name": file, "n_examples": min(per_shard, n_examples - start)}
        if protocol == "3.0":
            checksum = storage.format_checksum(storage.crc32c(data))
            info |= {"n_bytes": len(data), "checksum": checksum}
            rows = part.reshape(-1, tokens * d_model)
            sums += [storage.crc32c(np.ascontiguousarray(row)) for row in rows]
        infos.append(info)
    if labels is not None:
        values = labels.integers(0, 3, (n_examples, content_tokens), dtype=np.uint8)
        storage.write_bytes(storage.join(url, "labels.bin"), values.tobytes())
    if protocol == "3.0":
        storage.write_bytes(storage.join(url, "checksums.bin"), np.array(sums, "<u4").tobytes())
        storage.write_bytes(storage.join(url, "stats.safetensors"), _stats(acts))
        table = pa.table({"index": np.arange(n_examples), "url": [""] * n_examples})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        storage.write_bytes(storage.join(url, "examples.parquet"), buffer.getvalue())
    storage.write_json(storage.join(url, "shards.json"), infos)
    if protocol == "3.0":
        list_files(url)
    return url


def _stats(acts: np.ndarray) -> bytes:
    tensors = {}
    for kind, rows in (("content", acts[:, :, 1:]), ("special", acts[:, :, :1])):
        x = rows.reshape(len(acts), -1, acts.shape[-1]).astype(np.float64)
        tensors[f"{kind}.mean"] = x.mean(1)
        tensors[f"{kind}.mean_sq_norm"] = np.square(x).sum(-1).mean(1)
        tensors[f"{kind}.count"] = np.array([x.shape[1]], np.int64)
    return save_safetensors(tensors)


def recovered(w_dec: torch.Tensor, truth: Truth) -> float:
    """Mean over the true directions of the best cosine with a decoder row."""
    rows = torch.nn.functional.normalize(w_dec.detach().float(), dim=1)
    return (torch.from_numpy(truth.dictionary) @ rows.T).max(1).values.mean().item()
