"""Waiting for a run, with its steps as they go."""

import time
import typing as tp

import rich.console
import rich.live
import rich.table
import tenacity

from pipelines import logs, steps
from pipelines.connect import Kfp
from pipelines.errors import ClusterError, RunFailedError

POLL_SECONDS = 5.0
PATIENCE = 600.0
"""Seconds of errors in a row after which waiting ends; the run does not."""
_MARKS = {"waiting": "·", "running": "▶", "done": "✓", "failed": "✗"}
_STYLES = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "bold red"}


def wait(kfp: Kfp, run_id: str, console: rich.console.Console) -> None:
    """Show a run's steps until it is over.

    Args:
        kfp: the connection.
        run_id: which run.
        console: where the steps are shown: live on a terminal, else one line per change.

    Raises:
        RunFailedError: it failed or was canceled; the failing step's last lines were shown.
        ClusterError: the API refuses, or has not answered for ten minutes.
    """
    with _display(console) as show:
        run = _get(kfp, run_id, show)
        show.update(run)
        while run.state not in steps.OVER:
            time.sleep(POLL_SECONDS)
            run = _get(kfp, run_id, show)
            show.update(run)
    _end(kfp, run, console)


def _end(kfp: Kfp, run: tp.Any, console: rich.console.Console) -> None:
    took = steps.duration(steps.real_time(run.created_at), steps.real_time(run.finished_at))
    if run.state in ("SUCCEEDED", "SKIPPED"):
        console.print(f"{run.display_name} succeeded after {took}.", highlight=False)
        return
    step = steps.failing(run)
    if run.state == "FAILED":
        logs.show_end(kfp, run, step, console)
    what = "was canceled" if run.state == "CANCELED" else f"failed in step {step or 'unknown'}"
    more = f" `make logs RUN={run.run_id}` shows more." if run.state == "FAILED" else ""
    raise RunFailedError(f"{run.display_name} {what} after {took}.{more}")


def _get(kfp: Kfp, run_id: str, show: "_Display") -> tp.Any:
    """The run, through the transient errors that hours of waiting bring."""

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        show.say(f"{error} Waiting goes on.")

    @tenacity.retry(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_exponential(multiplier=POLL_SECONDS / 5, max=30),
        stop=tenacity.stop_after_delay(PATIENCE),
        before_sleep=tell,
        reraise=True,
    )
    def get() -> tp.Any:
        with kfp.explained("look at the run"):
            return kfp.runs.run_service_get_run(run_id=run_id)

    return get()


def _is_transient(err: BaseException) -> bool:
    return isinstance(err, ClusterError) and (err.status in (0, 429) or err.status >= 500)


class _Display(tp.Protocol):
    def __enter__(self) -> tp.Self: ...
    def __exit__(self, *error: object) -> None: ...
    def update(self, run: tp.Any) -> None:
        """Show the run's steps."""

    def say(self, text: str) -> None:
        """Show a message."""


def _display(console: rich.console.Console) -> _Display:
    return _Live(console) if console.is_terminal else _Lines(console)


class _Live:
    """A table that is drawn anew."""

    def __init__(self, console: rich.console.Console):
        self._console = console
        self._live = rich.live.Live(console=console, auto_refresh=False)

    def __enter__(self) -> tp.Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def update(self, run: tp.Any) -> None:
        self._live.update(table(run), refresh=True)

    def say(self, text: str) -> None:
        self._live.console.print(text, style="yellow", highlight=False)


class _Lines:
    """One line for every change, for logs."""

    def __init__(self, console: rich.console.Console):
        self._console = console
        self._before: dict[str, steps.Step] = {}

    def __enter__(self) -> tp.Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self, run: tp.Any) -> None:
        for step in steps.of_run(run):
            before = self._before.get(step.name)
            if step.total and (before is None or before[1:5] != step[1:5]):
                self.say(line(step))
            self._before[step.name] = step

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def line(step: steps.Step) -> str:
    """One step in words."""
    parts = [f"{step.name}: {step.progress} done"]
    parts += [f"{step.running} running"] if step.running else []
    parts += [f"{step.failed} failed"] if step.failed else []
    took = steps.duration(step.started, step.finished)
    return ", ".join(parts) + (f", {took}" if took and step.state != "running" else "")


def table(run: tp.Any) -> rich.table.Table:
    """All steps of a run, for a terminal."""
    rows = rich.table.Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for step in steps.of_run(run):
        notes = [f"{step.running} running"] if step.running and step.total > 1 else []
        notes += [f"{step.failed} failed"] if step.failed else []
        rows.add_row(
            _MARKS[step.state],
            step.name,
            step.progress,
            steps.duration(step.started, step.finished),
            ", ".join(notes),
            style=_STYLES[step.state],
        )
    return rows
