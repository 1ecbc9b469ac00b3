"""Computes the states of a run's steps from its tasks.

KFP reports the nodes of the Argo workflow: for every step also its driver, and for a loop one node
for each iteration. Here, nodes of one name are one step, so a loop is shown as `extract 3/8`. A
node that Argo may run again has one more node for each attempt, `extract(0)`, which is not counted.
A node that Argo never started has no state, and its end is its start. Not every version of KFP
gives pod names and messages of tasks, so nothing here uses them.
"""

import datetime
import re
import typing as tp

from saev.launch import runs as api
from saev.launch.runs import OVER

STEPS = (
    "discover", "plan", "extract", "publish", "train", "infer", "summarise", "report", "outcome",
)  # fmt: skip
"""Names of the steps of a run on a dataset, in their order."""

FIRING = ("fire",)
"""Names of the steps of a firing of a schedule."""

EARLIER = {
    "plan-shards": "extract", "plan-training": "train", "plan-inference": "infer",
}  # fmt: skip
"""Steps of pipelines of version 0.1.0, and the step after each. A schedule may still run them."""

_LOOPS = frozenset({"extract", "train", "infer", "summarise"})
"""Steps that run once for each item of a list, which may be empty."""
_ATTEMPT = re.compile(r"\(\d+\)$")
_STATES = frozenset({None, "", "RUNTIME_STATE_UNSPECIFIED"})
"""The API's values for an unknown state of a task."""


class Step(tp.NamedTuple):
    """One step of a run with all its parts, such as the iterations of a loop."""

    name: str
    total: int
    """Number of parts until now; a loop may start more."""
    done: int
    running: int
    failed: int
    started: datetime.datetime | None
    finished: datetime.datetime | None
    """None as long as a part runs."""
    lost: int = 0
    """Parts that seem to run although the run is over: KFP stopped reading their states."""
    is_empty: bool = False
    """Whether it is a loop that had nothing to do."""

    @property
    def state(self) -> str:
        """waiting, running, done, failed, empty or unknown."""
        if self.is_empty:
            return "empty"
        if self.failed:
            return "failed"
        if self.lost:
            return "unknown"
        if self.total and self.done == self.total:
            return "done"
        return "running" if self.total else "waiting"

    @property
    def progress(self) -> str:
        """Done and total parts, such as 3/8; "" before the first part."""
        return f"{self.done}/{self.total}" if self.total else ""


def of_run(run: tp.Any) -> list[Step]:
    """The steps of a run as the API reports it, in their order, waiting ones too."""
    tasks = (run.run_details and run.run_details.task_details) or []
    by_name: dict[str, list[tp.Any]] = {}
    for task in tasks:
        name = task.display_name or ""
        if not _ATTEMPT.search(name) and not _never_started(task):
            by_name.setdefault(name, []).append(task)
    before = {name: earlier for earlier, name in EARLIER.items() if earlier in by_name}
    known = FIRING if is_firing(run) else STEPS
    names = [n for name in known for n in (before.get(name), name) if n]
    if before:  # these pipelines have no step `plan`
        names.remove("plan")
    steps = [_step(name, by_name, is_over=run.state in OVER) for name in names]
    for i, step in enumerate(steps):
        # A later step starts when the loop before it is over. The exit handler, the last step,
        # starts in any case.
        if step.name in _LOOPS and not step.total and any(s.total for s in steps[i + 1 : -1]):
            steps[i] = step._replace(is_empty=True)
    if run.state in OVER:  # steps that have not started will not start any more
        steps = [step for step in steps if step.total or step.is_empty]
    return steps


def is_firing(run: tp.Any) -> bool:
    """Whether a run is a firing of a schedule, which starts the runs on datasets."""
    return "start" in ((run.runtime_config and run.runtime_config.parameters) or {})


def _never_started(task: tp.Any) -> bool:
    """Whether Argo skipped a node because of an earlier failure (Argo's phase Omitted)."""
    return task.state in _STATES and real_time(task.end_time) is not None


def _step(name: str, by_name: dict[str, list[tp.Any]], *, is_over: bool) -> Step:
    """The step of a name. Each part has a driver; if the driver fails, the part does not exist."""
    parts, drivers = by_name.get(name, []), by_name.get(f"{name}-driver", [])
    bad_drivers = sum(task.state == "FAILED" for task in drivers)
    states = [task.state for task in parts]
    # In a run that is over, a driver may have no part, because the part was not started any more.
    total = len(parts) + bad_drivers if is_over else max(len(parts), len(drivers))
    done = sum(state in ("SUCCEEDED", "SKIPPED") for state in states)
    failed = sum(state in ("FAILED", "CANCELED") for state in states) + bad_drivers
    starts = [time for task in (*drivers, *parts) if (time := real_time(task.start_time))]
    ends = [time for task in parts if (time := real_time(task.end_time))]
    open_ = max(0, total - done - failed)
    running, lost = (0, open_) if is_over else (open_, 0)
    end = None if open_ else max(ends, default=None)
    return Step(name, total, done, running, failed, min(starts, default=None), end, lost)


def failing(run: tp.Any) -> str:
    """The first step that failed, or the first driver if no step did; "" if neither failed."""
    step = next((step.name for step in of_run(run) if step.failed), "")
    tasks = (run.run_details and run.run_details.task_details) or []
    names = [task.display_name or "" for task in tasks if task.state == "FAILED"]
    return step or next((name for name in names if name.endswith("-driver")), "")


def is_idle(run: tp.Any) -> bool:
    """Whether a run that succeeded found no dataset to process."""
    ran = {step.name for step in of_run(run) if step.total}
    # Idle runs of schedules of version 0.1.0 end so. A firing is judged by the runs it started.
    return run.state == "SUCCEEDED" and ran in ({"discover"}, {"discover", "outcome"})


def state_of(run: tp.Any) -> str:
    """A run's state in small letters. A canceled run is `canceled`; KFP calls it failed."""
    state = (run.state or "PENDING").replace("RUNTIME_STATE_UNSPECIFIED", "PENDING")
    history = [status.state for status in run.state_history or []]
    if state == "FAILED" and api.was_canceled(history):
        state = "CANCELED"
    return state.lower()


def messages(run: tp.Any) -> list[str]:
    """KFP's own messages about the failure of a run, without repetition."""
    tasks = (run.run_details and run.run_details.task_details) or []
    errors = [task.error for task in tasks]
    errors += [status.error for task in tasks for status in task.state_history or []]
    errors += [run.error, *(status.error for status in run.state_history or [])]
    texts = [" ".join(error.message.split()) for error in errors if error and error.message]
    return list(dict.fromkeys(texts))


def real_time(time: datetime.datetime | None) -> datetime.datetime | None:
    """A time of the API; None for the year 1, which means that it has not happened."""
    if time is None or time.year < 1971:
        return None
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)


def duration(start: datetime.datetime | None, end: datetime.datetime | None) -> str:
    """A time span such as `4 min`. Without an end it lasts until now; without a start it is ""."""
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
