"""Numbers of all latents as one binary answer: little-endian arrays behind a list of them."""

import json
import typing as tp
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saev.serve.measured import NONE, Measured
from saev.serve.problems import Problem

ALIGNMENT = 8
N_TOP = 8
"""A latent with fewer strong images than this is listed behind the others."""

ORDER, TOP_EXAMPLE = "order", "top_example"
MADE = (ORDER, TOP_EXAMPLE)
"""Columns that are not of `latents.parquet`."""


def names(measured: Measured) -> list[str]:
    """All columns that may be asked for."""
    schema = _schema(measured)
    return [field.name for field in schema if not pa.types.is_list(field.type)] + list(MADE)


def packed(measured: Measured, wanted: Sequence[str] = ()) -> bytes:
    """Columns in one piece.

    Four bytes say the length of a JSON text, which follows and is padded so that what comes behind
    begins at a multiple of 8. It says of each column its name, dtype (of NumPy, little-endian), its
    first byte behind the JSON, and its number of values; columns of texts have a ``dictionary``,
    and their values are places in it. In integers, -1 stands for what is not defined, and NaN in
    other numbers. Integers of 64 bits are float64, as JavaScript counts.

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
    chosen = list(wanted) or known
    of_table = [name for name in chosen if name not in MADE]
    table = measured.tables.read("latents", of_table) if of_table else None
    listed, arrays, start = [], [], 0
    for name in chosen:
        made = {ORDER: order, TOP_EXAMPLE: top_examples}.get(name)
        if made is not None:
            array, dictionary = made(measured), None
        else:
            array, dictionary = _array(tp.cast(pa.Table, table)[name])
        data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
        entry = {"name": name, "dtype": array.dtype.str[1:], "start": start, "length": len(array)}
        listed.append(entry if dictionary is None else {**entry, "dictionary": dictionary})
        arrays.append(data + bytes(-len(data) % ALIGNMENT))
        start += len(arrays[-1])
    head = json.dumps({"n": measured.d_sae, "columns": listed}, ensure_ascii=False).encode()
    head += b" " * (-(4 + len(head)) % ALIGNMENT)
    return b"".join([len(head).to_bytes(4, "little"), head, *arrays])


def order(measured: Measured) -> np.ndarray:
    """All latents, strong and rare ones first, int32 [d_sae].

    By mean value × log(1 / frequency); behind these come latents that fire on fewer images than
    are shown, and then those that never fire.
    """
    table = measured.tables.read("latents", ["frequency", "mean"])
    frequency = table["frequency"].to_numpy()
    mean = pc.fill_null(table["mean"], 0.0).to_numpy()
    n_images = measured.shown().n_top
    with np.errstate(divide="ignore"):
        score = np.where(frequency > 0, mean * -np.log(np.maximum(frequency, 1e-300)), -np.inf)
    is_few = n_images < min(N_TOP, int(n_images.max(initial=0)))
    return np.lexsort((-score, is_few, frequency == 0)).astype(np.int32)


def top_examples(measured: Measured) -> np.ndarray:
    """The strongest image of each latent, int32 [d_sae]."""
    return measured.shown().top.astype(np.int32)


def _schema(measured: Measured) -> pa.Schema:
    return measured.tables.schema("latents")


def _array(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str] | None]:
    """A column as numbers, and the texts that these are places of."""
    kind = column.type
    if pa.types.is_string(kind):
        coded = pc.dictionary_encode(column).combine_chunks()
        return pc.fill_null(coded.indices, NONE).to_numpy(), coded.dictionary.to_pylist()
    if pa.types.is_floating(kind):
        filled = pc.fill_null(column, float("nan")).to_numpy()
        return filled.astype(np.float32 if filled.dtype == np.float16 else filled.dtype), None
    filled = pc.fill_null(column, NONE).to_numpy()
    return filled.astype(np.float64 if filled.dtype.itemsize > 4 else np.int32), None
