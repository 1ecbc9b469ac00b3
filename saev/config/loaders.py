"""Which activations, in which order: the config of the loaders."""

import typing as tp

import pydantic

from saev.config.base import Config, Tokens

Label = tp.Annotated[int, pydantic.Field(ge=0, le=255)]


class DataConfig(Config):
    """Which activations of a shards folder."""

    shards: str = ""
    """URL of a shards folder (one that holds metadata.json and shards.json)."""
    layer: int | tp.Literal["all"] | None = None
    """Block number as recorded, or `all`; may be left out if only one layer was recorded."""
    tokens: Tokens = "content"
    """Which tokens of every example."""
    ignore_labels: tuple[Label, ...] = ()
    """Content tokens with these labels are left out (needs labels.bin). The class token has no
    label, so with tokens=all it stays and with tokens=special nothing is left out."""
    split: tp.Literal["all", "train", "val"] = "all"
    """Which side of the example split of `val_fraction`."""
    val_fraction: float = pydantic.Field(default=0.0, ge=0.0, lt=1.0)
    """Share of examples on the validation side, decided by a hash of the example index."""


class LoaderConfig(DataConfig):
    """How the shuffled loader reads them."""

    buffer_mb: float = pydantic.Field(default=2048, gt=0)
    """Memory for the windows that rows are shuffled in (two of them, or one if all data fits), in
    MiB. More memory is a better shuffle."""
    block_kb: int = pydantic.Field(default=0, ge=0)
    """Bytes of one contiguous read, in KiB; 0 chooses for a good shuffle from few large reads."""
    n_threads: int = pydantic.Field(default=0, ge=0)
    """Reader threads; 0: from a disk one less than there are cores, but 2 to 4; from an object
    store 16, each of which has a connection. The order of rows does not depend on it."""
    verify: bool = True
    """Check every example that is read against its recorded checksum."""
