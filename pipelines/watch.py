"""Waits for a run, and shows its steps meanwhile."""

import time
import typing as tp

import rich.console
import rich.live
import rich.table
import tenacity

from pipelines import called, launched, logs, retries, steps
from pipelines.connect import Kfp
from pipelines.errors import ClusterError, RunFailedError

T = tp.TypeVar("T")
_Slots: tp.TypeAlias = tp.Mapping[str, launched.Slots]

POLL_SECONDS = 5.0
PATIENCE = 600.0
"""Seconds of errors without a break after which waiting ends. The run itself goes on."""
_MARKS = {
    "waiting": "·", "running": "▶", "done": "✓", "failed": "✗", "empty": "–", "unknown": "?"
}  # fmt: skip
_STYLES = {
    "waiting": "dim", "running": "cyan", "done": "green", "failed": "bold red", "empty": "dim",
    "unknown": "yellow",
}  # fmt: skip


def wait(kfp: Kfp, run_id: str, console: rich.console.Console, max_retries: int = 0) -> None:
    """Show a run's steps until it is over.

    Args:
        kfp: the connection.
        run_id: id of the run.
        console: shows the steps: as a table on a terminal, otherwise one line for each change.
        max_retries: how often a failed run is retried, if a retry may succeed.

    Raises:
        RunFailedError: the run failed or was canceled. The last lines of the step were shown.
        ClusterError: the API refuses, or has not answered for ten minutes.
    """
    run = _follow(kfp, run_id, console)
    for i in range(max_retries):
        if run.state != "FAILED":
            break
        against = retries.reason_against(run)
        if against:
            console.print(
                f"{run.display_name} is not retried: {against}.",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
            break
        console.print(
            f"{run.display_name} failed in step {steps.failing(run) or 'unknown'}, for a reason "
            f"that may pass. Retry {i + 1} of {max_retries}: finished work is kept.",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        retries.retry(kfp, run)
        run = _follow(kfp, run_id, console)
    _end(kfp, run, console)


def _follow(kfp: Kfp, run_id: str, console: rich.console.Console) -> tp.Any:
    """Show a run's steps until it is over. Returns the run."""
    look = launched.JobReader(kfp)
    with _display(console) as show:
        run = _get(kfp, run_id, show)
        show.update(run, look.slots(run))
        while run.state not in steps.OVER:
            time.sleep(POLL_SECONDS)
            run = _get(kfp, run_id, show)
            show.update(run, look.slots(run))
    return run


def _end(kfp: Kfp, run: tp.Any, console: rich.console.Console) -> None:
    took = steps.duration(steps.real_time(run.created_at), steps.real_time(run.finished_at))
    state = steps.state_of(run)
    if state in ("succeeded", "skipped"):
        idle = " There was nothing to process." if steps.is_idle(run) else ""
        if steps.is_firing(run):
            idle = f" `{called.by('status', run.run_id)}` names the runs that it started."
        console.print(f"{run.display_name} succeeded after {took}.{idle}", highlight=False)
        return
    if state == "canceled":
        raise RunFailedError(f"{run.display_name} was canceled after {took}.")
    step = steps.failing(run)
    if not step:
        raise RunFailedError(f"{run.display_name} {logs.ended_from_outside(kfp, run, took)}")
    error = logs.show_end(kfp, run, step, console)
    raise RunFailedError(
        f"{run.display_name} failed in step {step} after {took}. "
        f"`{called.by('logs', run.run_id)}` shows more."
        + (f" The step's error: {error}" * bool(error))
    )


def _get(kfp: Kfp, run_id: str, show: "_Display") -> tp.Any:
    def get() -> tp.Any:
        with kfp.explained("look at the run"):
            return kfp.runs.run_service_get_run(run_id=run_id)

    return with_retries(get, show.say)


def with_retries(request: tp.Callable[[], T], say: tp.Callable[[str], None]) -> T:
    """Send a request, and repeat it after transient errors.

    Args:
        request: sends the request, and raises ClusterError if it fails.
        say: shows the message of each error.

    Returns:
        The answer to the request.

    Raises:
        ClusterError: the request is refused, or fails for ten minutes.
    """

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        say(f"{error} Waiting goes on.")

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_exponential(multiplier=POLL_SECONDS / 5, max=30),
        stop=tenacity.stop_after_delay(PATIENCE),
        before_sleep=tell,
        reraise=True,
    )
    return retrying(request)


def _is_transient(err: BaseException) -> bool:
    return isinstance(err, ClusterError) and (err.status in (0, 429) or err.status >= 500)


class _Display(tp.Protocol):
    def __enter__(self) -> tp.Self: ...
    def __exit__(self, *error: object) -> None: ...
    def update(self, run: tp.Any, slots: _Slots) -> None:
        """Show the run's steps."""

    def say(self, text: str) -> None:
        """Show a message."""


def _display(console: rich.console.Console) -> _Display:
    return _Live(console) if console.is_terminal else _Lines(console)


class _Live:
    """A table that is drawn again after each change."""

    def __init__(self, console: rich.console.Console):
        self._console = console
        self._live = rich.live.Live(console=console, auto_refresh=False)

    def __enter__(self) -> tp.Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def update(self, run: tp.Any, slots: _Slots) -> None:
        self._live.update(table(run, slots), refresh=True)

    def say(self, text: str) -> None:
        self._live.console.print(text, style="yellow", highlight=False)


class _Lines:
    """One line for each change, for logs."""

    def __init__(self, console: rich.console.Console):
        self._console = console
        self._before: dict[str, steps.Step] = {}

    def __enter__(self) -> tp.Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self, run: tp.Any, slots: _Slots) -> None:
        for step in of_run(run, slots):
            before = self._before.get(step.name)
            if step.state != "waiting" and (before is None or _counts(before) != _counts(step)):
                self.say(line(step))
            self._before[step.name] = step

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def _counts(step: steps.Step) -> tuple[tp.Any, ...]:
    return (step.total, step.done, step.running, step.failed, step.lost, step.is_empty)


def line(step: steps.Step) -> str:
    """One line about a step."""
    if step.is_empty:
        return f"{step.name}: nothing to do"
    parts = [f"{step.name}: {step.progress} done", *_notes(step)]
    took = steps.duration(step.started, step.finished)
    return ", ".join(parts) + (f", {took}" if took and step.state != "running" else "")


def of_run(run: tp.Any, slots: _Slots) -> list[steps.Step]:
    """The steps of a run. The numbers of launched slots, which KFP does not know, are filled in."""
    return [
        step._replace(**slots[step.name]._asdict()) if step.total and step.name in slots else step
        for step in steps.of_run(run)
    ]


def table(run: tp.Any, slots: _Slots) -> rich.table.Table:
    """All steps of a run, for a terminal."""
    rows = rich.table.Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for step in of_run(run, slots):
        notes = _notes(step)[1 if step.running == step.total == 1 else 0 :]
        rows.add_row(
            _MARKS[step.state],
            step.name,
            step.progress,
            "" if step.lost else steps.duration(step.started, step.finished),
            "nothing to do" if step.is_empty else ", ".join(notes),
            style=_STYLES[step.state],
        )
    return rows


def _notes(step: steps.Step) -> list[str]:
    """The numbers of parts that run, failed, or were not reported to the end."""
    notes = [f"{step.running} running"] if step.running else []
    notes += [f"{step.failed} failed"] if step.failed else []
    return notes + ([f"{step.lost} not reported to the end"] if step.lost else [])
