"""Hostile and damaged bytes are one sentence, whatever the libraries make of them."""

import contextlib
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from saev import storage
from saev.errors import ConfigError, CorruptDataError, SaevError

TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(TREES)
def test_json_is_what_the_standard_library_makes_of_it(tree: object) -> None:
    text = json.dumps(tree)
    if tree is None or "\\ud" not in text:
        assert storage.parse_json(text.encode(), "x.json") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("NaN", "NaN is not a JSON number"),
        ('{"a": [-Infinity]}', "-Infinity is not a JSON number"),
        ("1e999", "1e999 is too large"),
        ("9" * 5_000, "more than 64 bits"),
        ("9223372036854775808", "more than 64 bits"),
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' occurs twice"),
        ('"\\ud800"', "surrogates not allowed"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
        ('{"a": 1', "Expecting"),
    ],
)
def test_json_that_is_none(text: str, message: str) -> None:
    with pytest.raises(CorruptDataError, match=rf"x\.json is not valid JSON \(.*{message}"):
        storage.parse_json(text.encode(), "x.json")


def test_json_that_is_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    from saev.storage import parsing

    monkeypatch.setattr(parsing, "MAX_JSON_BYTES", 1000)
    with pytest.raises(CorruptDataError, match="has 1002 bytes, expected at most 1000"):
        storage.parse_json(b'"' + b"a" * 1000 + b'"', "x.json")


@pytest.mark.parametrize(
    "text", ["a = [" + "[" * 100_000, "a = 1\na = 2", "a = \x00", "[a", "\xff"]
)
def test_toml_that_is_none(text: str) -> None:
    with pytest.raises((ConfigError, CorruptDataError), match=r"x\.toml is not (valid TOML|UTF-8)"):
        storage.parse_toml(text.encode("latin-1"), "x.toml", ConfigError)


class PanicException(BaseException):
    """What a panic of Rust's looks like."""


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OverflowError("x"), struct.error("x"), RecursionError(), EOFError(),
     KeyError("k"), OSError("x"), SystemError("x"), UnicodeDecodeError("utf-8", b"", 0, 1, "x"),
     PanicException("x")],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_whatever_a_library_raises(error: BaseException) -> None:
    with (
        pytest.raises(CorruptDataError, match=r"a\.bin is not a thing \(.+\)\. Do that\."),
        storage.parsed("a.bin", "a thing", remedy="Do that."),
    ):
        raise error


def test_what_is_ours_stays_and_interruptions_too() -> None:
    for error in (ConfigError("mine"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught, storage.parsed("a.bin", "a thing"):
            raise error
        assert caught.value is error


# --- safetensors ----------------------------------------------------------------------------

ARRAYS = {"a": np.arange(6.0).reshape(2, 3), "n": np.array([7])}
EXPECTED = {"a": ("float64", (2, -1)), "n": ("int64", (1,))}


def test_arrays() -> None:
    found = storage.parse_tensors(safetensors.numpy.save(ARRAYS), "x", EXPECTED)
    assert found.keys() == ARRAYS.keys()
    for name in ARRAYS:
        np.testing.assert_array_equal(found[name], ARRAYS[name])


@pytest.mark.parametrize(
    "change", [{"a": ARRAYS["a"][0]}, {"a": ARRAYS["a"].astype("f4")}, {"n": np.array([7, 8])}]
)
def test_other_arrays(change: dict[str, np.ndarray]) -> None:
    with pytest.raises(CorruptDataError, match=r"x: (a|n) is .*, expected"):
        storage.parse_tensors(safetensors.numpy.save({**ARRAYS, **change}), "/x", EXPECTED)
    with pytest.raises(CorruptDataError, match="has arrays n, expected 'a'"):
        storage.parse_tensors(safetensors.numpy.save({"n": ARRAYS["n"]}), "/x", EXPECTED)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F64", "shape": [6_000_000_000], "data_offsets": [0, 48]}},
        {"a": {"dtype": "F64", "shape": [6], "data_offsets": [0, 1 << 60]}},
        {"a": {"dtype": "F64", "shape": [-6], "data_offsets": [0, 48]}},
        {"a": {"dtype": "F64", "shape": ["6"], "data_offsets": [0, 48]}},
        {"a": {"dtype": "BF16", "shape": [24], "data_offsets": [0, 48]}},
        {"a": {"dtype": "X", "shape": [24], "data_offsets": [0, 48]}},
        {"a": 7},
        [],
    ],
)
def test_headers_that_lie(header: object) -> None:
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(48)
    with pytest.raises(CorruptDataError, match="x is not a safetensors file"):
        storage.parse_tensors(data, "/x", None)
    for length in (0, 1 << 62, (1 << 64) - 1):
        with pytest.raises(CorruptDataError, match="x is not a safetensors file"):
            storage.parse_tensors(length.to_bytes(8, "little") + data[8:], "/x", None)


@given(st.data())
def test_mutations_are_arrays_or_a_sentence(data: st.DataObject) -> None:
    """Cut, overwritten, spliced: never a traceback."""
    seeds = [
        safetensors.numpy.save(ARRAYS),
        json.dumps({"a": [1, 2.5, {"b": None}]}).encode(),
        b'a = 1\n[b]\nc = [1, "x"]\n',
    ]
    changed = bytearray(data.draw(st.sampled_from(seeds)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        piece = data.draw(st.binary(max_size=12))
        changed[at : at + data.draw(st.integers(0, 12))] = piece
    for parse in (
        lambda b: storage.parse_tensors(b, "x", EXPECTED),
        lambda b: storage.parse_json(b, "x"),
        lambda b: storage.parse_toml(b, "x", ConfigError),
    ):
        with contextlib.suppress(SaevError):
            parse(bytes(changed))


def test_a_file_is_read_no_further_than_it_goes(tmp_path: Path) -> None:
    place = tmp_path / "x"
    place.write_bytes(b"abc")
    with (
        storage.RangeReader(place) as reader,
        pytest.raises(CorruptDataError, match="is truncated"),
    ):
        reader.read(1, 1 << 60)
    assert io.BytesIO(storage.read_bytes(place, fresh=True)).read() == b"abc"


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">i2", "|u1", "<f8"])
def test_the_header_of_an_array_is_what_numpy_wrote(dtype: str, order: str) -> None:
    array = np.asarray(np.arange(6).reshape(2, 3), dtype, order=order)
    stream = io.BytesIO()
    np.save(stream, array)
    data = stream.getvalue()
    head = storage.npy_header(data, len(data))
    assert (head.dtype, head.shape, head.is_fortran) == (array.dtype, (2, 3), order == "F")
    assert data[head.n_bytes :] == array.tobytes(order)
    for n_bytes in (len(data) - 1, len(data) + 1):
        with pytest.raises(ValueError, match=rf"needs {array.nbytes} bytes, but {n_bytes - 128}"):
            storage.npy_header(data, n_bytes)


def test_arrays_of_objects_have_no_header_that_is_taken() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="dtype object, expected numbers"):
        storage.npy_header(stream.getvalue(), len(stream.getvalue()))
