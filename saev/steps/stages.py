"""The steps that do the work of stages. They name no stage; `saev.chain` gives the stages."""

import contextlib
import logging
import typing as tp

from saev import chain, driver, storage
from saev.chain import Stage
from saev.config import steps as cfgs
from saev.config.stages import Stages
from saev.errors import ConfigError, SaevError
from saev.progress import Progress
from saev.stage import Item, Part, Result, Share
from saev.stage import Job as StageJob
from saev.steps import discover, jobs, outputs, show
from saev.steps.jobs import Job, Plan
from saev.visuals import overview

logger = logging.getLogger(__name__)

_CPU = "cpu"
"""The device of pods without a GPU. Shapes and checksums do not depend on the device."""


def plan(cfg: cfgs.PlanStep, job: Job, progress: Progress) -> list[str]:
    """Name the result of the first stage, and divide its items into slots."""
    with contextlib.closing(chain.FIRST.of(job.stages(), {}, _CPU)) as first:
        key, items, n = _key(first, progress), first.items(), 0
        if not first.published():
            first.begin(items)
            n = min(cfg.n_parts, len(items))
        (url,) = first.urls
    parts = [{"name": f"part {i} of {n}", "part": f"{i}/{n}"} for i in range(1, n + 1)]
    logger.info(
        "%s: %d %s in %d items, %d parts to do.",
        url, sum(item.cost for item in items), first.unit, len(items), n,
    )  # fmt: skip
    slots = {chain.FIRST.slots: jobs.cut(parts, cfg.n_parts)}
    keys = {chain.FIRST.name: key}
    jobs.write_plan(job, "plan", Plan(storage.name(url), [], slots, keys))
    _write_slots(cfg, slots)
    return [url]


def slot(cfg: cfgs.SlotStep, job: Job, progress: Progress) -> list[str]:
    """Do the items of one slot. Consecutive items of the same job open it once."""
    stage = chain.of_slots(cfgs.NAMES[type(cfg)])
    plan = jobs.read_plan(job, chain.planner(stage.slots))
    assigned = jobs.items_of(plan, stage.slots, cfg.slot)
    with contextlib.ExitStack() as stack:
        opened: dict[tuple[str, ...], StageJob] = {}

        def work(one: jobs.Item) -> list[str]:
            runs = tuple(one.get("runs", ()))
            if runs not in opened:
                stack.close()  # close the job before, because this one needs its memory
                opened.clear()
                one_job = stack.enter_context(contextlib.closing(_open(stage, job, plan, runs)))
                _check(one_job, plan, job, progress)
                opened[runs] = one_job  # after the check, so that it is repeated for other items
            now = opened[runs]
            driver.do_items(now, _items(now, one), progress)
            driver.end_part(now, progress)
            return list(now.urls) if runs or len(now.urls) == 1 else []

        return list(dict.fromkeys(jobs.each(assigned, work, progress)))


def publish(cfg: cfgs.PublishStep, job: Job, progress: Progress) -> list[str]:
    """Publish the result of the first stage, and plan all later stages."""
    stages = job.stages()
    with contextlib.closing(chain.FIRST.of(stages, {}, _CPU)) as first:
        _check(first, jobs.read_plan(job, "plan"), job, progress)
        if not first.published():  # a complete result was checked when it was published
            with progress.task("list the images again", total=None, unit="file") as task:
                discover.check_unchanged(job.dataset, task.advance)
        result = driver.finish(first, progress)
    outputs.write_metrics(cfg.executor_input, {"dataset": job.dataset.name, **result.figures})
    with progress.doing("plan the SAEs"):
        plan = _plan_all(stages, result.urls[0], cfg.n_parts)
    jobs.write_plan(job, "publish", plan)
    _write_slots(cfg, plan.slots)
    return [*result.urls, *map(job.run, plan.runs)]


def whole(cfg: cfgs.SummariseStep, job: Job, progress: Progress) -> list[str]:
    """Finish the earlier stages for the SAEs of one slot, then run the next stage as a whole, for
    all of them together."""
    stage = chain.of_slots(cfgs.NAMES[type(cfg)])
    stages, plan = job.stages(), jobs.read_plan(job, "publish")
    shown = show.Saes(job.dataset.name)
    begun: dict[str, tuple[dict[str, str], list[Result]]] = {}

    def begin(run: str) -> list[str]:
        found, results = _found(job, plan, run), []
        for earlier in chain.before(stage):
            with contextlib.closing(earlier.of(stages, found, _CPU)) as one:
                results.append(driver.finish(one, progress))
            found[earlier.name] = results[-1].urls[0]
        begun[run] = (found, results)
        return [url for result in results for url in result.urls]

    def end() -> list[str]:
        with contextlib.closing(
            stage.of_all(stages, [found for found, _ in begun.values()], _CPU)
        ) as opened:
            driver.do_items(opened, opened.items(), progress)
            driver.finish(opened, progress)
            ends = opened.results()
        for (run, (_, results)), last in zip(begun.items(), ends, strict=True):
            shown.add(overview.row(job.run(run), plan.shards), [*results, last])
        return [url for result in ends for url in result.urls]

    def work(one: jobs.Item) -> list[str]:
        if "run" in one:
            return begin(one["run"])
        return end() if begun else []

    assigned = jobs.items_of(plan, stage.slots, cfg.slot)
    # An SAE that fails for good does not keep the others from being shown.
    made = jobs.each([*assigned, {"name": stage.name}], work, progress)
    if cfg.executor_input or cfg.to_page:
        names = overview.names_of([job.run(name) for name in plan.runs])
        outputs.write_metrics(cfg.executor_input, shown.figures(names))
        outputs.write_page(cfg.to_page, shown.page(names))
    return made


# --- Plans ---------------------------------------------------------------------------------------


def _plan_all(stages: Stages, first: str, n_slots: int) -> Plan:
    """Plan all stages after the first one, before any of them is done."""
    found = {chain.FIRST.name: first}
    plan = Plan(storage.name(first), [], {}, {})
    there: set[str] = set()
    for stage in chain.OF_ALL[1:]:
        with contextlib.closing(stage.of(stages, found)) as one:
            items = one.items()
            todo = [item for item in items if not one.done(item)]
            if not todo:
                driver.finish(one)  # removes the remains of killed workers
            runs, there = one.configs, set(one.there())
            plan.keys[stage.name] = one.key
        assigned = [{"name": item.name, "item": item.spec} for item in todo]
        plan.slots[stage.slots] = jobs.cut(assigned, n_slots, [item.cost for item in todo])
        logger.info("%s: %d of %d items to do.", stage.name, len(todo), len(items))
    plan.runs.extend(map(storage.name, runs))
    left = _left(stages, found, runs, there)
    for stage in chain.OF_RUN:
        todo_runs = {storage.name(url): runs[url] for url in left[stage.name]}
        if stage.whole:
            saes = [{"name": f"SAE {name}", "run": name} for name in todo_runs]
            # Few pods: each pod makes the object larger in which Kubernetes keeps the run.
            plan.slots[stage.slots] = jobs.cut(saes, max(1, n_slots // 2))
        else:
            shares = stage.kind.shares(stages, found, [*todo_runs.values()], n_slots)
            plan.slots[stage.slots] = _cut(shares, [*todo_runs], n_slots)
        logger.info("%s: %d of %d SAEs to do.", stage.name, len(todo_runs), len(runs))
    return plan


def _left(
    stages: Stages, found: chain.Found, runs: tp.Iterable[str], there: tp.Collection[str]
) -> dict[str, list[str]]:
    """The runs that lack a stage's result, by the stage's name."""
    left: dict[str, list[str]] = {stage.name: [] for stage in chain.OF_RUN}
    for run in runs:
        here, is_there = {**found, chain.RUNS: run}, run in there
        for stage in chain.OF_RUN:
            if is_there:
                here[stage.name] = _published(stage, stages, here)
                is_there = bool(here[stage.name])
            if not is_there:  # then the later stages are not done either
                left[stage.name].append(run)
    return left


def _published(stage: Stage, stages: Stages, found: chain.Found) -> str:
    """URL of a stage's result for one run; "" if it is not complete.

    An error that is not passing is left to the pod that does the run, and which fails alone.
    """
    try:
        with contextlib.closing(stage.of(stages, found, _CPU)) as one:
            return one.urls[0] if one.published() else ""
    except SaevError as err:
        if storage.is_passing(err):
            raise
        logger.warning("%s: %s", found[chain.RUNS], err)
        return ""


def _cut(shares: tp.Sequence[Share], runs: tp.Sequence[str], n_slots: int) -> list[list[jobs.Item]]:
    """Divide the work for runs into slots.

    Args:
        shares: what is done together.
        runs: names of the runs.
        n_slots: most slots.
    """
    costs = [float(len(share.runs)) for share in shares]
    n_pieces = jobs.n_pieces(costs, n_slots, [share.pieces for share in shares])
    items, cost_of = [], []
    for number, (share, n) in enumerate(zip(shares, n_pieces, strict=True), start=1):
        named = [runs[i] for i in share.runs]
        name = f"SAE {named[0]}" if len(named) == 1 else f"{len(named)} SAEs"
        if len(named) > 1 and len(shares) > 1:
            name = f"group {number} of {len(shares)}: {name}"
        for i in range(1, n + 1):
            items.append({"name": f"{name}, part {i} of {n}", "runs": named, "part": f"{i}/{n}"})
            cost_of.append(costs[number - 1] / n)
    return jobs.cut(items, n_slots, cost_of)


# --- Jobs ----------------------------------------------------------------------------------------


def _write_slots(cfg: tp.Any, slots: tp.Mapping[str, list[list[jobs.Item]]]) -> None:
    for step, of_step in slots.items():
        outputs.write_parameter(getattr(cfg, f"to_{step}"), jobs.numbered(of_step))


def _open(stage: Stage, job: Job, plan: Plan, runs: tp.Sequence[str]) -> StageJob:
    """A job of a stage, for runs of training or for all of them."""
    stages = job.stages()
    if runs:
        return stage.of_all(stages, [_found(job, plan, run) for run in runs])
    return stage.of(stages, {} if stage is chain.FIRST else {chain.FIRST.name: job.shards(plan)})


def _found(job: Job, plan: Plan, run: str) -> dict[str, str]:
    return {chain.FIRST.name: job.shards(plan), chain.RUNS: job.run(run)}


def _items(opened: StageJob, one: jobs.Item) -> tp.Sequence[Item]:
    if "item" in one:
        return [Item(one["name"], 0, one["item"])]
    return Part.parse(one["part"]).slice(opened.items())


def _key(opened: StageJob, progress: Progress) -> str:
    with progress.doing(opened.opening):
        return opened.key


def _check(opened: StageJob, plan: Plan, job: Job, progress: Progress) -> None:
    """Refuse a job whose inputs are not the planned ones, if the plan knows its key."""
    planned = plan.keys.get(opened.name)
    if planned is not None and (found := _key(opened, progress)) != planned:
        raise ConfigError(
            f"The result of `{opened.name}` on {job.dataset.url or job.dataset.name} has the key "
            f"{found}, but {planned} was planned: the dataset, the weights or the version of saev "
            "changed in between. Submit it again."
        )
