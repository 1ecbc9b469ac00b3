"""Progress on stderr: bars on a terminal, and a line every half minute in the log of a pod."""

import contextlib
import logging
import os
import sys
import threading
import time
import typing as tp
from collections.abc import Iterator, Mapping

import rich.console
import rich.logging
import rich.progress
import rich.text

from saev import eta
from saev.console import Console
from saev.secrets import RedactingFilter

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0
FIRST_SECONDS = 3.0
"""How long the rate is measured before the remaining time is estimated."""
LONG_SECONDS = 3600.0
"""If the work takes longer than this, the estimate is logged as a warning."""


class Task:
    """One bar. Created by :meth:`Progress.task`."""

    def __init__(
        self,
        progress: "Progress",
        name: str,
        total: int | None,
        unit: str,
        done: int = 0,
        *,
        is_main: bool = False,
    ):
        self._progress, self._name, self._total, self._unit = progress, name, total, unit
        self._clock = progress._clock
        self._started = self._clock()
        self._initial = self.done = done
        self._n_bytes = 0
        self._note = ""
        self._is_main = is_main
        self._first: tuple[float, int] | None = None
        """Time of the first report, and units that were done by then."""
        self._said = False
        self._tell_slot()
        bars = progress._bars if unit else None
        self._bar = (
            bars.add_task(name, total=total, completed=done, rates="", note="") if bars else None
        )

    def advance(self, n: int, *, n_bytes: int = 0, note: str = "") -> None:
        """Report ``n`` more units (and bytes read for them). ``note`` is shown after the bar.

        This is a safe point: it raises if the work has to stop.
        """
        self._progress.safe_point()
        self.done += n
        self._n_bytes += n_bytes
        self._note = note
        self._tell_slot()
        if self._is_main:
            self._say_how_long()
        if self._bar is not None and self._progress._bars is not None:
            self._progress._bars.update(
                self._bar, advance=n, rates=self.rates, note=f"\n{note}" * bool(note)
            )

    def see(self, n: int) -> None:
        """Report ``n`` more files of a listing."""
        self.done += n
        self._note = f"{self.done:,} files found"
        bars = self._progress._bars
        if bars is not None:
            if self._bar is None:
                self._bar = bars.add_task(self._name, total=None, rates="", note="")
            bars.update(self._bar, note=self._note)

    def _say_how_long(self) -> None:
        """Log once how long the work will take. The time before the first call is not counted,
        because that is warm-up."""
        now = self._clock()
        if self._first is None:
            self._first = (now, self.done)
        seconds, n = now - self._first[0], self.done - self._first[1]
        if self._said or not self._total or n <= 0 or seconds < FIRST_SECONDS:
            return
        self._said = True
        left = (self._total - self.done) / n * seconds
        text = f"{self._name}: about {eta.span(left)} at {_short(n / seconds)} {self._unit}/s."
        if left < LONG_SECONDS:
            logger.info("%s", text)
        else:
            logger.warning(
                "%s It may be ended at any time (Ctrl-C): the same command goes on from there.",
                text,
            )

    def _tell_slot(self) -> None:
        slot = self._progress._slot
        if self._is_main and slot is not None:
            slot.update(self.done / self._total if self._total else 1.0)

    @property
    def has_advanced(self) -> bool:
        """Whether anything was done here."""
        return self.done > self._initial

    @property
    def rates(self) -> str:
        """Units and MB per second since the task began."""
        seconds = max(self._clock() - self._started, 1e-9)
        text = f"{_short((self.done - self._initial) / seconds)} {self._unit}/s"
        if self._n_bytes:
            text += f" {self._n_bytes / 1e6 / seconds:.1f} MB/s"
        return text

    def said(self) -> str:
        """The progress, for a log: `shards: 45%, 450/1,000 img, 3.1 img/s, about 3 min left`."""
        elapsed = self._clock() - self._started
        if not self._unit:
            words = [f"{self._name}: {eta.span(elapsed)} so far", self._note]
            return ", ".join(filter(None, words))
        words = [f"{self.done:,} {self._unit}", self.rates]
        if self._total:
            share, worked = self.done / self._total, (self.done - self._initial) / self._total
            count = f"{self.done:,}/{self._total:,} {self._unit}"
            words = [eta.percent(share), count, self.rates, eta.left(share, worked, elapsed)]
        return f"{self._name}: {', '.join(filter(None, [*words, self._note]))}"


def _short(rate: float) -> str:
    if rate >= 1e6:
        return f"{rate / 1e6:.2f}M"
    return f"{rate / 1e3:.1f}k" if rate >= 1e4 else f"{rate:.1f}"


class _Bars(rich.progress.Progress):
    """Bars of our own, and below them a line for each bar of a library."""

    def get_renderables(self) -> tp.Iterable[rich.console.RenderableType]:
        """What is drawn."""
        yield from super().get_renderables()
        for line in eta.bars_of_libraries():
            yield rich.text.Text(line, no_wrap=True, overflow="ellipsis")


class Progress:
    """Shows bars on stderr, or logs a line every half minute if stderr is no terminal.

    A thread logs the lines, so that they also come while a model is loaded, a store is listed or a
    batch takes minutes.

    Args:
        quiet: show neither bars nor lines.
        clock: returns seconds.
        slot: progress of this process's items, as the process that started it knows it
            (:meth:`place`).
    """

    safe_point: tp.Callable[[], None]
    """Called often, at points where the work can stop. Raises if it has to stop."""
    may_publish: tp.Callable[[], object]
    """Called right before something is published, and may take some time. Raises if nothing may be
    published."""

    def __init__(
        self,
        *,
        quiet: bool = False,
        clock: eta.Clock = time.monotonic,
        slot: Mapping[str, tp.Any] | None = None,
    ):
        self.safe_point = lambda: None
        self.may_publish = lambda: None
        console = Console(stderr=True)
        self.quiet = quiet
        self._clock = clock
        self._started = clock()
        self._tasks: list[Task] = []
        self._slot = None if slot is None else eta.Slot.from_dict(slot, clock)
        self._end: threading.Event | None = None
        """Set to end the thread that logs."""
        self._bars: rich.progress.Progress | None = None
        if not quiet and console.is_terminal:
            eta.silence_bars_of_libraries()
            self._bars = _Bars(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=10),  # all has room in 80 columns
                rich.progress.TaskProgressColumn(),
                rich.progress.TextColumn("{task.fields[rates]}[dim]{task.fields[note]}"),
                rich.progress.TimeRemainingColumn(),
                console=console,
            )

    def say(self, text: str) -> None:
        """Print lines for a person, without a time. Long lines are not wrapped, so that a command
        in them can be pasted."""
        if not self.quiet and text:
            self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def publish_point(self) -> None:
        """The safe point right before something is published."""
        self.safe_point()
        self.may_publish()

    @contextlib.contextmanager
    def task(
        self, name: str, *, total: int | None, unit: str, done: int = 0, is_main: bool = False
    ) -> Iterator[Task]:
        """Show a bar while the block runs.

        Args:
            name: what is being done.
            total: number of all units, if it is known.
            unit: what is counted (img, tok, step).
            done: units that an earlier run finished.
            is_main: whether this is the progress of the slot's current item.
        """
        task = Task(self, name, total, unit, done, is_main=is_main)
        self._tasks.append(task)
        try:
            yield task
            if is_main and task.has_advanced and self._end is not None:
                logger.info("%s", self.line())
        finally:
            self._tasks.remove(task)
            if self._bars is not None and task._bar is not None:
                self._bars.stop_task(task._bar)

    @contextlib.contextmanager
    def doing(self, name: str) -> Iterator[Task]:
        """Log what the block does if it takes longer than half a minute.

        Args:
            name: of work that is not counted, such as loading a model.
        """
        with self.task(name, total=None, unit="") as task:
            yield task

    def item(self, name: str, number: int, n: int) -> None:
        """Go on to the next of the items that this process does, one after the other.

        Args:
            name: of the item.
            number: which one, from 1.
            n: how many there are.
        """
        if self._slot is None or number == 1:
            self._slot = eta.Slot(n, self._clock)
        self._slot.start(name)

    @property
    def place(self) -> dict[str, tp.Any] | None:
        """Progress of the slot's items, for another process that continues to report it."""
        return None if self._slot is None else self._slot.to_dict()

    def line(self) -> str:
        """The progress of everything, for a log."""
        words = []
        if self._slot is not None and self._slot.number:
            words.append(self._slot.title)
        tasks = list(self._tasks)
        if tasks:
            words.append(tasks[-1].said())
        words += eta.bars_of_libraries()
        if not tasks:
            words.append(f"at work for {eta.span(self._clock() - self._started)}")
        return "; ".join(filter(None, [": ".join(words), self._slot.said() if self._slot else ""]))

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[None]:
        """While the block runs, another process uses this one's terminal."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    @property
    def console(self) -> rich.console.Console:
        """The console for log lines. It prints them above the bars."""
        if self._bars is not None:
            return self._bars.console
        return Console(file=sys.stderr)

    def __enter__(self) -> tp.Self:
        if self._bars is not None:
            self._bars.start()
        elif not self.quiet:
            self._end = threading.Event()
            threading.Thread(
                target=self._log, args=(self._end,), name="progress", daemon=True
            ).start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()
        if self._end is not None:
            self._end.set()
            self._end = None

    def _log(self, end: threading.Event) -> None:
        while not end.wait(LOG_SECONDS):
            logger.info("%s", self.line())


def log_to(progress: Progress, rank: int = 0) -> None:
    """Send what is logged to stderr, above the bars.

    Args:
        progress: where the bars are.
        rank: of this process among those that train together. Only rank 0 logs more than errors,
            because the others would log the same.
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
    else:  # the log of a pod
        handler, form = logging.StreamHandler(), "%(asctime)s %(levelname)s %(message)s"
    handler.addFilter(RedactingFilter())
    logging.basicConfig(level="WARNING" if rank == 0 else "ERROR", format=form, handlers=[handler])
    logging.getLogger("saev").setLevel(level)
