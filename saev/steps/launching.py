"""The step that starts the pods of another step. The exit handler stops those that still run."""

import logging

from saev import chain
from saev.config import steps as cfgs
from saev.errors import ConfigError, SaevError
from saev.launch import follow, trainjobs
from saev.launch.cluster import Cluster, Resource
from saev.launch.jobs import INDEX, JOBS, Slots
from saev.launch.pods import GRACE_SECONDS, SUPERVISOR, PodSettings
from saev.launch.trainjobs import TRAIN_JOBS, Machines
from saev.progress import Progress
from saev.steps import jobs
from saev.steps.jobs import Job

logger = logging.getLogger(__name__)

KINDS: dict[str, Resource] = {one.plural: one for one in (JOBS, TRAIN_JOBS)}
"""The kinds of objects that launching steps make, by their plural names."""


def launch(cfg: cfgs.LaunchStep, job: Job, progress: Progress) -> list[str]:
    """Do all slots of a step in pods of their own.

    Raises:
        LaunchError: a slot failed, or the Kubernetes API refuses.
    """
    if cfg.machines > 1:
        return _on_machines(cfg, job, progress)
    slots = jobs.read_plan(job, chain.planner(cfg.step)).slots[cfg.step]
    if not slots:
        logger.info("There is nothing to %s.", cfg.step)
        return []
    for text in jobs.numbered(slots):
        logger.info("slot %s", text)
    settings, cluster = _settings(cfg), Cluster.of_this_pod()
    command = [*SUPERVISOR, "step", cfg.step, "--job", job.url, "--slot", INDEX]
    work = Slots(
        settings,
        command,
        n_slots=len(slots),
        parallelism=cfg.parallelism,
        job=job.url,
        run_id=job.owner,
        me=cluster.me(),
        queue=cfg.queue,
    )
    follow.run(cluster, work, progress)
    return []


def _on_machines(cfg: cfgs.LaunchStep, job: Job, progress: Progress) -> list[str]:
    """Do one slot on several machines."""
    settings, cluster = _settings(cfg), Cluster.of_this_pod()
    ranks = str(trainjobs.ranks_of(settings))
    command = [*SUPERVISOR, "--ranks", ranks, "step", cfg.step, "--job", job.url]
    machines = Machines(
        settings,
        [*command, "--slot", cfg.slot],
        n_machines=cfg.machines,
        work=[job.url, cfg.slot],
        run_id=job.owner,
        me=cluster.me(),
        queue=cfg.queue,
    )
    trainjobs.run(cluster, machines, progress)
    return []


def _settings(cfg: cfgs.LaunchStep) -> PodSettings:
    return PodSettings.from_dict(cfgs.parse_json(cfg.pods, "--pods"), source="--pods")


def stop(kinds: str, run_id: str) -> None:
    """Delete the objects of a run that have not ended, and wait for the end of their pods.

    A failure of this is only logged, because the run's claims must be released in any case.

    Args:
        kinds: names of :data:`KINDS`, separated by commas.
        run_id: the run.
    """
    names = list(filter(None, kinds.split(",")))
    if not names:
        return
    unknown = sorted(set(names) - KINDS.keys())
    if unknown:
        raise ConfigError(f"--launched names {unknown[0]!r}; there are {', '.join(KINDS)}.")
    try:
        cluster = Cluster.of_this_pod()
        resources = [KINDS[name] for name in names]
        stopped = follow.stop_all(cluster, resources, run_id, GRACE_SECONDS + 30)
    except SaevError as err:
        logger.warning("What this run has started in Kubernetes may go on: %s", err)
        return
    if stopped:
        logger.info("Stopped: %s.", ", ".join(stopped))
