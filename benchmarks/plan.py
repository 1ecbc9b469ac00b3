"""How true what saev says beforehand is: its plan and its remaining time, on three real jobs.

    python benchmarks/plan.py                  # at most 3 minutes on two idle cores
    python benchmarks/plan.py --images 16 --tokens 4000    # a trial, too short to judge

The jobs are `saev shards`, `saev train` (the demo's sweep) and `saev inference` on the demo's
photographs with DINOv2 ViT-S/14. For each, a row has

- plan: the line `about 2 min at 4.1 img/s` after the first seconds, plus the time until then;
- at 20%: the remaining time that progress shows there;
- what it really took, from the first to the last report of progress.

Wanted are a plan within a factor of 2, and a remaining time within 30%. Both assume that the
machine stays as it is. Other programs change that, so the load is printed.
"""

import argparse
import contextlib
import logging
import os
import re
import tempfile
import time
import typing as tp
from collections.abc import Iterator

from saev import inference, progress, run, train
from saev.demo.__main__ import DemoConfig, prepare
from saev.progress import Progress, Task
from saev.shards import extract

SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
SPAN = r"about ([\d.]+) (s|min|h|d)"


class Watched(logging.Handler):
    """What is said about the main task of a job.

    Args:
        name: first word of the task's name.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name_of_task = name
        self.began = self.ended = 0.0
        self.plan: float | None = None
        """Seconds from the beginning to the end, as said after the first seconds."""
        self.at_20: tuple[float, float] | None = None
        """Time of the report at 20%, and the seconds left that it says."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take the plan."""
        said = re.match(rf"{self.name_of_task}\b.*: {SPAN} at ", record.getMessage())
        if said and self.plan is None:
            self.plan = seconds(said) + time.monotonic() - self.began

    def see(self, task: Task) -> None:
        """After a report of progress."""
        self.ended = time.monotonic()
        self.began = self.began or self.ended
        if task._total and self.at_20 is None and task.done >= 0.2 * task._total:
            said = re.search(rf"{SPAN} left", task.said())
            if said:
                self.at_20 = (self.ended, seconds(said))


def seconds(said: re.Match[str]) -> float:
    """A length of time in words."""
    return float(said[1]) * SECONDS[said[2]]


@contextlib.contextmanager
def watching(name: str) -> Iterator[Watched]:
    """Watch the main task with a name while the block runs."""
    watched, advance = Watched(name), Task.advance

    def seen(task: Task, n: int, **options: tp.Any) -> None:
        advance(task, n, **options)
        if task._is_main and task._name.split()[0] == name:
            watched.see(task)

    Task.advance = seen  # type: ignore[method-assign]
    progress.logger.addHandler(watched)
    progress.logger.setLevel("INFO")
    try:
        yield watched
    finally:
        Task.advance = advance  # type: ignore[method-assign]
        progress.logger.removeHandler(watched)


def row(watched: Watched, load: float) -> str:
    """One line of the table."""
    took = watched.ended - watched.began
    words = [f"{watched.name_of_task:10} took {took:6.1f} s"]
    if took < 5:
        return f"{words[0]}, too short to judge, load {load:.1f}"
    if watched.plan is None:
        words.append("no plan: it took only seconds")
    else:
        words.append(f"plan {watched.plan:6.1f} s ({watched.plan / took:.2f} ×)")
    if watched.at_20:
        when, left = watched.at_20
        words.append(f"at 20% {left:5.0f} s left of {watched.ended - when:6.1f} s "
                     f"({left / max(watched.ended - when, 1e-9):.2f} ×)")  # fmt: skip
    return ", ".join([*words, f"load {load:.1f}"])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1200, help="crops of photographs")
    parser.add_argument("--tokens", type=int, default=250_000, help="tokens to train on")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, Progress(quiet=True) as shown:
        demo = DemoConfig(root=root, n_examples=args.images, n_train=args.tokens)
        stages = run.resolve(prepare(demo))
        rows = []
        with watching("shards") as watched:
            shards = extract.run(stages.shards, progress=shown)
        rows.append(row(watched, os.getloadavg()[0]))
        with watching("train") as watched:
            urls = train.run(stages.training(shards), progress=shown, table=stages.sweep)
        rows.append(row(watched, os.getloadavg()[0]))
        with watching("inference") as watched:
            inference.run_all([stages.measuring(url, shards) for url in urls], shown)
        rows.append(row(watched, os.getloadavg()[0]))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
