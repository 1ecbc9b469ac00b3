"""What the benchmarks share: alternating runs, rows with targets, JSON and Markdown.

A rate says little on a machine that others use too, so what is compared runs in turn, and each row
holds every value: median, smallest and largest are printed. Shares are of runs taken one after the
other.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
import typing as tp
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

Values = Sequence[float]


class Row(tp.NamedTuple):
    """One line of a table."""

    what: str
    unit: str
    values: list[float]
    """Every run."""
    target: str
    """As it is printed; empty if there is none."""
    met: bool | None
    """Whether the median reaches the target; None without one."""

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    def cells(self) -> list[str]:
        """Of the Markdown table."""
        spread = f"{number(min(self.values))} – {number(max(self.values))}"
        mark = {True: "yes", False: "**no**", None: ""}[self.met]
        one = len(self.values) == 1
        return [
            self.what,
            f"{number(self.median)} {self.unit}".strip(),
            "" if one else spread,
            self.target,
            mark,
        ]


HEAD = ("what", "median", "min – max", "target", "met")


def number(value: float) -> str:
    """Three significant digits, thousands apart."""
    if abs(value) >= 1000:
        digits = len(str(int(abs(value)))) - 3
        return f"{round(value, -digits):,.0f}"
    return f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- | ---: | ---: | --- | --- |"]
    return "\n".join([*lines, *("| " + " | ".join(row.cells()) + " |" for row in rows)])


class Report:
    """The rows of one script.

    Args:
        command: how to run it again, as a user types it.
        json_path: where to write the rows; empty writes nothing.
    """

    def __init__(self, command: str, json_path: str = ""):
        self.command = command
        self.rows: list[Row] = []
        self.left_out: list[tuple[str, str]] = []
        """What was not measured, and why."""
        self._json = json_path

    def add(
        self,
        what: str,
        values: Values,
        unit: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Add a row and say it on standard error."""
        values = [float(v) for v in values]
        median, met, target = statistics.median(values), None, ""
        if at_least is not None:
            met, target = median >= at_least, f"≥ {number(at_least)}"
        if at_most is not None:
            met, target = median <= at_most, f"≤ {number(at_most)}"
        row = Row(what, unit, values, target, met)
        self.rows.append(row)
        print(" · ".join(cell for cell in row.cells() if cell), file=sys.stderr, flush=True)

    def share(
        self, what: str, values: Values, limit: Values, *, at_least: float | None = None
    ) -> None:
        """Add a row: values as a share of a limit that was measured in turn with them."""
        pairs = [v / of for v, of in zip(values, limit, strict=True)]
        self.add(what, pairs, "×", at_least=at_least)

    def leave_out(self, what: str, why: str) -> None:
        """Add a row about what was not measured."""
        self.left_out.append((what, why))
        print(f"{what}: {why}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print the table and write the JSON."""
        missing = "".join(
            f"\n| {what} | not measured: {why} | | | |" for what, why in self.left_out
        )
        print(f"`{self.command}`\n\n{table(self.rows)}{missing}\n")
        if self._json:
            record = {
                "command": self.command,
                "machine": machine(),
                "rows": [{**row._asdict(), "median": row.median} for row in self.rows],
                "left_out": [{"what": what, "why": why} for what, why in self.left_out],
            }
            Path(self._json).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def alternate(
    runs: Mapping[str, Callable[[], float]], repeats: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Each run's results, ``repeats`` of them, taken in turn; a first round does not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + warm_up):
        for name, run in runs.items():
            value = run()
            if i or not warm_up:
                found[name].append(value)
    return found


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def per_second(run: Callable[[], object], amount: float) -> Callable[[], float]:
    """The rate of a call that does so much."""

    def timed() -> float:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return amount / (time.perf_counter() - start)

    return timed


class Memory:
    """How much a process comes to hold at most from here on, beside what it holds already."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
        self._before = _status("VmRSS")

    def added(self) -> float:
        """MB (10⁶ bytes), at the peak."""
        return _status("VmHWM") - self._before


def _status(field: str) -> float:
    text = Path("/proc/self/status").read_text()
    return float(text.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def machine() -> dict[str, str | int]:
    """Where this runs, and when."""
    names = Path("/proc/cpuinfo").read_text().split("model name\t: ")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[1].split("\n")[0] if len(names) > 1 else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def parser(doc: str, *, repeats: int) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts have."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", default="", metavar="PATH", help="write every value there")
    made.add_argument("--repeats", type=int, default=repeats, help="runs that count, in turn")
    made.add_argument("--small", action="store_true", help="seconds instead of minutes: a trial")
    return made


def invocation() -> str:
    """This command, for the table."""
    skip, words = False, []
    for word in sys.argv[1:]:
        if skip or word == "--json":
            skip = word == "--json"
            continue
        words.append(word)
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
