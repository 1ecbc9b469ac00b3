"""Parsing stored bytes. Bytes that cannot be parsed are an error of one sentence.

Libraries raise errors of any type on bad bytes. :func:`parsed` turns these into errors of saev. So
its block must contain only the call of a library's parser. The bytes must be in memory, or come
from a reader that raises errors of :mod:`saev.errors`.
"""

import contextlib
import io
import json
import math
import os
import tomllib
import typing as tp
from collections.abc import Iterator, Mapping

import numpy as np

from saev.errors import CorruptDataError, SaevError
from saev.storage.urls import normalize

MAX_JSON_BYTES = 256 << 20
"""Most bytes of JSON. Parsed objects take many times the memory of their text. The list of a
million shards has 150 MB."""

_INT64 = 1 << 63


@contextlib.contextmanager
def parsed(
    url: str | os.PathLike,
    what: str,
    *,
    remedy: str = "It may be truncated or damaged.",
    error: type[SaevError] = CorruptDataError,
) -> Iterator[None]:
    """Turn any error of a parser into ``error``.

    Args:
        url: the object with the bytes.
        what: the expected format with its article, such as "a safetensors file".
        remedy: a sentence about what to do.
        error: the error to raise.
    """
    try:
        yield
    except SaevError:
        raise
    except BaseException as err:
        # A panic of Rust in safetensors is a BaseException, but not an Exception.
        if not isinstance(err, Exception) and type(err).__name__ != "PanicException":
            raise
        raise error(f"{normalize(url)} is not {what} ({_reason(err)}). {remedy}") from err


def _reason(err: BaseException) -> str:
    """The first line of an error's message. The message may be empty or megabytes long."""
    if isinstance(err, RecursionError):
        return "it is nested too deeply"
    if isinstance(err, MemoryError):
        return "it asks for more memory than there is"
    text = " ".join(str(err).strip().split("\n")[0].split())
    kind = "" if isinstance(err, ValueError) and text else f"{type(err).__name__}: "
    return f"{kind}{text[:200]}" if text else type(err).__name__


def parse_text(data: bytes, url: str | os.PathLike) -> str:
    """Text. Raises CorruptDataError if it is not UTF-8."""
    with parsed(url, "UTF-8 text", remedy="Save it as UTF-8."):
        return data.decode("utf-8")


def parse_json(data: bytes, url: str | os.PathLike) -> tp.Any:
    """JSON that all programs read: no NaN or infinity, no key twice, no integer above 64 bits.

    Raises:
        CorruptDataError: the bytes are not such JSON, or more than :data:`MAX_JSON_BYTES`.
    """
    if len(data) > MAX_JSON_BYTES:
        raise CorruptDataError(
            f"{normalize(url)} has {len(data)} bytes, expected at most {MAX_JSON_BYTES} of JSON."
        )
    text = parse_text(data, url)
    with parsed(url, "valid JSON", remedy="It may be truncated."):
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_float,
            parse_int=_int,
        )
        if "\\u" in text:  # refuse half of a surrogate pair, which cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
        return value


def parse_toml(data: bytes, url: str | os.PathLike, error: type[SaevError]) -> dict[str, tp.Any]:
    """Parse TOML. Raises ``error``, which names the line and column of a mistake."""
    with parsed(url, "valid TOML", remedy="Correct it.", error=error):
        return tomllib.loads(parse_text(data, url))


def _object(pairs: list[tuple[str, tp.Any]]) -> dict[str, tp.Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.60} occurs twice")
    return found


def _no_constant(text: str) -> tp.NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _int(text: str) -> int:
    value = int(text) if len(text) < 21 else _INT64
    if not -_INT64 <= value < _INT64:
        raise ValueError(f"{text[:40]} has more than 64 bits")
    return value


Shape = tuple[int, ...]


def fits(found: Shape, expected: Shape) -> bool:
    """Whether an array has the expected shape. An expected axis of -1 may have any length."""
    return len(found) == len(expected) and all(
        want in (-1, have) for have, want in zip(found, expected, strict=True)
    )


class NpyHeader(tp.NamedTuple):
    """The header of an `.npy` array."""

    dtype: np.dtype
    shape: Shape
    is_fortran: bool
    """Whether the first axis varies fastest."""
    n_bytes: int
    """Size of the header, which is the offset of the values."""


def npy_header(head: bytes, n_bytes: int) -> NpyHeader:
    """Parse the header of an `.npy` array and compare it with the size of the array.

    Like other parsers, it must be called inside :func:`parsed`.

    Args:
        head: the first bytes of the array. They must contain the whole header.
        n_bytes: size of header and values.

    Raises:
        ValueError: the header is damaged, is of Python objects, or does not fit the size.
    """
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"it has npy version {version}, expected 1.0 or 2.0")
    shape, is_fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError(f"it has dtype {dtype}, expected numbers")
    left, needed = n_bytes - stream.tell(), math.prod(shape) * dtype.itemsize
    if left != needed or any(size < 0 for size in shape):
        raise ValueError(
            f"shape {list(shape)} of {dtype} needs {needed} bytes, but {left} are there"
        )
    return NpyHeader(dtype, shape, is_fortran, stream.tell())


def parse_tensors(
    data: bytes,
    url: str | os.PathLike,
    expected: Mapping[str, tuple[str, Shape]] | None = None,
    *,
    remedy: str = "It may be truncated or damaged.",
) -> dict[str, np.ndarray]:
    """Parse the arrays of a safetensors object.

    Args:
        data: the object. Its header is compared with its size before memory is allocated.
        url: URL of the object, for messages.
        expected: dtype and shape of every array; an axis of -1 may have any length. None accepts
            any arrays.
        remedy: what to do about a damaged object.

    Raises:
        CorruptDataError: the bytes are not safetensors, or the arrays are not the expected ones.
    """
    import safetensors.numpy

    with parsed(url, "a safetensors file", remedy=remedy):
        tensors = safetensors.numpy.load(bytes(data))
    for name, (dtype, shape) in (expected or {}).items():
        found = tensors.get(name)
        if found is None:
            raise CorruptDataError(
                f"{normalize(url)} has arrays {_names(tensors)}, expected {name!r}. {remedy}"
            )
        if found.dtype != np.dtype(dtype) or not fits(found.shape, shape):
            raise CorruptDataError(
                f"{normalize(url)}: {name} is {found.dtype} {list(found.shape)}, expected "
                f"{np.dtype(dtype)} {list(shape)}. {remedy}"
            )
    return tensors


def _names(tensors: Mapping[str, object]) -> str:
    shown = sorted(tensors)[:8]
    return ", ".join(f"{name:.40}" for name in shown) + (", …" if len(tensors) > 8 else "")
