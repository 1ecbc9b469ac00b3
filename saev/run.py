"""`saev run`: the four stages one after another, from one file, skipping what is done."""

import logging

import saev.shards.extract as extract
from saev import inference, storage, train, visuals
from saev.config.run import RunConfig, RunFile
from saev.config.stages import Stages
from saev.config.stages import resolve as resolve_stages
from saev.progress import Progress
from saev.visuals import overview

logger = logging.getLogger(__name__)


def run(cfg: RunConfig, progress: Progress | None = None) -> str:
    """Record, train, measure and show.

    Returns:
        URL of root/index.html, which lists the SAEs and links their reports.

    Raises:
        ConfigError: a key of the file is wrong; nothing has been started then.
    """
    stages = resolve(cfg)
    shards = extract.run(stages.shards, progress=progress)
    runs = train.run(stages.training(shards), progress=progress, table=stages.sweep)
    for run_url in runs:
        measured = inference.run(stages.measuring(run_url, shards), progress=progress)
        visuals.run(stages.showing(run_url, shards, measured), progress=progress)
    sections = overview.collect(cfg.root)
    # A run may have been measured on other shards, too.
    for section in (s for s in sections if s.shards == storage.name(shards)):
        for row in (row for row in section.rows if row.run in runs):
            logger.info(
                "%s: normalized_mse %.4f, l0 %.1f, dead %d of %d",
                storage.name(row.run), row.nmse, row.metrics["l0"],
                row.metrics["n_dead"], row.metrics["d_sae"],
            )  # fmt: skip
    return overview.write(cfg.root, sections)


def resolve(cfg: RunConfig) -> Stages:
    """Read the file and check every table of it."""
    source = storage.normalize(cfg.config)
    return resolve_stages(RunFile.read(cfg.config), cfg.root, cfg.data, source)
