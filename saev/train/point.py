"""One resume point on storage: its tensors, its curves, and a pointer that lists both.

The pointer is written last. A point is damaged if one byte of what its pointer lists is wrong.
Version 0.1.0 wrote pointers without a list, and no curves.
"""

import json
import re
import typing as tp
from collections.abc import Callable, Iterator

import safetensors.torch
import torch
from torch import Tensor

from saev import storage
from saev.errors import CorruptDataError

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

_POINTER = re.compile(r"step-\d{12,}\.json")
_KEYS_OF_0_1_0 = {"step", "n_bytes", "checksum", "meta"}

Row = dict[str, float | int | None]


class CurveRows(tp.NamedTuple):
    """The curves of one run up to a step."""

    metrics: list[Row]
    timings: list[Row]


class ResumePoint(tp.NamedTuple):
    """The state of training after a step."""

    step: int
    """Steps done."""
    tensors: dict[str, Tensor]
    """On the CPU."""
    meta: dict[str, tp.Any]
    """Plain JSON that was saved with them: `run_ids`, `rules`, `loader`."""
    curves: dict[str, CurveRows] | None = None
    """Rows of the curves, by run id. None in a point of version 0.1.0, whose `meta` counts the rows
    (`n_rows`)."""


class Pointer(tp.NamedTuple):
    """What the pointer of a point says."""

    step: int
    meta: dict[str, tp.Any]
    files: dict[str, storage.Listed]


def stem(step: int) -> str:
    """What the names of a point's objects begin with."""
    return f"step-{step:012d}"


def stem_of(name: str) -> str:
    """The stem of an object's name."""
    return name.partition(".")[0]


def is_pointer(name: str) -> bool:
    """Whether an object is a pointer, by its name."""
    return _POINTER.fullmatch(name) is not None


def write(place: str, point: ResumePoint) -> None:
    """Publish a point in a folder, its pointer last."""
    name, curves = stem(point.step), point.curves or {}
    files = {
        tensors_of(name): _write(place, tensors_of(name), lambda o: _write_tensors(o, point)),
        curves_of(name): _write(place, curves_of(name), lambda o: _write_curves(o, curves)),
    }
    pointer = storage.seal({"step": point.step, "meta": point.meta}, files)
    storage.write_json(storage.join(place, f"{name}.json"), pointer)


def read(url: str) -> ResumePoint:
    """The point of a pointer.

    Raises:
        CorruptDataError: the point is proven to be damaged: every read gave the same wrong bytes,
            or an object is missing from two listings.
        StorageError: the point cannot be read, which says nothing about its bytes.
    """
    pointer = read_pointer(url)
    place, name = storage.parent(url), stem(pointer.step)
    _check_there(place, pointer)
    curves = None
    if curves_of(name) in pointer.files:
        data = _read(place, curves_of(name), pointer)
        curves = _parse_curves(data, storage.join(place, curves_of(name)))
    data = _read(place, tensors_of(name), pointer)
    with storage.parsed(storage.join(place, tensors_of(name)), "a safetensors file"):
        tensors = safetensors.torch.load(data)
    return ResumePoint(pointer.step, tensors, pointer.meta, curves)


def read_pointer(url: str) -> Pointer:
    """What a pointer says. Raises as :func:`read` does."""
    name = stem_of(storage.name(url))
    try:
        raw, files, _ = storage.read_sealed(url)
    except CorruptDataError:
        raw = storage.read_json(url)
        if not isinstance(raw, dict) or raw.keys() != _KEYS_OF_0_1_0:
            raise
        files = {tensors_of(name): storage.Listed(raw["n_bytes"], str(raw["checksum"]))}
    keys = {"run_ids", "loader", "n_rows" if raw.keys() == _KEYS_OF_0_1_0 else "rules"}
    step, meta = int(name[5:]), raw.get("meta")
    known = isinstance(meta, dict) and keys <= meta.keys() and isinstance(meta["run_ids"], list)
    if not files or not known or raw.get("step") != step:
        raise CorruptDataError(f"{url} is damaged: it is not the pointer of a resume point.")
    return Pointer(step, raw["meta"], dict(files))


def tensors_of(name: str) -> str:
    """The object with the tensors of a point."""
    return f"{name}.safetensors"


def curves_of(name: str) -> str:
    """The object with the curves of a point."""
    return f"{name}.curves.jsonl"


def _write(
    place: str, name: str, write: Callable[[storage.ChecksumWriter], None]
) -> storage.Listed:
    with storage.open_write(storage.join(place, name)) as raw:
        out = storage.ChecksumWriter(raw)
        write(out)
    return storage.Listed.written(out)


def _check_there(place: str, pointer: Pointer) -> None:
    for again in (True, False):
        names = {entry.name for entry in storage.list_dir(place)}
        missing = sorted(pointer.files.keys() - names)
        if not missing:
            return
        if not again:
            raise CorruptDataError(
                f"{storage.join(place, missing[0])} is missing; its resume point lists it."
            )


def _read(place: str, name: str, pointer: Pointer) -> bytes:
    return storage.read_listed(storage.join(place, name), pointer.files[name])


# --- Curves ------------------------------------------------------------------------------------


def _write_curves(out: storage.ChecksumWriter, curves: tp.Mapping[str, CurveRows]) -> None:
    """One line per row of each run: its id, the row, and its timing. Keys keep their order."""
    for run_id, rows in curves.items():
        for row, timing in zip(rows.metrics, rows.timings, strict=True):
            line = json.dumps([run_id, row, timing], allow_nan=False) + "\n"
            out.write(line.encode())


def _parse_curves(data: bytes, url: str) -> dict[str, CurveRows]:
    curves: dict[str, CurveRows] = {}
    for run_id, row, timing in _lines(data, url):
        rows = curves.setdefault(run_id, CurveRows([], []))
        rows.metrics.append(row)
        rows.timings.append(timing)
    return curves


def _lines(data: bytes, url: str) -> Iterator[tuple[str, Row, Row]]:
    for line in data.splitlines():
        with storage.parsed(url, "rows of curves"):
            run_id, row, timing = json.loads(line)
        yield run_id, row, timing


# --- Tensors -----------------------------------------------------------------------------------


def _write_tensors(out: storage.ChecksumWriter, point: ResumePoint) -> None:
    """Write the safetensors format tensor by tensor, because memory may not hold a second copy.

    Format: https://huggingface.co/docs/safetensors (length of the header as little-endian u64, the
    header as JSON padded with spaces, the buffers in the header's order).
    """
    header, offset = {}, 0
    for name, tensor in point.tensors.items():
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
    for tensor in point.tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            out.write(flat.view(torch.uint8).numpy().data)
