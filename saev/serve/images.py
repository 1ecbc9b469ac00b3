"""What is known of one image: its figures, and the latents that fire on it."""

import typing as tp

import numpy as np

from saev.secrets import redact
from saev.serve.latents import MAX_ROWS, float_values
from saev.serve.measured import NONE, Measured
from saev.serve.problems import Problem

_FIGURES = ("index", "n_tokens", "l0", "mse", "normalized_mse")
"""Columns of numbers; the others are names, which are kept."""


def one(measured: Measured, example: int) -> dict[str, tp.Any]:
    """Figures of an image, and its latents from the highest value down.

    Raises:
        Problem: it was not measured.
    """
    figures = measured.rows("images", example, _FIGURES).to_pylist()
    if not figures:
        raise _unknown(measured, example)
    table = measured.rows("image_acts_by_image", example)
    latent, peak = table["latent"].to_numpy(), float_values(table["max"])
    mean = float_values(table["mean"])
    best = np.lexsort((latent, -peak))
    names = measured.names()
    return {
        "run": measured.key,
        **figures[0],
        **names.of(example),
        "folder": redact(names.folder),
        "grid": list(measured.grid),
        "floor": measured.facts.get("image_floor"),
        "has_codes": measured.has_codes,
        "latents": {
            "latent": latent[best].tolist(),
            "max": peak[best].tolist(),
            "mean": mean[best].tolist(),
        },
    }  # fmt: skip


def tokens(measured: Measured, example: int, latents: tp.Sequence[int] = ()) -> dict[str, tp.Any]:
    """The codes of an image: which latent has which value on which patch.

    Args:
        measured: the SAE.
        example: row of the shards' examples.parquet.
        latents: only these; all by default.

    Raises:
        Problem: it was not measured, or codes were not saved.
    """
    if not measured.has_codes:
        raise Problem(
            404, "The codes of images were not saved: inference ran with --no-save.",
            "Run `saev inference` again without that flag.",
        )  # fmt: skip
    if measured.names().row(example) == NONE:
        raise _unknown(measured, example)
    table = measured.rows("token_acts_by_image", example)
    columns = {
        "patch": table["patch"].to_numpy(),
        "latent": table["latent"].to_numpy(),
        "value": float_values(table["value"]),
    }
    if latents:
        mine = np.isin(columns["latent"], np.asarray(latents))
        columns = {name: column[mine] for name, column in columns.items()}
    return {
        "run": measured.key, "example": example, "grid": list(measured.grid),
        **{name: column.tolist() for name, column in columns.items()},
    }  # fmt: skip


def some(
    measured: Measured, *, class_idx: int | None = None, first: int = 0, n: int = 50
) -> dict[str, tp.Any]:
    """Measured images in order, of one class or all.

    Args:
        measured: the SAE.
        class_idx: of one class only.
        first: how many to leave out.
        n: how many to give.
    """
    names = measured.names()
    rows = (
        np.arange(len(names.example))
        if class_idx is None
        else np.flatnonzero(names.class_idx == class_idx)
    )
    shown = rows[max(0, first) : max(0, first) + min(max(0, n), MAX_ROWS)]
    return {
        "run": measured.key, "n": len(rows),
        "images": [names.of(int(names.example[row])) for row in shown],
    }  # fmt: skip


def _unknown(measured: Measured, example: int) -> Problem:
    return Problem(
        404, f"There is no image {example}, or it was not measured.",
        f"Take a number of api/runs/{measured.key}/images.",
    )  # fmt: skip
