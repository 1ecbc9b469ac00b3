"""The figures of latents that lists show, sort and filter by: columns of `latents.parquet`."""

import typing as tp

import numpy as np
import pyarrow as pa

HELD_OUT = "_held_out"
Unit = tp.Literal["share", "count", "value", "ratio"]


class Column(tp.NamedTuple):
    """A figure. Where there are held-out images, it is of these, and `all` is of all images."""

    key: str
    """In addresses and in the page's data."""
    source: str
    """Column of the table, without its ending."""
    name: str
    """In a column's head."""
    hint: str
    """What it is, in one sentence."""
    unit: Unit
    """How it is written. A ratio is from -1 to 1, or a small number, of which two digits are
    shown."""
    is_log: bool = False
    """Whether a logarithmic axis shows it best."""
    quantile: float | None = None
    """Which of a list of quantiles."""
    has_sides: bool = True
    """Whether the table has it of held-out images, too."""


COLUMNS = (
    Column(
        "frequency", "frequency", "Frequency", "Share of tokens on which the latent fires",
        "share", is_log=True,
    ),
    Column(
        "images", "image_share", "Images", "Share of images on which the latent fires", "share",
        is_log=True,
    ),
    Column(
        "mean", "mean", "Mean", "Mean value on the tokens on which the latent fires", "value",
        is_log=True,
    ),
    Column(
        "median", "quantiles", "Median", "Median of the values on the tokens on which the latent "
        "fires; within an eighth of the right value", "value", is_log=True, quantile=0.5,
    ),
    Column("max", "max", "Max", "Largest value", "value", is_log=True),
    Column(
        "class_ap", "best_class_ap", "Class AP", "Average precision with which the latent's values "
        "find the images of its best class", "ratio",
    ),
    Column(
        "mask_ap", "best_mask_ap", "Patch AP", "Average precision with which the latent's values "
        "find the patches of its best label", "ratio",
    ),
    Column(
        "mono", "monosemanticity", "Monosem.", "Monosemanticity: similarity of the images on which "
        "the latent fires, weighted by its values", "ratio",
    ),
    Column(
        "purity", "purity", "Purity", "Share of the most common class among the latent's eight "
        "strongest images", "ratio", has_sides=False,
    ),
    Column(
        "entropy", "class_entropy", "Entropy", "Entropy of the classes of the images on which the "
        "latent fires, weighted by its values, in nats; 0: a single class", "ratio",
    ),
    Column(
        "support", "best_class_support", "Support", "Images of the latent's best class", "count",
        has_sides=False,
    ),
    Column(
        "norm", "decoder_norm", "Norm", "Length of the latent's decoder row", "value",
        has_sides=False,
    ),
    Column(
        "stability", "stability", "Stability", "How well the latent is found again in other SAEs",
        "ratio", has_sides=False,
    ),
)  # fmt: skip


def read(
    table: pa.Table, column: Column, quantiles: tp.Sequence[float], *, held_out: bool
) -> np.ndarray:
    """A column as numbers, NaN where it is not defined, float64 [d_sae].

    Args:
        table: `latents.parquet`.
        column: which.
        quantiles: shares of the table's quantiles.
        held_out: of the held-out images.
    """
    found = table[column.source + (HELD_OUT if held_out else "")]
    if column.quantile is None:
        return floats(found)
    rows = lists(found)
    return rows[:, list(quantiles).index(column.quantile)]


def floats(found: pa.ChunkedArray) -> np.ndarray:
    """Numbers, NaN for null, float64."""
    return found.cast(pa.float64()).to_numpy(zero_copy_only=False)


def lists(found: pa.ChunkedArray, missing: float = np.nan) -> np.ndarray:
    """Lists of one length as rows, float64 [n, length]; ``missing`` where there is none, and in
    shorter ones behind their end."""
    array = found.combine_chunks()
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = array.flatten().to_numpy(zero_copy_only=False)
    rows = np.full((len(array), int(lengths.max(initial=0))), missing, dtype=np.float64)
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = values
    return rows
