"""What is known of one latent."""

import math
import typing as tp

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saev.serve.measured import Measured
from saev.serve.problems import Problem

MAX_LATENTS = 200
"""Most latents in one answer."""
MAX_ROWS = 500
"""Most images in one answer."""
ORDERS = ("max", "mean", "example")


def one(measured: Measured, latent: int) -> dict[str, tp.Any]:
    """All figures of a latent, its images with the values of their patches, its classes.

    Args:
        measured: the SAE.
        latent: number.

    Raises:
        Problem: there is no such latent.
    """
    measured.check_latent(latent)
    figures = measured.rows("latents", latent).to_pylist()[0]
    names = measured.names()
    examples = [
        {**row, **names.of(row["example"])} for row in measured.rows("examples", latent).to_pylist()
    ]
    for row in examples:
        del row["latent"]
    facts = measured.facts
    return {
        "run": measured.key,
        "figures": figures,
        "quantile_shares": facts.get("quantiles"),
        "examples": examples,
        "classes": classes(measured, latent),
    }  # fmt: skip


def classes(measured: Measured, latent: int) -> list[dict[str, tp.Any]]:
    """The classes that a latent finds, best first."""
    pairs = measured.pairs()
    first, last = np.searchsorted(pairs["latent"].to_numpy(), [latent, latent + 1])
    known = {one["class"]: one for one in measured.class_list()}
    found = pairs.slice(int(first), int(last - first)).drop_columns(["latent"]).to_pylist()
    rows = []
    for row in found:
        named = known[row["class_idx"]]
        rows.append({"class": row.pop("class_idx"), "name": named["name"], "kind": named["kind"],
                     "value": named["value"], **row})  # fmt: skip
    return rows


def examples(
    measured: Measured, latents: tp.Sequence[int], most: int
) -> dict[str, list[dict[str, tp.Any]]]:
    """The first images of some latents, by number, for lists.

    Args:
        measured: the SAE.
        latents: numbers, at most MAX_LATENTS.
        most: images of each.

    Raises:
        Problem: there is no such latent, or there are too many.
    """
    if len(latents) > MAX_LATENTS:
        raise Problem(400, f"{len(latents)} latents at once.", f"Ask for {MAX_LATENTS} at most.")
    for latent in latents:
        measured.check_latent(latent)
    names = measured.names()
    return {
        str(latent): [
            {**row, **names.of(row["example"])}
            for row in measured.rows("examples", latent).slice(0, most).to_pylist()
        ]
        for latent in latents
    }  # fmt: skip


def images(
    measured: Measured,
    latent: int,
    *,
    order: str = "max",
    low: float = -math.inf,
    high: float = math.inf,
    class_idx: int | None = None,
    first: int = 0,
    n: int = 50,
) -> dict[str, tp.Any]:
    """The images on which a latent fires, of which `image_acts_by_latent.parquet` has those above
    its floor.

    Args:
        measured: the SAE.
        latent: number.
        order: "max" or "mean" from the highest value down, or "example".
        low: lowest value on an image.
        high: highest value.
        class_idx: of one class only.
        first: how many to leave out.
        n: how many to give.

    Raises:
        Problem: an argument is wrong.
    """
    measured.check_latent(latent)
    if order not in ORDERS:
        raise Problem(400, f"There is no order {order[:40]!r}.", f"Take {' or '.join(ORDERS)}.")
    names = measured.names()
    table = measured.rows("image_acts_by_latent", latent)
    example = table["example"].to_numpy()
    values = {key: table[key].to_numpy().astype(np.float32) for key in ("max", "mean")}
    mine = (values["max"] >= low) & (values["max"] <= high)
    if class_idx is not None:
        rows = np.searchsorted(names.example, example)
        mine &= names.class_idx[np.minimum(rows, len(names.class_idx) - 1)] == class_idx
    chosen = np.flatnonzero(mine)
    if order != "example":
        chosen = chosen[np.lexsort((example[chosen], -values[order][chosen]))]
    shown = chosen[max(0, first) : max(0, first) + min(max(0, n), MAX_ROWS)]
    return {
        "run": measured.key,
        "latent": latent,
        "n": len(chosen),
        "floor": measured.facts.get("image_floor"),
        "images": [
            {**names.of(int(example[i])), **{k: float(v[i]) for k, v in values.items()}}
            for i in shown
        ],
    }  # fmt: skip


def of_class(measured: Measured, class_idx: int) -> dict[str, tp.Any]:
    """A class and the latents that find it, best first.

    Raises:
        Problem: there is no such class.
    """
    found = measured.rows("classes", class_idx)
    if not len(found):
        raise Problem(
            404, f"There is no class {class_idx}, or no latent fires on it.",
            "Take a number of api/runs/RUN/classes.",
        )  # fmt: skip
    row = next(one for one in measured.class_list() if one["class"] == class_idx)
    rows = found.drop_columns(["class_idx", "kind", "value", "name"]).to_pylist()
    named = {"class": class_idx, **{key: row[key] for key in ("kind", "value", "name")}}
    return {"run": measured.key, **named, "latents": rows}


def all_classes(measured: Measured) -> dict[str, tp.Any]:
    """All classes, with the latent that finds each best, and how many images each has."""
    idx = measured.names().class_idx
    n_images = np.bincount(idx[idx >= 0])
    rows = [
        {**row, "n_images": int(n_images[row["class"]])
         if row["kind"] == "image" and row["class"] < len(n_images) else None}
        for row in measured.class_list()
    ]  # fmt: skip
    return {"run": measured.key, "classes": rows}


def float_values(column: pa.ChunkedArray) -> np.ndarray:
    """Values of latents as float32, whatever they are stored as."""
    return pc.cast(column, pa.float32()).to_numpy()
