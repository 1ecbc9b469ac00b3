"""Resume points: the whole state of a group of runs at one step, in two objects.

    <runs_root>/resume/<group>/step-000000001000.safetensors    weights, moments, counters
    <runs_root>/resume/<group>/step-000000001000.json           what belongs to it; written last

The pointer holds the size and checksum of the tensors, so a damaged point is noticed and the one
before it is used. The folder is deleted when the group's runs are published.
"""

import json
import logging
import typing as tp

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from saev import storage
from saev.errors import CorruptDataError, StorageError

logger = logging.getLogger(__name__)

N_KEPT = 2

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class ResumePoint(tp.NamedTuple):
    """A state that training can go on from."""

    step: int
    """Steps done."""
    tensors: dict[str, Tensor]
    """On the CPU."""
    meta: dict[str, tp.Any]
    """Plain JSON that was saved with them."""


def folder(runs_root: str, group: str) -> str:
    """Where the resume points of a group are."""
    return storage.join(runs_root, "resume", group)


def save(url: str, point: ResumePoint) -> None:
    """Publish a resume point below ``url`` and delete all but the last two."""
    stem = storage.join(url, f"step-{point.step:012d}")
    with storage.open_write(f"{stem}.safetensors") as raw:
        out = storage.ChecksumWriter(raw)
        _write_safetensors(out, point.tensors)
    pointer = {
        "step": point.step,
        "n_bytes": out.n_bytes,
        "checksum": out.checksum,
        "meta": point.meta,
    }
    storage.write_json(f"{stem}.json", pointer)
    for entry in _pointers(url)[N_KEPT:]:
        # The pointer goes first: a pointer without tensors would look like damage.
        storage.delete(entry)
        storage.delete(entry.removesuffix(".json") + ".safetensors")


def load(url: str) -> ResumePoint | None:
    """The newest intact resume point below ``url``; None if there is none.

    A damaged one is passed over with a warning.
    """
    for entry in _pointers(url):
        try:
            return _load_one(entry)
        except StorageError as err:
            logger.warning("Resume point passed over: %s", err)
    return None


def clear(url: str) -> None:
    """Delete the resume points of a finished group."""
    if storage.exists(url):
        storage.delete(url, recursive=True)


def _pointers(url: str) -> list[str]:
    """URLs of the pointers, newest first."""
    if not storage.is_dir(url):
        return []
    names = [e for e in storage.list_dir(url) if not e.is_dir and e.name.endswith(".json")]
    return [e.url for e in sorted(names, key=lambda e: e.name, reverse=True)]


def _load_one(entry: str) -> ResumePoint:
    pointer = storage.read_json(entry)
    place = entry.removesuffix(".json") + ".safetensors"
    try:
        step, n_bytes, checksum = pointer["step"], pointer["n_bytes"], pointer["checksum"]
        meta = pointer["meta"]
    except (KeyError, TypeError) as err:
        raise CorruptDataError(f"{entry} is not a resume point: {err} is missing.") from err
    data = storage.read_bytes(place)
    found = storage.format_checksum(storage.crc32c(data))
    if (len(data), found) != (n_bytes, checksum):
        raise CorruptDataError(
            f"{place} is damaged: {len(data)} bytes with {found}, expected {n_bytes} "
            f"with {checksum}."
        )
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as err:
        raise CorruptDataError(f"{place} is damaged: {err}.") from err
    return ResumePoint(step, tensors, meta)


def _write_safetensors(out: storage.ChecksumWriter, tensors: tp.Mapping[str, Tensor]) -> None:
    """Write the safetensors format tensor by tensor: the state may be most of the memory there is.

    Format: https://huggingface.co/docs/safetensors (length of the header as little-endian u64, the
    header as JSON padded with spaces, the buffers in the header's order).
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little"))
    out.write(text)
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            out.write(flat.view(torch.uint8).numpy().data)
