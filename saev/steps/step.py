"""Does a step. The steps that do the work of stages are in :mod:`saev.steps.stages`."""

import contextlib
import logging
import typing as tp

from saev import chain, storage, torchrun
from saev.config import steps as cfgs
from saev.errors import SaevError, StorageError
from saev.launch.runs import Kubeflow, Runs, Target
from saev.progress import Progress
from saev.steps import (
    advice,
    check,
    claims,
    discover,
    fire,
    jobs,
    launching,
    outputs,
    show,
    stages,
    table,
)  # fmt: skip
from saev.steps.jobs import Job
from saev.visuals import overview

logger = logging.getLogger(__name__)


def do(cfg: tp.Any, progress: Progress | None = None) -> list[str]:
    """Do one step.

    Args:
        cfg: a config of `saev.config.steps`.
        progress: shows the progress.

    Returns:
        URLs of the results.

    Raises:
        SaevError: the step failed. Finished work is kept.
    """
    progress = progress or Progress(quiet=True)
    with progress.doing(cfgs.NAMES[type(cfg)]):
        return _do(cfg, progress)


def _do(cfg: tp.Any, progress: Progress) -> list[str]:
    if isinstance(cfg, cfgs.DiscoverStep):
        return _discover(cfg, progress)
    if isinstance(cfg, cfgs.FireStep):
        return _fire(cfg, progress)
    if isinstance(cfg, cfgs.OutcomeStep):
        return _outcome(cfg)
    if isinstance(cfg, cfgs.CheckStep):
        return check.check_root(cfg.root, cfg.dataset)
    job, work = jobs.read(cfg.job), _WORK[type(cfg)]
    with contextlib.ExitStack() as stack:
        ranks = torchrun.place()
        if job.owner and (ranks is None or ranks.rank == 0):  # only rank 0 writes and decides
            place = discover.claims_of(job.root, job.dataset)
            holding = stack.enter_context(claims.held(place, job.owner))
            progress.safe_point, progress.may_publish = holding.check, holding.look
        try:
            made = work(cfg, job, progress)
        except SaevError as err:
            advice.for_config(err, *chain.tables(cfgs.NAMES[type(cfg)]))
            raise
    if isinstance(cfg, cfgs.ReportStep) and job.owner:
        discover.end_again(job.root, job.owner)
    return made


# --- Which datasets ------------------------------------------------------------------------------


def _discover(cfg: cfgs.DiscoverStep, progress: Progress) -> list[str]:
    storage.check_writable(cfg.root)
    claim = cfgs.parse_json(cfg.claim, "--claim")
    with progress.task("list the images", total=None, unit="file") as task:
        if claim:
            dataset = discover.take_over(
                cfg.root, claim, cfg.dataset, cfg.file, cfg.owner, cfg.claim_hours
            )
        else:
            dataset = discover.one(
                cfg.root, cfg.dataset, cfg.file, cfg.owner, cfg.claim_hours, task.advance
            )
    raw = cfgs.parse_json(cfg.config, "--config")
    outputs.write_parameter(cfg.to_job, jobs.make(cfg.root, cfg.owner, raw, dataset))
    return [dataset.url or dataset.name]


def _fire(cfg: cfgs.FireStep, progress: Progress) -> list[str]:
    storage.check_writable(cfg.root)
    target = cfg.target
    runs: Runs = fire.NoRuns()
    if target is not None:
        fields = {name: getattr(target, name) for name in Target._fields}
        runs = Kubeflow(Target(**fields))
    firing = fire.Firing(cfg, runs, target.version_id if target else "")
    with progress.task("list the datasets", total=None, unit="file") as task:
        firing.run(task.advance)
    n = len(firing.started)
    logger.info("%d run%s started.", n, "" if n == 1 else "s")
    outputs.write_parameter(cfg.to_runs, firing.started)
    return [run["dataset"] for run in firing.started]


def _outcome(cfg: cfgs.OutcomeStep) -> list[str]:
    status = cfgs.parse_json(cfg.status, "--status")
    launching.stop(cfg.launched, cfg.owner)  # before the claim is released
    try:
        record = discover.end(cfg.root, cfg.owner, status)
    except StorageError as err:
        if not _has_succeeded(status):  # an earlier step has failed, mostly for the same reason
            err.args = (
                f"The outcome of the run is not recorded, because {storage.normalize(cfg.root)} "
                "cannot be used. Why the run failed is in the log of the step that failed first; "
                "`make logs` repeats it in its last line.",
            )
        raise
    logger.info(
        "Done: %s. Not done: %s.",
        ", ".join(record["done"]) or "nothing",
        ", ".join(record["failed"]) or "nothing",
    )
    return []


def _has_succeeded(status: tp.Any) -> bool:
    """Whether KFP's status of the steps before is a success, which it calls COMPLETE."""
    state = status.get("state") if isinstance(status, dict) else None
    return state in ("COMPLETE", "SUCCEEDED")


# --- The report ----------------------------------------------------------------------------------


def _report(cfg: cfgs.ReportStep, job: Job, progress: Progress) -> list[str]:
    plan = jobs.read_plan(job, "publish")
    runs = [job.run(name) for name in plan.runs]
    found = [s for s in overview.collect(job.root, runs) if s.shards == plan.shards]
    missing = set(runs) - {row.run for section in found for row in section.rows}
    if missing:
        raise StorageError(
            f"{len(missing)} of {len(runs)} SAEs have no results on {plan.shards}, such as "
            f"{min(missing)}. Retry the run: finished work is skipped."
        )
    progress.publish_point()
    url = overview.write(job.root)
    (section,) = found
    outputs.write_page(cfg.to_page, overview.render([section]))
    outputs.write_page(cfg.to_table, table.render(section, url, job.owner))
    outputs.write_metrics(cfg.executor_input, show.of_run(section, job.dataset.name))
    details = {"shards": job.shards(plan), "runs": runs, "page": url}
    if job.owner:
        progress.publish_point()
        discover.mark_processed(job.root, job.dataset, job.owner, details)
    return [url]


_WORK: dict[type, tp.Callable[[tp.Any, Job, Progress], list[str]]] = {
    cfgs.PlanStep: stages.plan,
    cfgs.ExtractStep: stages.slot,
    cfgs.PublishStep: stages.publish,
    cfgs.TrainStep: stages.slot,
    cfgs.InferStep: stages.slot,
    cfgs.SummariseStep: stages.whole,
    cfgs.ReportStep: _report,
    cfgs.LaunchStep: launching.launch,
}
