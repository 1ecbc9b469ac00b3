"""`saev run`: the four stages one after another, from one file, skipping what is done."""

import logging

from saev import chain, driver, storage
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
    found: dict[str, str] = {}
    runs: tuple[str, ...] = ()
    for stage in chain.OF_ALL:
        runs = driver.run(stage.of(stages, found), progress=progress).urls
        found[stage.name] = runs[0]
    shards = found[chain.FIRST.name]
    for run_url in runs:
        found[chain.RUNS] = run_url
        for stage in chain.OF_RUN:
            found[stage.name] = driver.run(stage.of(stages, found), progress=progress).urls[0]
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
