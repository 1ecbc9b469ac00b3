"""The columns of the tables of an inference folder and of a report. docs/formats.md explains each
with its unit."""

import typing as tp

import pyarrow as pa

LATENTS, EXAMPLES, IMAGES, CLASSES = "latents", "examples", "images", "classes"
EMBEDDINGS = "embeddings"
IMAGE_ACTS_BY_LATENT, IMAGE_ACTS_BY_IMAGE = "image_acts_by_latent", "image_acts_by_image"
TOKEN_ACTS_BY_LATENT, TOKEN_ACTS_BY_IMAGE = "token_acts_by_latent", "token_acts_by_image"
PICTURES, THUMBS = "pictures", "thumbs"

_I32, _I64, _F32, _F64, _TEXT = pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string()
_HELD = "_held_out"

MAX_FLOAT16 = 65504.0


def value_type(max_value: float) -> pa.DataType:
    """The type of stored values of latents: float16, or float32 if the largest does not fit."""
    return pa.float16() if max_value <= MAX_FLOAT16 else _F32


def _schema(*columns: tuple[str, pa.DataType]) -> pa.Schema:
    """A schema whose first column is the key, which is never null."""
    return pa.schema([pa.field(name, kind, nullable=i > 0) for i, (name, kind) in
                      enumerate(columns)])  # fmt: skip


def _both(name: str, kind: pa.DataType) -> list[tuple[str, pa.DataType]]:
    return [(name, kind), (name + _HELD, kind)]


def _best(kind: str) -> list[tuple[str, pa.DataType]]:
    return [
        (f"best_{kind}", _I32),
        (f"best_{kind}_name", _TEXT),
        (f"best_{kind}_support", _I64),
        (f"best_{kind}_ap", _F32),
        (f"best_{kind}_ap_training", _F32),
        (f"best_{kind}_ap_held_out", _F32),
    ]


def latents() -> pa.Schema:
    """One row for each latent."""
    return _schema(
        ("latent", _I32),
        ("name", _TEXT),
        ("stability", _F32),
        *_both("n_tokens", _I64),
        *_both("frequency", _F64),
        *_both("n_images", _I64),
        *_both("image_share", _F64),
        *_both("mean", _F32),
        *_both("max", _F32),
        *_both("quantiles", pa.list_(_F32)),
        *_both("histogram_first", _I32),
        *_both("histogram", pa.list_(_I64)),
        *_both("class_entropy", _F32),
        *_best("class"),
        *_best("mask"),
        *_both("monosemanticity", _F32),
        ("decoder_norm", _F32),
        ("neighbours", pa.list_(_I32)),
        ("neighbour_cosines", pa.list_(_F32)),
        ("coactive", pa.list_(_I32)),
        ("coactive_cosines", pa.list_(_F32)),
        ("x", _F32),
        ("y", _F32),
        ("n_image_acts_dropped", _I64),
    )


def examples(value: pa.DataType) -> pa.Schema:
    """Images of each latent, with the values of their patches."""
    return _schema(
        ("latent", _I32),
        ("kind", _TEXT),
        ("rank", _I32),
        ("example", _I64),
        ("side", _TEXT),
        ("value", _F32),
        ("quantile", _F32),
        ("patches", pa.list_(_I32)),
        ("patch_values", pa.list_(value)),
    )


def images() -> pa.Schema:
    """One row for each image."""
    return _schema(
        ("example", _I64),
        ("index", _I64),
        ("path", _TEXT),
        ("label", _TEXT),
        ("class_idx", _I32),
        ("side", _TEXT),
        ("n_tokens", _I64),
        ("l0", _F32),
        ("mse", _F32),
        ("normalized_mse", _F32),
    )


def embeddings(value: pa.DataType) -> pa.Schema:
    """Vectors of images."""
    return _schema(("example", _I64), ("embedding", pa.list_(value)))


def classes() -> pa.Schema:
    """Pairs of a class and a latent."""
    scores = [
        (name + ending, kind)
        for name, kind in (
            ("ap", _F32), ("rate_inside", _F32), ("rate_outside", _F32), ("support", _I64),
        )
        for ending in ("", "_training", _HELD)
    ]  # fmt: skip
    return _schema(
        ("class_idx", _I32), ("kind", _TEXT), ("value", _I64), ("name", _TEXT), ("latent", _I32),
        *scores,
    )  # fmt: skip


def image_acts(value: pa.DataType, key: tp.Literal["latent", "example"]) -> pa.Schema:
    """Largest and mean values of latents on images."""
    other = "example" if key == "latent" else "latent"
    return _schema((key, _I32), (other, _I32), ("max", value), ("mean", value))


def token_acts(value: pa.DataType, key: tp.Literal["latent", "example"]) -> pa.Schema:
    """Values of latents on tokens."""
    if key == "latent":
        return _schema(("latent", _I32), ("example", _I32), ("patch", _I32), ("value", value))
    return _schema(("example", _I32), ("patch", _I32), ("latent", _I32), ("value", value))


def pictures() -> pa.Schema:
    """The images of a report, each of them once."""
    return _schema(
        ("number", _I32), ("example", _I64), ("width", _I32), ("height", _I32),
        ("picture", pa.binary()),
    )  # fmt: skip


def thumbs() -> pa.Schema:
    """The same images in the size of a list."""
    return _schema(("number", _I32), ("example", _I64), ("thumb", pa.binary()))
