"""`saev run`: the four stages one after another, from one file, skipping what is done."""

import logging
import time

from saev import after, chain, driver, storage
from saev.config.base import Config
from saev.config.images import ImageData, ImgFolder, ImgSegFolder
from saev.config.named import FIRST_LOOK, named_config
from saev.config.run import RunConfig, RunFile
from saev.config.stages import Stages, resolve_stages
from saev.config.train import TOKENS_PER_LATENT, TrainConfig, default_n_train
from saev.errors import ConfigError
from saev.progress import Progress
from saev.shards import Shards
from saev.stage import Job
from saev.visuals import overview

logger = logging.getLogger(__name__)

_MODEL = "DINOv2 ViT-S/14 (Apache License 2.0)"
"""The model of the config first-look."""


def run(cfg: RunConfig, progress: Progress | None = None) -> str:
    """Record, train, measure and show.

    Returns:
        URL of root/index.html, which lists the SAEs and links their reports.

    Raises:
        ConfigError: a key of the file is wrong; nothing has been started then.
    """
    stages, progress = resolve(cfg), progress or Progress(quiet=True)
    is_first_look = cfg.config == named_config(FIRST_LOOK)
    if is_first_look:
        model = f"model {cfg.ckpt}" if cfg.ckpt else f"{_MODEL}, from the model hub"
        logger.info("Config %s: %s.", FIRST_LOOK, model)
    found: dict[str, str] = {}
    runs: tuple[str, ...] = ()
    for stage in chain.OF_ALL:
        runs = _do(stage.of(stages, found), stage.make_config(stages, found), progress)
        found[stage.name] = runs[0]
        if is_first_look and stage is chain.FIRST:
            stages = stages._replace(train=sized(stages.train, runs[0]))
    of_runs = [{**found, chain.RUNS: run_url} for run_url in runs]
    for stage in chain.OF_RUN:
        config = stage.make_config(stages, of_runs[0])
        urls = _do(stage.of_all(stages, of_runs), config, progress)
        for of_run, url in zip(of_runs, urls, strict=True):
            of_run[stage.name] = url
    return overview.write(cfg.root)


def _do(job: Job, cfg: Config, progress: Progress) -> tuple[str, ...]:
    """Run a job and print its figures. Returns the URLs of its results.

    Args:
        job: the job.
        cfg: its config, or that of one of its runs.
        progress: where figures are printed.
    """
    started = time.monotonic()
    urls = driver.run_job(job, progress=progress).urls
    if not progress.quiet:
        progress.say(after.of(cfg, urls).figures(time.monotonic() - started))
    return urls


def resolve(cfg: RunConfig) -> Stages:
    """Read the file and check every table of it."""
    source = storage.normalize(cfg.config)
    data = cfg.data
    if cfg.pictures:
        if data is not None:
            raise ConfigError(
                f"The images are named twice: {cfg.pictures}, and with data:{data.kind}. Keep one."
            )
        data = recognised(cfg.pictures)
    file = RunFile.read(cfg.config)
    file = file.model_copy(update={"shards": {**file.shards, **cfg.over_shards}})
    if data is None and file.data is None:
        raise ConfigError(
            "No images: name a folder of pictures (`saev run FOLDER`), or a config file with a "
            "table [data] (--config FILE)."
        )
    return resolve_stages(file, cfg.root, data, source)


def recognised(url: str) -> ImageData:
    """What a folder is: images with masks (ADE20K's layout), or images.

    Args:
        url: the folder. Images with masks are in ``images/SPLIT``, and ``annotations`` is beside.
    """
    images = storage.join(url, "images")
    if not (storage.is_dir(images) and storage.is_dir(storage.join(url, "annotations"))):
        return ImgFolder(root=url)
    splits = sorted(storage.name(entry.url) for entry in storage.list_dir(images))
    usual = ImgSegFolder.model_fields["split"].default
    split = usual if usual in splits or not splits else splits[0]
    logger.info("%s holds images and masks; the split %s is taken.", url, split)
    return ImgSegFolder(root=url, split=split)


def sized(training: TrainConfig, shards: str) -> TrainConfig:
    """The training of the config first-look, adapted to the activations at a URL."""
    with Shards.open(shards) as opened:
        n_tokens = opened.n_examples * opened.metadata.content_tokens_per_example
        d_model = opened.d_model
    return suited(training, n_tokens, d_model)


def suited(training: TrainConfig, n_tokens: int, d_model: int) -> TrainConfig:
    """A training with at most the default length, and with half the width if there are few tokens.

    Args:
        training: the training of the config; its ``n_train`` is the most.
        n_tokens: content tokens of one layer.
        d_model: width of the activations.
    """
    n_train = default_n_train(n_tokens)
    if training.n_train is not None:
        n_train = min(training.n_train, n_train)
    factor = training.sae.exp_factor
    if n_tokens < TOKENS_PER_LATENT * factor * d_model:
        factor = max(1, factor // 2)
    sae = training.sae.model_copy(update={"exp_factor": factor})
    return training.model_copy(update={"n_train": n_train, "sae": sae})
