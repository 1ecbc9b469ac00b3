"""Checks, how they ended, and the table of them."""

import collections.abc
import concurrent.futures
import contextlib
import threading
import time
import traceback
import typing as tp

from saev.errors import SaevError

Level = tp.Literal["ok", "FAIL", "note", "not run"]


class Failed(Exception):
    """A cluster does not do what saev needs.

    Args:
        found: what happened instead.
        remedy: what an operator does about it.
    """

    def __init__(self, found: str, remedy: str = ""):
        super().__init__(found)
        self.found, self.remedy = found, remedy


class NotRun(Exception):
    """A check that cannot be made here, with the reason."""


class Noted(str):
    """What was found, where it is worth knowing and neither right nor wrong."""


class Check(tp.NamedTuple):
    """One line of the table."""

    name: str
    do: collections.abc.Callable[[], str]
    """Returns what was found. Raises Failed, NotRun, or an error of the client."""


class Outcome(tp.NamedTuple):
    """How a check ended."""

    name: str
    level: Level
    seconds: float
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.level:8}{self.seconds:6.0f} s  {self.name}: {self.found}"
        return f"{line}\n{'':18}{self.remedy}" if self.remedy else line


class Table:
    """Runs checks and prints a line when one ends.

    Args:
        write: takes a line.
        wanted: whether a check of this name is asked for.
        deadline: of `time.monotonic()`, after which no check begins.
    """

    def __init__(
        self,
        write: collections.abc.Callable[[str], None],
        wanted: collections.abc.Callable[[str], bool],
        deadline: float,
    ):
        self._write, self._wanted, self._deadline = write, wanted, deadline
        self._lock = threading.Lock()
        self.outcomes: list[Outcome] = []
        self.stopped = threading.Event()
        """Set when the suite is interrupted, so that checks which wait do not."""

    def run(self, *checks: Check, side_by_side: int = 1) -> None:
        """Make checks, several at a time, and go on whatever they find."""
        chosen = [check for check in checks if self._wanted(check.name)]
        with concurrent.futures.ThreadPoolExecutor(side_by_side) as pool:
            waiting = [pool.submit(self._make, check) for check in chosen]
            try:
                for done in concurrent.futures.as_completed(waiting):
                    self._say(done.result())
            except BaseException:
                self.stopped.set()
                for one in waiting:
                    one.cancel()
                raise

    def _make(self, check: Check) -> Outcome:
        start = time.monotonic()
        if start > self._deadline:
            return Outcome(check.name, "not run", 0.0, "the time is over (--minutes)")

        def outcome(level: Level, found: str, remedy: str = "") -> Outcome:
            return Outcome(check.name, level, time.monotonic() - start, found, remedy)

        try:
            found = check.do()
        except Failed as err:
            return outcome("FAIL", err.found, err.remedy)
        except NotRun as err:
            return outcome("not run", str(err))
        except SaevError as err:
            return outcome("FAIL", str(err))
        except Exception as err:  # a mistake in the check must not hide what the others find
            with contextlib.suppress(Exception):
                traceback.print_exc(limit=-3)
            return outcome("FAIL", f"the check itself failed: {type(err).__name__}: {err}")
        return outcome("note" if isinstance(found, Noted) else "ok", found)

    def _say(self, outcome: Outcome) -> None:
        with self._lock:
            self.outcomes.append(outcome)
            self._write(str(outcome))

    @property
    def summary(self) -> str:
        """How many ended how."""
        levels = [outcome.level for outcome in self.outcomes]
        counts = {level: levels.count(level) for level in ("ok", "FAIL", "note", "not run")}
        return ", ".join(f"{n} {level}" for level, n in counts.items() if n) or "nothing was run"

    @property
    def is_well(self) -> bool:
        """Whether something was checked and nothing failed."""
        levels = {outcome.level for outcome in self.outcomes}
        return "FAIL" not in levels and "ok" in levels
