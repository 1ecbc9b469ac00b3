"""Progress bars on stderr: one display that any stage adds its bars to."""

import contextlib
import logging
import os
import sys
import time
import typing as tp
from collections.abc import Iterator

import rich.console
import rich.logging
import rich.progress
import rich.text

from saev.console import Console
from saev.secrets import RedactingFilter

logger = logging.getLogger(__name__)

_LOG_SECONDS = 30.0


class Task:
    """One bar. Created by :meth:`Progress.task`."""

    def __init__(self, progress: "Progress", name: str, total: int | None, unit: str, done: int):
        self._progress, self._name, self._total, self._unit = progress, name, total, unit
        self._started = self._logged = time.monotonic()
        self._initial = self.done = done
        self._n_bytes = 0
        bars = progress._bars
        self._bar = (
            bars.add_task(name, total=total, completed=done, rates="", note="") if bars else None
        )

    def advance(self, n: int, *, n_bytes: int = 0, note: str = "") -> None:
        """Report ``n`` more units (and bytes moved for them); ``note`` is shown behind the bar.

        This is a safe point: it raises if the work has to stop.
        """
        self._progress.safe_point()
        self.done += n
        self._n_bytes += n_bytes
        if self._bar is not None and self._progress._bars is not None:
            self._progress._bars.update(self._bar, advance=n, rates=self.rates, note=note)
            return
        now = time.monotonic()
        if now - self._logged >= _LOG_SECONDS:  # a pod's log has no bar; a line now and then
            self._logged = now
            of = f"/{self._total:,}" if self._total else ""
            logger.info(
                "%s: %s%s %s, %s %s", self._name, f"{self.done:,}", of, self._unit, self.rates, note
            )

    @property
    def rates(self) -> str:
        """Units and MB per second since the task began."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        text = f"{_short((self.done - self._initial) / seconds)} {self._unit}/s"
        if self._n_bytes:
            text += f" {self._n_bytes / 1e6 / seconds:.1f} MB/s"
        return text


def _short(rate: float) -> str:
    if rate >= 1e6:
        return f"{rate / 1e6:.2f}M"
    return f"{rate / 1e3:.1f}k" if rate >= 1e4 else f"{rate:.1f}"


class Progress:
    """A display of bars on stderr; a log line every half minute where stderr is no terminal."""

    safe_point: tp.Callable[[], None]
    """Called often, where work can stop. Raises if it has to stop."""
    may_publish: tp.Callable[[], object]
    """Called right before something is published, and may take a while. Raises if it must not be
    published."""

    def __init__(self, *, quiet: bool = False):
        self.safe_point = lambda: None
        self.may_publish = lambda: None
        console = Console(stderr=True)
        self.quiet = quiet
        self._bars: rich.progress.Progress | None = None
        if not quiet and console.is_terminal:
            self._bars = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=28),
                rich.progress.TaskProgressColumn(),
                rich.progress.TextColumn("{task.fields[rates]}"),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("[dim]{task.fields[note]}"),
                console=console,
            )

    def publish_point(self) -> None:
        """The safe point right before something is published."""
        self.safe_point()
        self.may_publish()

    @contextlib.contextmanager
    def task(self, name: str, *, total: int | None, unit: str, done: int = 0) -> Iterator[Task]:
        """A bar that is there while the block runs.

        Args:
            name: what is being done.
            total: units in all, if known.
            unit: what is counted (img, tok, step).
            done: units that an earlier run finished.
        """
        task = Task(self, name, total, unit, done)
        try:
            yield task
        finally:
            if self._bars is not None and task._bar is not None:
                self._bars.stop_task(task._bar)

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[None]:
        """While the block runs, another process draws on this one's terminal."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    @property
    def console(self) -> rich.console.Console:
        """Where log lines go so that they do not tear the bars."""
        if self._bars is not None:
            return self._bars.console
        return Console(file=sys.stderr)

    def __enter__(self) -> tp.Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()


def log_to(progress: Progress, rank: int = 0) -> None:
    """Send what is logged to stderr, above the bars.

    Args:
        progress: where the bars are.
        rank: of this process among those that train together; all but the first are silent, for
            they would say the same.
    """
    # asyncio logs broken connections with tracebacks. saev.storage already reports them to users.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    level = os.environ.get("SAEV_LOG_LEVEL", "INFO").upper() if rank == 0 else "ERROR"
    if progress.console.is_terminal:
        handler: logging.Handler = rich.logging.RichHandler(
            console=progress.console,
            show_path=False,
            rich_tracebacks=False,
            log_time_format="%H:%M:%S",
        )
        form = "%(message)s"
    else:  # whole lines, for the log of a pod
        handler, form = logging.StreamHandler(), "%(asctime)s %(levelname)s %(message)s"
    handler.addFilter(RedactingFilter())
    logging.basicConfig(level="WARNING" if rank == 0 else "ERROR", format=form, handlers=[handler])
    logging.getLogger("saev").setLevel(level)
