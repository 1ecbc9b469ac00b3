"""The configs of all stages, made from one config file. Does not import torch."""

import typing as tp

from saev import storage
from saev.config.images import ImageData, ImgFolder
from saev.config.inference import InferenceConfig
from saev.config.loaders import DataConfig
from saev.config.run import RunFile, beside
from saev.config.shards import ShardsConfig
from saev.config.sweeps import requested_configs
from saev.config.train import TrainConfig
from saev.config.visuals import VisualsConfig
from saev.errors import ConfigError


class Stages(tp.NamedTuple):
    """The configs of all stages, validated before the first one starts: :func:`resolve_stages`."""

    shards: ShardsConfig
    """The complete config."""
    train: TrainConfig
    """The config without its shards; see :meth:`training`."""
    sweep: dict[str, tp.Any]
    """The table of the sweep; empty if the sweep is a file or there is none."""
    inference: dict[str, tp.Any]
    """Keys of the file's table; see :meth:`measuring`."""
    visuals: dict[str, tp.Any]
    """Keys of the file's table; see :meth:`showing`."""

    def training(self, shards: str) -> TrainConfig:
        """The config of training on a shards folder."""
        keys = self.train.to_dict()
        keys["train_data"]["shards"] = shards
        return TrainConfig.from_dict(keys)

    def measuring(self, run: str, shards: str) -> InferenceConfig:
        """The config of inference with the SAE of a run. By default it uses the layer and tokens of
        training."""
        data = self.measured(TrainConfig.of_run(run), shards).to_dict()
        return InferenceConfig.from_dict({**self.inference, "run": run, "data": data})

    def measured(self, trained: TrainConfig, shards: str) -> DataConfig:
        """The activations that inference reads for the SAE of a config."""
        data = {
            "layer": trained.train_data.layer,
            "tokens": trained.train_data.tokens,
            **self.inference.get("data", {}),
            "shards": shards,
        }
        return DataConfig.from_dict(data)

    def showing(self, run: str, shards: str, measured: str) -> VisualsConfig:
        """The config of the visuals of a run.

        Pictures are drawn from the images of this config, because the user named them. The shards
        may name another location, at which equal images were recorded first, and saev does not open
        every location that a file names.
        """
        keys = {"data": self.shards.data.to_dict(), **self.visuals}
        return VisualsConfig.from_dict(
            {**keys, "run": run, "shards": shards, "inference": measured}
        )


def resolve_stages(file: RunFile, root: str, data: ImageData | None, source: str) -> Stages:
    """Check every table of a config file, and every combination of its sweep.

    Args:
        file: the file.
        root: URL of the folder for everything.
        data: the images; by default those of the file.
        source: URL of the file, or its name in errors. Relative sweeps are looked up beside it.

    Raises:
        ConfigError: a key is wrong.
        StorageError: the sweep's file cannot be read.
    """
    images = data or file.data
    if images is None:
        raise ConfigError(
            f"No images: add a [data] table to {source} or give data:img-folder --data.root URL."
        )
    _refuse(file.shards, {"shards_root", "data", "part"}, f"{source} [shards]")
    _refuse(file.train, {"runs_root"}, f"{source} [train]")
    _refuse(file.train.get("train_data"), {"shards"}, f"{source} [train.train_data]")
    _refuse(file.inference, {"run", "out", "part"}, f"{source} [inference]")
    _refuse(file.inference.get("data"), {"shards"}, f"{source} [inference.data]")
    _refuse(file.visuals, {"run", "shards", "inference", "out"}, f"{source} [visuals]")
    root = storage.normalize(root)
    shards = ShardsConfig.from_dict(
        {**file.shards, "shards_root": storage.join(root, "shards"), "data": images.to_dict()},
        source=f"{source} [shards]",
    )
    keys = {**file.train, "runs_root": storage.join(root, "runs")}
    if keys.get("sweep"):
        if file.sweep:
            raise ConfigError(f"{source} has a table [sweep] and train.sweep; keep one of them.")
        keys["sweep"] = beside(source, keys["sweep"])
    training = TrainConfig.from_dict(keys, source=f"{source} [train]")
    # Validated now, with placeholders, so that a typo is not found only after training.
    requested_configs(training, table=file.sweep)
    InferenceConfig.from_dict({**file.inference, "run": root}, source=f"{source} [inference]")
    VisualsConfig.from_dict(
        {**file.visuals, "run": root, "shards": root}, source=f"{source} [visuals]"
    )
    return Stages(shards, training, file.sweep, file.inference, file.visuals)


def images_of(file: RunFile, dataset: str, version: str = "") -> ImageData | None:
    """The images of a config file, with another root.

    Args:
        file: the config file. Without a [data] table, the dataset is a folder of images.
        dataset: URL of the folder; if empty, the file's images are returned unchanged.
        version: see :class:`saev.config.images.ImgFolder`.

    Raises:
        ConfigError: the file's kind of dataset is not a folder.
    """
    if not dataset:
        return file.data
    if file.data is None:
        return ImgFolder(root=dataset, version=version)
    if "root" not in type(file.data).model_fields:
        raise ConfigError(
            f"The config's [data] is of kind {file.data.kind}, which is no folder, so the dataset "
            f"{dataset} does not fit. Leave the dataset empty, or set data.kind to img-folder or "
            "img-seg-folder."
        )
    return file.data.model_copy(update={"root": dataset, "version": version})


def _refuse(table: tp.Any, keys: set[str], source: str) -> None:
    for key in keys & table.keys() if isinstance(table, dict) else ():
        raise ConfigError(f"{source}: {key} is set by `saev run` itself; remove it.")
