"""The configs of the loaders."""

import typing as tp

import pydantic

from saev.config.base import Config, Tokens

Label = tp.Annotated[int, pydantic.Field(ge=0, le=255)]
NO_LABEL = -1
"""Label of a token that has none: the class token, or any token of an unlabelled dataset."""


class DataConfig(Config):
    """A selection of activations of a shards folder."""

    shards: str = ""
    """URL of a shards folder (one that holds metadata.json and shards.json)."""
    layer: int | tp.Literal["all"] | None = None
    """Number of a recorded block, -1 for the last recorded one, or `all`; may be left out if only
    one layer was recorded."""
    tokens: Tokens = "content"
    """Which tokens of every example."""
    ignore_labels: tuple[Label, ...] = ()
    """Content tokens with these labels are left out (needs labels.bin). The class token has no
    label, so with tokens=all it stays and with tokens=special nothing is left out."""
    split: tp.Literal["all", "train", "val"] = "all"
    """Side of the split of examples by `val_fraction`."""
    val_fraction: float = pydantic.Field(default=0.0, ge=0.0, lt=1.0)
    """Share of examples on the validation side, decided by a hash of the example index."""


class LoaderConfig(DataConfig):
    """A selection of activations, and how the shuffled loader reads it."""

    removed: tp.ClassVar = {"block_kb": ""}

    buffer_mb: float = pydantic.Field(default=2048, gt=0)
    """Memory for the windows in which rows are shuffled (two windows, or one if all data fits), in
    MiB. More memory gives a better shuffle."""
    n_threads: int = pydantic.Field(default=0, ge=0)
    """Reader threads. 0 chooses: for a disk the number of cores minus one, but 2 to 4; for an
    object store 16, each with its own connection. The order of rows does not depend on it."""
    verify: bool = True
    """Check every example that is read against its recorded checksum."""

    def identity(self) -> dict[str, tp.Any]:
        """With the removed key block_kb, because the ids of existing runs depend on it."""
        return {**super().identity(), "block_kb": 0}


class ValDataConfig(Config):
    """The activations on which an SAE is evaluated. A key that is None has the value of training.

    In the stored config of a run, each key has a value. They are read as those of training are: see
    :meth:`saev.config.train.TrainConfig.val_loader`.
    """

    removed: tp.ClassVar = dict.fromkeys(("buffer_mb", "block_kb", "n_threads", "verify"), "")

    shards: str = ""
    """URL of a shards folder; by default a held-out share of the training activations."""
    layer: int | tp.Literal["all"] | None = None
    """Block number as recorded; by default that of training."""
    tokens: Tokens | None = None
    """Which tokens of every example; by default those of training."""
    ignore_labels: tuple[Label, ...] | None = None
    """Content tokens with these labels are left out; by default those that training leaves out."""
    split: tp.Literal["all", "train", "val"] | None = None
    """Side of the split of examples by `val_fraction`; by default the validation side, or all
    examples if the folder is not that of training."""
    val_fraction: float | None = pydantic.Field(default=None, ge=0.0, lt=1.0)
    """Share of examples on the validation side; by default that of training."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take_loader_config(cls, raw: tp.Any) -> tp.Any:
        """Take from a LoaderConfig only the keys that were set when it was made."""
        return raw.model_dump(exclude_unset=True) if isinstance(raw, LoaderConfig) else raw

    def given(self) -> dict[str, tp.Any]:
        """The keys that are not None, with their values."""
        return {key: value for key, value in self if value is not None}
