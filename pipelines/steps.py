"""What the tasks of a run say about its steps.

KFP reports the nodes of the Argo workflow: beside every step its driver, and of a loop one node per
iteration. Nodes of one name are one step here, so a loop reads `extract 3/8`. Tasks have neither
pod names nor messages in every version of KFP, so nothing here depends on them.
"""

import datetime
import typing as tp

STEPS = (
    "discover", "plan-shards", "extract", "publish", "plan-training", "train",
    "plan-inference", "infer", "summarise", "report", "outcome",
)  # fmt: skip
"""Names of the steps of all pipelines, in their order."""

OVER = frozenset({"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"})
"""States in which a run, or a task, stays."""

COMPONENTS = {"plan-shards": "plan", "plan-training": "plan", "plan-inference": "plan"}
"""The label app.kubernetes.io/component of a step's pods, where it is not the step's name."""


class Step(tp.NamedTuple):
    """One step of a run, all its parts together."""

    name: str
    total: int
    """Parts seen so far; a loop may start more."""
    done: int
    running: int
    failed: int
    started: datetime.datetime | None
    finished: datetime.datetime | None
    """None as long as a part runs."""

    @property
    def state(self) -> str:
        """waiting, running, done or failed."""
        if self.failed:
            return "failed"
        if self.total and self.done == self.total:
            return "done"
        return "running" if self.total else "waiting"

    @property
    def progress(self) -> str:
        """Such as 3/8; empty before the first part."""
        return f"{self.done}/{self.total}" if self.total else ""


def of_run(run: tp.Any) -> list[Step]:
    """The steps of a run as the API reports it, in their order, waiting ones too."""
    tasks = (run.run_details and run.run_details.task_details) or []
    by_name: dict[str, list[tp.Any]] = {}
    for task in tasks:
        by_name.setdefault(task.display_name or "", []).append(task)
    steps = [_step(name, by_name) for name in STEPS]
    if run.state in OVER:  # what never started never will
        steps = [step for step in steps if step.total]
    return steps


def _step(name: str, by_name: dict[str, list[tp.Any]]) -> Step:
    """A driver prepares each part, and is all there is of a part that it refused."""
    parts, drivers = by_name.get(name, []), by_name.get(f"{name}-driver", [])
    bad_drivers = sum(task.state == "FAILED" for task in drivers)
    states = [task.state for task in parts]
    total = max(len(parts), len(drivers))
    done = sum(state in ("SUCCEEDED", "SKIPPED") for state in states)
    failed = sum(state in ("FAILED", "CANCELED") for state in states) + bad_drivers
    starts = [time for task in (*drivers, *parts) if (time := real_time(task.start_time))]
    ends = [time for task in parts if (time := real_time(task.end_time))]
    is_over = total > 0 and done + failed >= total
    return Step(
        name,
        total,
        done,
        max(0, total - done - failed),
        failed,
        min(starts, default=None),
        max(ends, default=None) if is_over else None,
    )


def failing(run: tp.Any) -> str:
    """The first step that failed; empty if none did."""
    return next((step.name for step in of_run(run) if step.failed), "")


def messages(run: tp.Any) -> list[str]:
    """Whatever KFP itself says about why a run failed, without repetition."""
    tasks = (run.run_details and run.run_details.task_details) or []
    errors = [task.error for task in tasks]
    errors += [status.error for task in tasks for status in task.state_history or []]
    errors += [run.error, *(status.error for status in run.state_history or [])]
    texts = [" ".join(error.message.split()) for error in errors if error and error.message]
    return list(dict.fromkeys(texts))


def real_time(time: datetime.datetime | None) -> datetime.datetime | None:
    """A time of the API. It says year 1 for what has not happened."""
    if time is None or time.year < 1971:
        return None
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)


def duration(start: datetime.datetime | None, end: datetime.datetime | None) -> str:
    """Such as `4 min`; until now where there is no end; empty where there is no start."""
    if start is None:
        return ""
    return seconds(((end or datetime.datetime.now(datetime.UTC)) - start).total_seconds())


def seconds(n: float) -> str:
    """A time span for people."""
    n = max(0, round(n))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if n >= 2 * size or (n >= size and unit != "d"):
            return (
                f"{n / size:.1f} {unit}"
                if n < 10 * size and unit != "min"
                else f"{n // size} {unit}"
            )
    return f"{n} s"
