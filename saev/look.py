"""The command `saev look`: which latents fire on images, and which of them the images share."""

import io
import json
import logging
import sys
import typing as tp

import numpy as np
import rich.box
import rich.table

from saev import storage
from saev.config.look import LookConfig
from saev.console import for_tables
from saev.errors import SaevError
from saev.inference.image import ImageCodes, ImageReader, own_limits
from saev.inference.results import Results
from saev.secrets import redact

logger = logging.getLogger(__name__)


class Known(tp.NamedTuple):
    """What `saev inference` measured of each latent."""

    largest: np.ndarray
    """Largest value on the dataset, float32 [d_sae]."""
    frequency: np.ndarray
    """Share of tokens on which it fires, float64 [d_sae]."""
    classes: list[str]
    """Name of the class that it finds best; "" if there is none."""


class Row(tp.NamedTuple):
    """A latent that fires on at least one of the images."""

    latent: int
    values: list[float]
    """Largest value on each image; 0 where it does not fire."""
    n_patches: list[int]
    """Patches of each image on which it fires."""
    strength: float
    """Of the images on which it fires, the smallest value, as a share of its largest value on the
    dataset; the value itself if that is not known."""


def show(cfg: LookConfig) -> None:
    """Print the latents of images to standard output.

    Raises:
        ImageError: a file is no image that can be used.
        ModelError: the model's weights are missing or are others.
        ConfigError, StorageError, CheckpointError: the SAE or its model are not known.
    """
    reader = ImageReader.open(
        cfg.run, shards=cfg.shards, ckpt=cfg.ckpt, layer=cfg.layer, device=cfg.device,
        allow_other_model=cfg.allow_other_model, tell=_say,
        limits=own_limits(cfg.max_pixels, "--max-pixels"),
    )  # fmt: skip
    codes = [reader.read(image) for image in cfg.images]
    known = find_known(codes[0])
    rows = compare(codes, known)
    text = _to_json(codes, rows, known) if cfg.as_json else render(codes, rows, known, cfg.n)
    sys.stdout.write(text)


def _say(text: str) -> None:
    if text != "run the model":
        logger.info("%s …", text[0].upper() + text[1:])


def find_known(codes: ImageCodes) -> Known | None:
    """What is known of the SAE's latents; None if it was not measured on shards of this model."""
    try:
        results = Results.find(codes.run, codes.source.shards or "")
        table = results.latents(["max", "frequency", "best_class_name"]).to_pydict()
    except SaevError as err:
        logger.info("Classes and largest values are not shown: %s", err)
        return None
    return Known(
        np.array([value or 0.0 for value in table["max"]], dtype=np.float32),
        np.array(table["frequency"]),
        [name or "" for name in table["best_class_name"]],
    )


def compare(codes: tp.Sequence[ImageCodes], known: Known | None) -> list[Row]:
    """All latents that fire on an image, the strongest first.

    Args:
        codes: of each image, by one SAE.
        known: what was measured of it.
    """
    values = np.zeros((codes[0].d_sae, len(codes)))
    n_patches = np.zeros((codes[0].d_sae, len(codes)), dtype=np.int64)
    for i, one in enumerate(codes):
        peaks = one.peaks()
        values[peaks.latents, i] = peaks.values
        n_patches[peaks.latents, i] = peaks.n_patches
    fires = n_patches > 0
    strength = np.where(fires, values, np.inf).min(axis=1)
    if known is not None:
        strength /= np.where(known.largest > 0, known.largest, 1.0)
    found = np.flatnonzero(fires.any(axis=1))
    order = found[np.argsort(-strength[found], kind="stable")]
    return [
        Row(int(j), values[j].tolist(), n_patches[j].tolist(), float(strength[j])) for j in order
    ]


def groups(rows: tp.Sequence[Row], names: tp.Sequence[str]) -> dict[str, list[Row]]:
    """Rows by where they fire: on all images, and on each image alone."""
    if len(names) == 1:
        return {names[0]: list(rows)}
    found = {"on all": [row for row in rows if all(row.n_patches)]}
    for i, name in enumerate(names):
        found[f"only on {name}"] = [
            row for row in rows if row.n_patches[i] and not any(_without(row.n_patches, i))
        ]
    return found


def _without(counts: tp.Sequence[int], i: int) -> list[int]:
    return [n for j, n in enumerate(counts) if j != i]


def render(
    codes: tp.Sequence[ImageCodes], rows: tp.Sequence[Row], known: Known | None, n: int
) -> str:
    """A table for one image, or tables of what several images share, and of what only one has."""
    out = io.StringIO()
    console = for_tables(out)
    names = [storage.name(one.name) for one in codes]
    for title, mine in groups(rows, names).items():
        left = f", the strongest {n}" if len(mine) > n else ""
        table = rich.table.Table(
            title=f"{title}: {len(mine):,} latents{left}",
            title_justify="left",
            box=rich.box.SIMPLE_HEAD,
        )
        table.add_column("latent", justify="right")
        for name in names:
            table.add_column("value" if len(names) == 1 else name, justify="right")
            table.add_column("patches", justify="right")
        if known is not None:
            table.add_column("of its largest", justify="right")
            table.add_column("fires on", justify="right")
            table.add_column("best class")
        for row in mine[:n]:
            table.add_row(*_cells(row, known))
        console.print(table)
    rows_, columns = codes[0].shape
    console.print(
        f"{codes[0].source.model}, layer {codes[0].source.layer}, {rows_} x {columns} patches."
    )
    return out.getvalue()


def _cells(row: Row, known: Known | None) -> list[str]:
    cells = [str(row.latent)]
    for value, n in zip(row.values, row.n_patches, strict=True):
        cells += [f"{value:.3g}", str(n)] if n else ["-", "-"]
    if known is not None:
        cells.append(f"{row.strength:.0%}")
        cells.append(f"{known.frequency[row.latent]:.2%}")
        cells.append(known.classes[row.latent])
    return cells


def _to_json(codes: tp.Sequence[ImageCodes], rows: tp.Sequence[Row], known: Known | None) -> str:
    images = [
        {"name": one.name, "width": one.size[0], "height": one.size[1], "shape": one.shape}
        for one in codes
    ]
    latents = [
        {
            **row._asdict(),
            "best_class": known.classes[row.latent] or None if known else None,
            "frequency": float(known.frequency[row.latent]) if known else None,
        }
        for row in rows
    ]
    record = {"run": codes[0].run, "images": images, "latents": latents}
    return redact(json.dumps(record, indent=1, ensure_ascii=False)) + "\n"
