"""One file, four stages: what `saev run` and the pipeline's steps make of a config. Torch-free."""

import typing as tp

from saev import storage
from saev.config.images import ImageData, ImgFolder
from saev.config.inference import InferenceConfig
from saev.config.loaders import DataConfig
from saev.config.run import RunFile, beside
from saev.config.shards import ShardsConfig
from saev.config.sweeps import resolve as resolve_sweep
from saev.config.train import TrainConfig
from saev.config.visuals import VisualsConfig
from saev.errors import ConfigError


class Stages(tp.NamedTuple):
    """The stages' configs, validated before the first of them starts. Made by :func:`resolve`."""

    shards: ShardsConfig
    """Complete."""
    train: TrainConfig
    """All but the shards; see :meth:`training`."""
    sweep: dict[str, tp.Any]
    """The table of the sweep, empty if it is a file or there is none."""
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
        """The config of inference with the SAE of a run: by default on the layer and the tokens
        that it was trained on."""
        trained = TrainConfig.of_run(run).train_data
        data = {
            "layer": trained.layer,
            "tokens": trained.tokens,
            **self.inference.get("data", {}),
            "shards": shards,
        }
        keys = {**self.inference, "run": run, "data": DataConfig.from_dict(data).to_dict()}
        return InferenceConfig.from_dict(keys)

    def showing(self, run: str, shards: str, measured: str) -> VisualsConfig:
        """The config of the picture book of a run.

        The pictures are drawn from the images that this config names, because the user named them.
        The shards may name another place, where equal images were recorded first, and saev does not
        open every place that a file names.
        """
        keys = {"data": self.shards.data.to_dict(), **self.visuals}
        return VisualsConfig.from_dict(
            {**keys, "run": run, "shards": shards, "inference": measured}
        )


def resolve(file: RunFile, root: str, data: ImageData | None, source: str) -> Stages:
    """Check every table of a config file, and every combination of its sweep.

    Args:
        file: the file.
        root: URL of the folder for everything.
        data: the images; by default the file's.
        source: URL of the file, or what errors call it. Relative sweeps are looked for beside it.

    Raises:
        ConfigError: a key is wrong; nothing has been started then.
        StorageError: the sweep's file cannot be read.
    """
    images = data or file.data
    if images is None:
        raise ConfigError(
            f"No images: add a [data] table to {source} or say data:img-folder --data.root URL."
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
    # Checked now with placeholders, so that a typo does not wait until training is over.
    resolve_sweep(training, table=file.sweep)
    InferenceConfig.from_dict({**file.inference, "run": root}, source=f"{source} [inference]")
    VisualsConfig.from_dict(
        {**file.visuals, "run": root, "shards": root}, source=f"{source} [visuals]"
    )
    return Stages(shards, training, file.sweep, file.inference, file.visuals)


def images_of(file: RunFile, dataset: str, version: str = "") -> ImageData | None:
    """The file's images, moved to another place.

    Args:
        file: the config file; without a [data] table, the dataset is a folder of images.
        dataset: URL of the folder; empty leaves the file's images as they are.
        version: see :class:`saev.config.images.ImgFolder`.

    Raises:
        ConfigError: the file's kind of dataset is no folder.
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
