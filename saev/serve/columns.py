"""Numbers of all latents as one binary answer: little-endian arrays behind a list of them."""

import json
import typing as tp
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saev.explorer import columns as figures_
from saev.inference.shown import image_purity, strong_first
from saev.serve.measured import NONE, Measured
from saev.serve.problems import Problem

ALIGNMENT = 8

_HELD_OUT = figures_.HELD_OUT


class Packed(tp.NamedTuple):
    """A column: one number for each latent."""

    name: str
    array: np.ndarray
    dictionary: list[str] | None = None
    """Texts that the numbers are places of."""


def pack(n: int, columns: Iterable[Packed]) -> bytes:
    """Columns in one piece.

    Four bytes say the length of a JSON text, which follows and is padded so that what comes behind
    begins at a multiple of 8. It says of each column its name, dtype (of NumPy, little-endian), its
    first byte behind the JSON, and its number of values; columns of texts have a ``dictionary``.

    Args:
        n: number of latents.
        columns: what to pack.
    """
    listed, arrays, start = [], [], 0
    for name, array, dictionary in columns:
        data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
        entry = {"name": name, "dtype": array.dtype.str[1:], "start": start, "length": len(array)}
        listed.append(entry if dictionary is None else {**entry, "dictionary": dictionary})
        arrays.append(data + bytes(-len(data) % ALIGNMENT))
        start += len(arrays[-1])
    head = json.dumps({"n": n, "columns": listed}, ensure_ascii=False).encode()
    head += b" " * (-(4 + len(head)) % ALIGNMENT)
    return b"".join([len(head).to_bytes(4, "little"), head, *arrays])


# --- Columns of the table ------------------------------------------------------------------------


def names(measured: Measured) -> list[str]:
    """The columns of `latents.parquet` that hold one number or text for each latent."""
    schema = measured.tables.schema("latents")
    return [field.name for field in schema if not pa.types.is_list(field.type)]


def of_table(measured: Measured, wanted: Sequence[str] = ()) -> bytes:
    """Columns of `latents.parquet`, packed.

    In integers, -1 stands for what is not defined, and NaN in other numbers. Integers of 64 bits
    are float64, as JavaScript counts.

    Args:
        measured: the SAE.
        wanted: names of columns; all by default.

    Raises:
        Problem: there is no such column.
    """
    known = names(measured)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise Problem(
            404, f"There is no column {unknown[0][:60]!r}.", f"There are: {', '.join(known)}."
        )
    table = measured.whole("latents", list(wanted) or known)
    return pack(measured.d_sae, (_packed(name, table[name]) for name in table.column_names))


def _packed(name: str, column: pa.ChunkedArray) -> Packed:
    kind = column.type
    if pa.types.is_string(kind):
        coded = pc.dictionary_encode(column).combine_chunks()
        codes = pc.fill_null(coded.indices, NONE).to_numpy()
        return Packed(name, codes, coded.dictionary.to_pylist())
    if pa.types.is_floating(kind):
        filled = pc.fill_null(column, float("nan")).to_numpy()
        return Packed(name, filled)
    filled = pc.fill_null(column, NONE).to_numpy()
    return Packed(name, filled.astype(np.float64 if filled.dtype.itemsize > 4 else np.int32))


# --- Figures that lists show ---------------------------------------------------------------------


class Figures(tp.NamedTuple):
    """The figures that lists show, sort and filter by."""

    columns: list[dict[str, tp.Any]]
    """What they are: those of :data:`saev.explorer.columns.COLUMNS` that the SAE has."""
    data: bytes
    """Their numbers, packed, with those that pages need beside them: `order`, `tokens`, `class` and
    `mask` (the best ones), `x`, `y`, `top_example` and `name`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return len(self.data)


def figures(measured: Measured) -> Figures:
    """The figures that lists show."""
    return measured.cached("figures", lambda: _figures(measured))


def _figures(measured: Measured) -> Figures:
    held_out = has_held_out(measured)
    wanted = {"n_tokens", "n_images", "frequency", "mean", "x", "y", "best_class", "best_mask",
              "name"}  # fmt: skip
    schema = measured.tables.schema("latents").names
    for one in figures_.COLUMNS:
        wanted |= {one.source, one.source + _HELD_OUT} & set(schema)
    table = measured.whole("latents", sorted(wanted))
    shown, packed = [], []

    def values(one: figures_.Column, held_out: bool) -> np.ndarray:
        if one.source == "purity":
            return _purity(measured)
        shares = measured.facts.get("quantiles", [])
        return figures_.read(table, one, shares, held_out=held_out)

    for one in figures_.COLUMNS:
        is_held_out = one.has_sides and held_out
        found = values(one, is_held_out)
        if np.isnan(found).all():
            continue
        facts = {"key": one.key, "name": one.name, "hint": one.hint, "unit": one.unit,
                 "log": one.is_log}  # fmt: skip
        packed.append(Packed(one.key, found.astype(np.float32)))
        if is_held_out:
            facts["all"] = f"{one.key}_all"
            packed.append(Packed(f"{one.key}_all", values(one, False).astype(np.float32)))
        shown.append(facts)
    packed += [
        Packed("order", _order(table)),
        Packed("tokens", figures_.floats(table["n_tokens"])),
        Packed("top_example", measured.shown().top.astype(np.int32)),
        _packed("class", table["best_class"]),
        _packed("mask", table["best_mask"]),
        *(Packed(axis, figures_.floats(table[axis]).astype(np.float32)) for axis in ("x", "y")),
        _packed("name", table["name"]),
    ]
    return Figures(shown, pack(measured.d_sae, packed))


def has_held_out(measured: Measured) -> bool:
    """Whether there are images that are known to be held out."""
    return bool(measured.facts.get("held_out", {}).get("n_images"))


def _order(table: pa.Table) -> np.ndarray:
    """All latents, strong and rare ones first, int32 [d_sae]; of `latents.parquet`."""
    names_ = ("frequency", "mean", "n_images")
    found = strong_first(*(figures_.floats(table[name]) for name in names_))
    return found.astype(np.int32)


def _purity(measured: Measured) -> np.ndarray:
    """Share of the most common class among each latent's strongest images, float64 [d_sae]; NaN if
    they have no classes."""
    pairs, known = measured.shown(), measured.names()
    latent, example = pairs.latent[pairs.is_strong], pairs.example[pairs.is_strong]
    rows = np.searchsorted(known.example, example)
    class_idx = known.class_idx[rows] if len(known.class_idx) else np.full(len(rows), NONE)
    return image_purity(latent, class_idx, measured.d_sae)
