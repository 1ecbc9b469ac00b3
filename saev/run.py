"""`saev run`: the four stages one after another, from one file, skipping what is done."""

import logging
import math
import typing as tp

import saev.shards.extract as extract
from saev import inference, storage, train, visuals
from saev.config import DataConfig, InferenceConfig, ShardsConfig, TrainConfig, VisualsConfig
from saev.config.run import RunConfig, RunFile
from saev.errors import ConfigError
from saev.inference.results import Results
from saev.progress import Progress
from saev.visuals import overview

logger = logging.getLogger(__name__)


class Result(tp.NamedTuple):
    """What became of one SAE."""

    run: str
    """URL of the run folder."""
    inference: str
    """URL of the inference folder."""
    report: str
    """URL of the report's first page."""


class _Stages(tp.NamedTuple):
    """The stages' configs, validated before the first of them starts."""

    shards: ShardsConfig
    train: TrainConfig
    inference: dict[str, tp.Any]
    visuals: dict[str, tp.Any]


def run(cfg: RunConfig, progress: Progress | None = None) -> str:
    """Record, train, measure and show.

    Returns:
        URL of root/index.html, which lists the SAEs and links their reports.

    Raises:
        ConfigError: a key of the file is wrong; nothing has been started then.
    """
    stages = resolve(cfg)
    shards = extract.run(stages.shards, progress=progress)
    results = [
        _measure(stages, run_url, shards, progress) for run_url in _train(stages, shards, progress)
    ]
    return finish(cfg.root, shards, results)


def resolve(cfg: RunConfig) -> _Stages:
    """Read the file and check every table of it."""
    file = RunFile.read(cfg.config)
    source = storage.normalize(cfg.config)
    data = cfg.data or file.data
    if data is None:
        raise ConfigError(
            f"No images: add a [data] table to {source} or say data:img-folder --data.root URL."
        )
    _refuse(file.shards, {"shards_root", "data", "part"}, f"{source} [shards]")
    _refuse(file.train, {"runs_root"}, f"{source} [train]")
    _refuse(file.inference, {"run", "out", "part"}, f"{source} [inference]")
    _refuse(file.visuals, {"run", "shards", "inference", "out"}, f"{source} [visuals]")
    root = storage.normalize(cfg.root)
    shards = ShardsConfig.from_dict(
        {**file.shards, "shards_root": storage.join(root, "shards"), "data": data.to_dict()},
        source=f"{source} [shards]",
    )
    keys = {**file.train, "runs_root": storage.join(root, "runs")}
    if keys.get("sweep"):
        keys["sweep"] = _beside(source, keys["sweep"])
    training = TrainConfig.from_dict(keys, source=f"{source} [train]")
    # Checked now with placeholders, so that a typo does not wait until training is over.
    InferenceConfig.from_dict({**file.inference, "run": root}, source=f"{source} [inference]")
    VisualsConfig.from_dict(
        {**file.visuals, "run": root, "shards": root}, source=f"{source} [visuals]"
    )
    return _Stages(shards, training, file.inference, file.visuals)


def _refuse(table: dict[str, tp.Any], keys: set[str], source: str) -> None:
    for key in keys & table.keys():
        raise ConfigError(f"{source}: {key} is set by `saev run` itself; remove it.")


def _beside(config: str, sweep: str) -> str:
    """A relative sweep is looked for beside the config first."""
    beside = storage.join(storage.parent(config), sweep)
    is_relative = "://" not in sweep and not sweep.startswith("/")
    return beside if is_relative and storage.exists(beside) else sweep


def _train(stages: _Stages, shards: str, progress: Progress | None) -> list[str]:
    keys = stages.train.to_dict()
    keys["train_data"]["shards"] = shards
    if not keys["val_data"]["shards"]:
        keys["val_data"]["layer"] = keys["train_data"]["layer"]
    return list(train.run(TrainConfig.from_dict(keys), progress=progress))


def _measure(stages: _Stages, run_url: str, shards: str, progress: Progress | None) -> Result:
    trained = TrainConfig.from_url(storage.join(run_url, "config.json"))
    data = {"tokens": trained.train_data.tokens, **stages.inference.get("data", {})}
    data.update(shards=shards, layer=trained.train_data.layer)
    keys = {**stages.inference, "run": run_url, "data": DataConfig.from_dict(data).to_dict()}
    measured = inference.run(InferenceConfig.from_dict(keys), progress=progress)
    pictures = {**stages.visuals, "run": run_url, "shards": shards, "inference": measured}
    report = visuals.run(VisualsConfig.from_dict(pictures), progress=progress)
    return Result(run_url, measured, report)


def finish(root: str, shards: str, results: list[Result]) -> str:
    """Write root/index.html, the list of SAEs, and log their main figures."""
    rows = []
    for result in results:
        metrics = Results.open(result.inference).metrics
        trained = TrainConfig.from_url(storage.join(result.run, "config.json"))
        rows.append(overview.Row(result.run, result.report, trained, metrics))
        logger.info(
            "%s: normalized_mse %.4f, l0 %.1f, dead %d of %d",
            storage.name(result.run), metrics["normalized_mse"], metrics["l0"],
            metrics["n_dead"], trained.sae.d_sae or math.nan,
        )  # fmt: skip
    return overview.write(root, shards, rows)
