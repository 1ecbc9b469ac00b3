"""Which activations, in which order: the config of the loaders."""

import typing as tp

import pydantic

from saev.config.base import Config, Tokens

Label = tp.Annotated[int, pydantic.Field(ge=0, le=255)]
NO_LABEL = -1
"""Label of a token that has none: the class token, or any token of an unlabelled dataset."""


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

    removed: tp.ClassVar = {"block_kb": ""}

    buffer_mb: float = pydantic.Field(default=2048, gt=0)
    """Memory for the windows that rows are shuffled in (two of them, or one if all data fits), in
    MiB. More memory is a better shuffle."""
    n_threads: int = pydantic.Field(default=0, ge=0)
    """Reader threads; 0: from a disk one less than there are cores, but 2 to 4; from an object
    store 16, each of which has a connection. The order of rows does not depend on it."""
    verify: bool = True
    """Check every example that is read against its recorded checksum."""

    def identity(self) -> dict[str, tp.Any]:
        """With the removed key block_kb, because the ids of existing runs depend on it."""
        return {**super().identity(), "block_kb": 0}


class ValDataConfig(Config):
    """Which activations an SAE is evaluated on. A key that is None has the value of training.

    In the stored config of a run, each key has a value. They are read as those of training are: see
    :meth:`saev.config.train.TrainConfig.val_loader`.
    """

    removed: tp.ClassVar = dict.fromkeys(("buffer_mb", "block_kb", "n_threads", "verify"), "")

    shards: str = ""
    """URL of a shards folder; by default the training activations, of which a share is kept."""
    layer: int | tp.Literal["all"] | None = None
    """Block number as recorded; by default that of training."""
    tokens: Tokens | None = None
    """Which tokens of every example; by default those of training."""
    ignore_labels: tuple[Label, ...] | None = None
    """Content tokens with these labels are left out; by default those that training leaves out."""
    split: tp.Literal["all", "train", "val"] | None = None
    """Which side of the example split of `val_fraction`; by default the validation side, or all
    examples if the folder is not that of training."""
    val_fraction: float | None = pydantic.Field(default=None, ge=0.0, lt=1.0)
    """Share of examples on the validation side; by default that of training."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take_loader_config(cls, raw: tp.Any) -> tp.Any:
        """Take from a LoaderConfig only the keys that were set when it was made."""
        return raw.model_dump(exclude_unset=True) if isinstance(raw, LoaderConfig) else raw

    def given(self) -> dict[str, tp.Any]:
        """The keys that have a value of their own, with their values."""
        return {key: value for key, value in self if value is not None}
