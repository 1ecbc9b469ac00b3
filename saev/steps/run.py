"""Runs the steps. Modules that need torch are imported by the steps that do."""

import contextlib
import logging
import typing as tp

from saev import driver, stage, storage, torchrun
from saev.config import steps as cfgs
from saev.config.shards import ShardsConfig
from saev.errors import ConfigError, SaevError, StorageError
from saev.launch.runs import Kubeflow, Runs, Target
from saev.progress import Progress
from saev.stage import Part
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
    table,
)  # fmt: skip
from saev.steps.jobs import Item, Job, Plan
from saev.visuals import overview

if tp.TYPE_CHECKING:
    from saev.shards import Shards
    from saev.shards.extract import Recording

logger = logging.getLogger(__name__)


def run(cfg: tp.Any, progress: Progress | None = None) -> list[str]:
    """Do one step.

    Args:
        cfg: a config of `saev.config.steps`.
        progress: where bars go.

    Returns:
        URLs of what it made or found.

    Raises:
        SaevError: as the stage's functions do. What was finished is kept.
    """
    progress = progress or Progress(quiet=True)
    with progress.doing(_NAMES[type(cfg)]):
        return _run(cfg, progress)


def _run(cfg: tp.Any, progress: Progress) -> list[str]:
    if isinstance(cfg, cfgs.DiscoverStep):
        return _discover(cfg, progress)
    if isinstance(cfg, cfgs.FireStep):
        return _fire(cfg, progress)
    if isinstance(cfg, cfgs.OutcomeStep):
        return _outcome(cfg)
    if isinstance(cfg, cfgs.CheckStep):
        return check.run(cfg.root, cfg.dataset)
    job, work = jobs.read(cfg.job), _WORK[type(cfg)]
    with contextlib.ExitStack() as stack:
        ranks = torchrun.place()
        if job.owner and (ranks is None or ranks.rank == 0):  # the one that writes and decides
            place = discover.claims_of(job.root, job.dataset)
            holding = stack.enter_context(claims.held(place, job.owner))
            progress.safe_point, progress.may_publish = holding.check, holding.look
        try:
            return work(cfg, job, progress)
        except SaevError as err:
            advice.for_config(err, *_TABLES.get(type(cfg), ()))
            raise


# --- Which datasets ------------------------------------------------------------------------------


def _discover(cfg: cfgs.DiscoverStep, progress: Progress) -> list[str]:
    storage.check_writable(cfg.root)
    claim = cfgs.parse_json(cfg.claim, "--claim")
    with progress.task("list the images", total=None, unit="file") as task:
        if claim:
            dataset = discover.handed(
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
    runs: Runs = fire.Nothing()
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
    launching.stop(cfg.launched, cfg.owner)  # before others may claim the dataset
    try:
        record = discover.end(cfg.root, cfg.owner, status)
    except StorageError as err:
        if not _has_succeeded(status):  # another step has failed before, mostly of the same
            err.args = (
                f"The outcome of the run is not recorded, as {storage.normalize(cfg.root)} cannot "
                "be used. Why the run failed is in the log of the step that failed first; "
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
    """What KFP says of the steps before. It calls a success COMPLETE."""
    state = status.get("state") if isinstance(status, dict) else None
    return state in ("COMPLETE", "SUCCEEDED")


# --- Activations ---------------------------------------------------------------------------------


def _plan(cfg: cfgs.PlanStep, job: Job, progress: Progress) -> list[str]:
    import saev.shards.extract as extract

    recording = _opened(extract.Recording(_on_cpu(job)), progress)
    n = 0
    if not recording.published():
        recording.begin()
        n = min(cfg.n_parts, recording.metadata.n_shards)
    parts = [{"name": f"part {i} of {n}", "part": f"{i}/{n}"} for i in range(1, n + 1)]
    logger.info(
        "%s: %d images in %d shards, %d parts to record.",
        recording.url, recording.metadata.n_examples, recording.metadata.n_shards, n,
    )  # fmt: skip
    slots = jobs.cut(parts, cfg.n_parts)
    jobs.write_plan(job, "plan", Plan(storage.name(recording.url), [], {"extract": slots}))
    outputs.write_parameter(cfg.to_extract, jobs.numbered(slots))
    return [recording.url]


def _opened(recording: "Recording", progress: Progress) -> "Recording":
    """The model is loaded, maybe from a hub, and the images are listed."""
    with progress.doing("load the model, list the images"):
        _ = recording.url
    return recording


def _on_cpu(job: Job) -> ShardsConfig:
    """For pods that have no GPU; shapes and checksums do not depend on the device."""
    return job.stages().shards.model_copy(update={"device": "cpu"})


def _extract(cfg: cfgs.ExtractStep, job: Job, progress: Progress) -> list[str]:
    import saev.shards.extract as extract

    plan = jobs.read_plan(job, "plan")
    items = _items(cfg, plan, "extract")
    recording = _opened(extract.Recording(job.stages().shards), progress)
    _check_same(job.shards(plan), recording.url, job)

    def record(item: Item) -> list[str]:
        driver.do(recording, Part.parse(item["part"]).slice(recording.items()), progress)
        return [recording.url]

    return jobs.each(items, record, progress)


def _publish(cfg: cfgs.PublishStep, job: Job, progress: Progress) -> list[str]:
    import saev.shards.extract as extract
    from saev.shards import Shards

    recording = _opened(extract.Recording(_on_cpu(job)), progress)
    _check_same(job.shards(jobs.read_plan(job, "plan")), recording.url, job)
    if not recording.published():  # what is complete was checked when it was published
        with progress.task("list the images again", total=None, unit="file") as task:
            discover.check_unchanged(job.dataset, task.advance)
    shards = Shards.open(driver.finish(recording, progress).urls[0])
    outputs.write_metrics(cfg.executor_input, show.of_shards(shards, job.dataset.name))
    with progress.doing("plan the SAEs"):
        plan = _plan_saes(job, shards, cfg.n_parts)
    jobs.write_plan(job, "publish", plan)
    for step, place in (
        ("train", cfg.to_train),
        ("infer", cfg.to_infer),
        ("summarise", cfg.to_summarise),
    ):
        outputs.write_parameter(place, jobs.numbered(plan.slots[step]))
    return [shards.url, *map(job.run, plan.runs)]


def _check_same(planned: str, found: str, job: Job) -> None:
    if storage.normalize(planned) != storage.normalize(found):
        raise ConfigError(
            f"The activations of {job.dataset.url or job.dataset.name} would go to {found}, but "
            f"{planned} was planned: the dataset, the weights or the version of saev changed in "
            "between. Submit it again."
        )


# --- SAEs ----------------------------------------------------------------------------------------


def _plan_saes(job: Job, shards: "Shards", n_slots: int) -> Plan:
    """What there is to train, to measure and to draw; all of it is known before training."""
    from saev import inference, train, visuals
    from saev.train.members import Group, unpublished

    stages = job.stages()
    training = stages.training(shards.url)
    groups = [Group.from_item(item) for item in train.plan(training, table=stages.sweep)]
    members = [member for group in groups for member in group.members]
    missing = {member.run_id for member in unpublished(members)}
    if not missing:
        train.finish(training, table=stages.sweep)  # removes what killed workers left

    to_train, costs = [], []
    for i, group in enumerate(groups, start=1):
        n_missing = sum(member.run_id in missing for member in group.members)
        if n_missing:
            name = f"group {i} of {len(groups)}: {n_missing} of {len(group.members)} SAEs"
            runs = [member.run_id for member in group.members]
            to_train.append({"name": name, "group": group.group_id, "runs": runs})
            costs.append(float(n_missing))

    to_measure, to_draw = [], []
    for member in members:
        measured = ""
        if member.run_id not in missing:
            measured = inference.find(stages.measuring(member.url, shards.url))
        if not measured:
            to_measure.append(member)
        if not measured or not visuals.find(stages.showing(member.url, shards.url, measured)):
            to_draw.append({"name": f"SAE {member.run_id}", "run": member.run_id})

    n = jobs.n_pieces(len(to_measure), n_slots, inference.n_pieces(shards))
    passes = [
        {"name": f"SAE {m.run_id}, part {i} of {n}", "run": m.run_id, "part": f"{i}/{n}"}
        for m in to_measure
        for i in range(1, n + 1)
    ]
    logger.info(
        "%d SAEs in %d groups: %d groups to train, %d SAEs to measure, %d to draw.",
        len(members), len(groups), len(to_train), len(to_measure), len(to_draw),
    )  # fmt: skip
    slots = {
        "train": jobs.cut(to_train, n_slots, costs),
        "infer": jobs.cut(passes, n_slots),
        # Fewer pods, since each of them counts in the one object in which Kubernetes keeps a run.
        "summarise": jobs.cut(to_draw, max(1, n_slots // 2)),
    }
    return Plan(storage.name(shards.url), [member.run_id for member in members], slots)


def _train(cfg: cfgs.TrainStep, job: Job, progress: Progress) -> list[str]:
    from saev.train.stage import Training

    stages, plan = job.stages(), jobs.read_plan(job, "publish")
    training = Training(stages.training(job.shards(plan)), table=stages.sweep)

    def work(item: Item) -> list[str]:
        driver.do(training, [stage.Item(item["name"], 0, item)], progress)
        return [job.run(run_id) for run_id in item["runs"]]

    return jobs.each(_items(cfg, plan, "train"), work, progress)


# --- What they learned ---------------------------------------------------------------------------


def _infer(cfg: cfgs.InferStep, job: Job, progress: Progress) -> list[str]:
    from saev.inference.stage import Measuring

    stages, plan = job.stages(), jobs.read_plan(job, "publish")
    opened: dict[str, Measuring] = {}

    def measure(item: Item) -> list[str]:
        if item["run"] not in opened:  # pieces of one SAE follow each other
            while opened:
                opened.popitem()[1].close()
            cfg = stages.measuring(job.run(item["run"]), job.shards(plan))
            opened[item["run"]] = Measuring(cfg)
        measuring = opened[item["run"]]
        driver.do(measuring, Part.parse(item["part"]).slice(measuring.items()), progress)
        return list(measuring.urls)

    return jobs.each(_items(cfg, plan, "infer"), measure, progress)


def _summarise(cfg: cfgs.SummariseStep, job: Job, progress: Progress) -> list[str]:
    from saev import inference, visuals

    stages, plan = job.stages(), jobs.read_plan(job, "publish")
    shown, shards = show.Saes(job.dataset.name), job.shards(plan)

    def summarise(item: Item) -> list[str]:
        run_url = job.run(item["run"])
        measuring = stages.measuring(run_url, shards).model_copy(update={"device": "cpu"})
        measured = inference.finish(measuring, progress)
        showing = stages.showing(run_url, shards, measured)
        index = visuals.run(showing, progress=progress)
        shown.add(item["run"], measured, lambda n: visuals.book(showing, n))
        return [measured, index]

    made = jobs.each(_items(cfg, plan, "summarise"), summarise, progress)
    if cfg.executor_input or cfg.to_page:
        names = overview.names_of([job.run(name) for name in plan.runs])
        outputs.write_metrics(cfg.executor_input, shown.figures(names))
        outputs.write_page(cfg.to_page, shown.page(names))
    return made


def _report(cfg: cfgs.ReportStep, job: Job, progress: Progress) -> list[str]:
    plan = jobs.read_plan(job, "publish")
    runs = [job.run(name) for name in plan.runs]
    found = [s for s in overview.collect(job.root, runs) if s.shards == plan.shards]
    missing = set(runs) - {row.run for section in found for row in section.rows}
    if missing:
        raise StorageError(
            f"{len(missing)} of {len(runs)} SAEs have no results on {plan.shards}, such as "
            f"{min(missing)}. Retry the run: what is done is skipped."
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


def _items(cfg: cfgs.SlotStep, plan: Plan, step: str) -> list[Item]:
    return jobs.items_of(plan, step, cfg.slot)


_NAMES = {type_: name for name, type_ in cfgs.STEPS.items()}
_WORK: dict[type, tp.Callable[[tp.Any, Job, Progress], list[str]]] = {
    cfgs.PlanStep: _plan,
    cfgs.ExtractStep: _extract,
    cfgs.PublishStep: _publish,
    cfgs.TrainStep: _train,
    cfgs.InferStep: _infer,
    cfgs.SummariseStep: _summarise,
    cfgs.ReportStep: _report,
    cfgs.LaunchStep: launching.launch,
}

_TABLES: dict[type, tuple[str, ...]] = {
    cfgs.PlanStep: ("shards",),
    cfgs.ExtractStep: ("shards",),
    cfgs.PublishStep: ("shards", "train", "inference"),
    cfgs.TrainStep: ("train",),
    cfgs.InferStep: ("inference",),
    cfgs.SummariseStep: ("inference", "visuals"),
}
"""The tables of the config that a step goes by."""
