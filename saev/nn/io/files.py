"""Safe parsers for files of other projects: they run no code of a file and do not trust its sizes.

Sizes in headers are compared with the size of the file before memory is allocated.
"""

import contextlib
import io
import pickletools
import re
import typing as tp
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from saev import storage
from saev.errors import CheckpointError, CorruptDataError

MAX_CONFIG_BYTES = 1 << 20
"""Configs have some kilobytes."""

_MAX_COMPRESSION = 32
"""Most compression of an npz file. Weights hardly compress, so a higher one is an attack."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_STATE_DICT_NAMES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
)
"""The only names that the pickle of a state dict may refer to."""


def parsed(source: str, what: str) -> contextlib.AbstractContextManager[None]:
    """Turn any error of a parser into a CheckpointError."""
    remedy = "It may be truncated; copy it again."
    return storage.parsed(source, what, remedy=remedy, error=CheckpointError)


def parse_config(data: bytes, source: str) -> dict[str, tp.Any]:
    """A JSON object."""
    if len(data) > MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{source} has {len(data)} bytes, expected a config of at most {MAX_CONFIG_BYTES}."
        )
    try:
        found = storage.parse_json(data, source)
    except CorruptDataError as err:
        raise CheckpointError(str(err)) from err
    if not isinstance(found, dict):
        raise CheckpointError(f"{source} is not a config: expected a JSON object.")
    return found


def read_config(url: str) -> dict[str, tp.Any]:
    """A JSON object. Raises CheckpointError if it is not one."""
    return storage.read_parsed(url, lambda data: parse_config(data, url))


def read_safetensors(url: str) -> dict[str, Tensor]:
    """Tensors of a safetensors object. Raises CheckpointError if it is not one."""
    return storage.read_parsed(url, lambda data: parse_safetensors(data, url))


def read_state_dict(url: str) -> dict[str, Tensor]:
    """Tensors of a ``torch.save`` of a state dict. Raises CheckpointError if it is not one."""
    return storage.read_parsed(url, lambda data: parse_state_dict(data, url))


def read_npz(url: str) -> dict[str, Tensor]:
    """Arrays of a ``numpy.savez`` file. Raises CheckpointError if it is not one."""
    return storage.read_parsed(url, lambda data: parse_npz(data, url))


def integer(config: dict[str, tp.Any], key: str, source: str) -> int:
    """A positive integer of a config."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{source} has {key} = {value!r:.60}, expected a positive integer.")
    return value


def flag(config: dict[str, tp.Any], key: str, default: bool, source: str) -> bool:
    """A boolean of a config."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{source} has {key} = {value!r:.60}, expected true or false.")
    return value


def section(config: dict[str, tp.Any], key: str, source: str) -> dict[str, tp.Any]:
    """An object inside a config; empty if the key is missing."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} has {key} = {value!r:.60}, expected an object.")
    return value


def refuse_flags(
    config: dict[str, tp.Any], *, source: str, project: str, known: Iterable[str]
) -> None:
    """Raise CheckpointError for flags that are true and unknown to saev.

    Args:
        config: a config.
        source: URL of the config.
        project: the project that wrote the config.
        known: flags that saev handles, and those that matter only for training or provenance.
    """
    unknown = sorted(key for key, value in config.items() if value is True and key not in known)
    if unknown:
        raise CheckpointError(
            f"{source} has {', '.join(f'{key} = true' for key in unknown)}, which an SAE of saev "
            f"cannot express here. It cannot be imported; use {project} to read it."
        )


def take(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, str],
    source: str,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Check that a file holds all wanted tensors and no others, and return them.

    Args:
        tensors: the tensors of the file.
        wanted: name → shape with a letter per axis, such as "DS", "S" or "". Equal letters mean
            equal sizes.
        source: URL of the file.
        sizes: sizes of letters that are known from a config.

    Raises:
        CheckpointError: tensors are missing or unknown, have the wrong shape, or are not floats.
    """
    missing, unknown = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    if missing:
        raise CheckpointError(f"{source} lacks {names(missing)}; it has {names(tensors)}.")
    if unknown:
        raise CheckpointError(
            f"{source} has {names(unknown)} beside {names(wanted)}. What they do is not known, so "
            "it cannot be imported."
        )
    sizes = dict(sizes or {})
    for name, letters in wanted.items():
        tensor = tensors[name]
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{source}: {name} is of {tensor.dtype}, expected a float.")
        found = tuple(tensor.shape)
        if len(found) == len(letters):
            for letter, size in zip(letters, found, strict=True):
                sizes.setdefault(letter, size)
        expected = [sizes.get(letter, letter) for letter in letters]
        if list(found) != expected:
            shown = ", ".join(map(str, expected))
            raise CheckpointError(f"{source}: {name} has shape {list(found)}, expected [{shown}].")
        if tensor.isnan().any():
            raise CheckpointError(f"{source}: {name} has values that are not a number (NaN).")
    return {name: tensors[name] for name in wanted}


def names(tensors: Iterable[str], most: int = 12) -> str:
    """Sorted names for a message, at most ``most`` of them."""
    every = [f"{name:.60}" for name in sorted(tensors)]
    return ", ".join(every[:most]) + (", …" if len(every) > most else "") if every else "no tensors"


def parse_safetensors(data: bytes, source: str) -> dict[str, Tensor]:
    """Tensors of a safetensors object. Its parser compares the header with the size."""
    with parsed(source, "a safetensors file"):
        return safetensors.torch.load(data)


def parse_state_dict(data: bytes, source: str) -> dict[str, Tensor]:
    """Tensors of a ``torch.save`` of a state dict.

    Raises:
        CheckpointError: it is not a state dict, refers to code, or claims more than its size.
    """
    found = _load_torch(data, source)
    if not isinstance(found, dict):
        raise CheckpointError(f"{source} is not a state dict: it holds one {type(found).__name__}.")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{source} is not a state dict: its entry {name!r:.60} is a "
                f"{type(tensor).__name__}, expected a tensor."
            )
        _check_size(tensor, len(data), f"{source}: {name}")
    return found


def _load_torch(data: bytes, source: str) -> tp.Any:
    with parsed(source, "a state dict of torch.save"):
        if not data.startswith(b"PK"):
            raise CheckpointError(
                f"{source} is not a state dict of torch.save: it is not a zip archive. It may be "
                "damaged, or of a torch before 1.6; then load and save it with a newer one."
            )
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            claimed = sum(member.file_size for member in members)
            is_stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not is_stored or claimed > len(data):
                raise CheckpointError(
                    f"{source} has {len(data)} bytes, but claims to hold {claimed}. It is damaged "
                    "or hostile; get it again from its authors."
                )
            damaged = archive.testzip()  # torch.load does not compare checksums
            if damaged:
                raise CheckpointError(
                    f"{source}: {damaged} has another checksum than was recorded, so it is "
                    "damaged. Copy it again."
                )
            for member in members:
                if member.filename.endswith(".pkl"):
                    _check_pickle(archive.read(member), source)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _check_size(tensor: Tensor, n_bytes: int, source: str) -> None:
    """Refuse a tensor that is larger than its file: a view with strides of 0 can have any size."""
    if tensor.numel() * tensor.element_size() > n_bytes:
        raise CheckpointError(
            f"{source} has shape {list(tensor.shape)}, but the file has only {n_bytes} bytes. It "
            "is damaged or hostile; get it again from its authors."
        )


def _check_pickle(code: bytes, source: str) -> None:
    """Refuse a pickle that refers to anything but tensors, before torch.load allocates memory."""
    for opcode, argument, _ in pickletools.genops(code):
        if opcode.name == "GLOBAL" and _STATE_DICT_NAMES.fullmatch(str(argument)):
            continue
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST"):
            what = str(argument).replace(" ", ".") if argument else "a name made at run time"
            raise CheckpointError(
                f"{source} refers to {what:.100}, so it is more than a state dict of tensors, and "
                "reading it would run code. Save its state_dict() and read that."
            )


def parse_npz(data: bytes, source: str) -> dict[str, Tensor]:
    """Arrays of a ``numpy.savez`` file. Nothing is unpickled.

    Raises:
        CheckpointError: it is not one, an array is not of numbers, or a header does not fit.
    """
    tensors = {}
    with parsed(source, "an npz file"), zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        claimed = sum(member.file_size for member in members)
        if claimed > len(data) * _MAX_COMPRESSION:
            raise CheckpointError(
                f"{source} has {len(data)} bytes, but its arrays claim {claimed}. Weights do not "
                "compress like that: get the file again from its authors."
            )
        for member in members:
            name = member.filename.removesuffix(".npy")
            tensors[name] = _parse_npy(archive.read(member), f"{source}: {name}")
    return tensors


def _parse_npy(data: bytes, source: str) -> Tensor:
    with parsed(source, "an npy array"):
        head = storage.npy_header(data, len(data))
        if head.dtype.kind not in "fiu":
            raise CheckpointError(f"{source} has dtype {head.dtype}, expected numbers.")
        flat = np.frombuffer(data, head.dtype, offset=head.n_bytes)
        array = flat.reshape(head.shape, order="F" if head.is_fortran else "C")
        return torch.from_numpy(array.astype(head.dtype.newbyteorder("="), order="C"))


def read_vector(url: str) -> Tensor:
    """One vector: an ``.npy`` file, or a tensor as torch.save writes it.

    Raises:
        CheckpointError: it is neither.
    """
    return storage.read_parsed(url, lambda data: _parse_vector(data, url))


def _parse_vector(data: bytes, url: str) -> Tensor:
    vector = _parse_npy(data, url) if data.startswith(b"\x93NUMPY") else _load_torch(data, url)
    if not isinstance(vector, Tensor) or vector.ndim != 1:
        raise CheckpointError(f"{url} does not hold one vector (an .npy file, or a torch.save).")
    _check_size(vector, len(data), url)
    return vector
