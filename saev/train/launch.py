"""Starts the ranks of a training on this machine, and ends all of them when one fails.

The process that starts the ranks does not train. It waits, forwards signals and reports errors.
Each rank is a process `python -m saev.train.worker`:

- It reads its job from standard input. Standard input stays open, so that the rank notices if this
  process is killed.
- It writes to standard output how it ended. Its log goes to the standard error of this process.
- It has its own session, so that Ctrl-C in a terminal reaches only this process.

Why this is not torch's elastic launcher (torch.distributed.elastic, which torchrun uses; as read in
the source of torch 2.14.1):

- If the launcher is killed by SIGKILL, ranks that it started as commands go on. Ranks that it
  started as functions get SIGINT, on Linux only, and train until their next safe point.
- If one rank fails, the others get SIGTERM at once, before they can report their own errors. The
  launcher reports the earliest error, which may be only that another rank is gone.
- After SIGTERM the ranks have 30 seconds (LaunchConfig.shutdown_timeout), or another fixed time.
  Rank 0 may need longer for a large resume point. Here only Kubernetes limits that time.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import typing as tp

import torch
import torch.distributed as dist

from saev import cores, errors
from saev.errors import RankError, SaevError, StorageError
from saev.progress import Progress
from saev.train.signals import EXIT_SIGTERM, Interruption

_POLL_SECONDS = 0.1
_LAST_WORDS_SECONDS = 5.0
"""When one rank has failed, the others have this time to report their own errors."""
_RESUME = "The same command continues from the last resume point."


def train(item: tp.Mapping[str, tp.Any], size: int, progress: Progress) -> None:
    """Train one work item with ``size`` processes on this machine.

    Raises:
        SaevError: what the first rank that failed raised.
        RankError: a rank was killed, or ended in an error that is a bug.
        SystemExit, KeyboardInterrupt: after SIGTERM, Ctrl-C; a resume point was written.
    """
    if torch.cuda.is_initialized():  # by an earlier stage; the ranks need its memory
        torch.cuda.empty_cache()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with Interruption() as interruption, progress.handed_over():
        ranks: list[_Rank] = []
        try:
            ranks += [_Rank(number, size) for number in range(size)]
            job = {"size": size, "port": store.port, "quiet": progress.quiet, "item": item}
            job["place"] = progress.place
            for one in ranks:
                one.give({**job, "rank": one.number})
            _watch(ranks, interruption, progress)
        finally:
            for one in ranks:
                one.kill()
        _judge(ranks, interruption)


class _Rank:
    """A process and how it ended."""

    def __init__(self, number: int, size: int):
        self.number = number
        self.killed = False
        """Whether this process ended it."""
        threads = max(1, cores.available() // size)
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        if wanted.isdecimal():
            threads = min(threads, int(wanted))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "saev.train.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,
        )

    def give(self, job: tp.Mapping[str, tp.Any]) -> None:
        """Send the process its job."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; its status is read later
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def status(self) -> int | None:
        """The exit status, as Popen gives it; None while the process runs."""
        return self._process.poll()

    @property
    def failed(self) -> bool:
        """Whether it has ended, neither with success nor because of SIGTERM."""
        return self.status not in (None, 0, EXIT_SIGTERM, -signal.SIGTERM)

    def terminate(self) -> None:
        """Ask it to finish its step and to end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        if self.status is None:
            self.killed = True
            self._process.kill()
            self._process.wait()

    def report(self) -> dict[str, str]:
        """What it wrote about its end; empty if it could not."""
        assert self._process.stdout is not None
        try:
            found = json.loads(self._process.stdout.read() or b"{}")
        except json.JSONDecodeError:
            return {}
        return {str(k): str(v) for k, v in found.items()}


def _watch(ranks: tp.Sequence[_Rank], interruption: Interruption, progress: Progress) -> None:
    """Wait until all ranks have ended. After one has failed, the others have limited time."""
    passed_on = False
    deadline = float("inf")
    while any(one.status is None for one in ranks) and time.monotonic() < deadline:
        progress.safe_point()
        if interruption.requested and not passed_on:
            passed_on = True
            for one in ranks:
                one.terminate()
        # After a signal, rank 0 ends last, because it writes the resume point.
        hopeless = any(one.failed for one in ranks) or ranks[0].status is not None
        if hopeless and deadline == float("inf"):
            deadline = time.monotonic() + _LAST_WORDS_SECONDS
        time.sleep(_POLL_SECONDS)


def _judge(ranks: tp.Sequence[_Rank], interruption: Interruption) -> None:
    """Return if the training succeeded, else raise the error that made it fail."""
    # Everything is published once rank 0 has succeeded, so the others may have been killed.
    if ranks[0].status == 0 and all(one.status == 0 or one.killed for one in ranks):
        if interruption.requested:
            interruption.leave()
        return
    reports = {one.number: one.report() for one in ranks if not one.killed}
    # A RankError only says that another rank is gone. The cause is what that rank reported, or how
    # it ended.
    for report in reports.values():
        kind = getattr(errors, report.get("kind", ""), None)
        if kind is not None and issubclass(kind, SaevError) and kind is not RankError:
            error = kind(report["message"])
            if isinstance(error, StorageError):
                error.passing = bool(report.get("passing"))
            raise error
    size = len(ranks)
    for one in ranks:
        if one.failed and not one.killed and not reports[one.number]:
            how = f"ended with status {one.status}"
            if one.status is not None and one.status < 0:
                how = f"was killed by {signal.Signals(-one.status).name}"
                if one.status == -signal.SIGKILL:
                    how += ", perhaps because memory ran out"
            raise RankError(f"Rank {one.number} of {size} {how}; the others were ended. {_RESUME}")
    for number, report in reports.items():
        if "trace" in report:
            sys.stderr.write(report["trace"])
            raise RankError(
                f"Rank {number} of {size} failed ({report['message']}); the others were ended. "
                f"This is a bug. {_RESUME}"
            )
    if interruption.requested or any(
        one.status in (EXIT_SIGTERM, -signal.SIGTERM) for one in ranks
    ):
        interruption.leave()
    lost = next((r["message"] for r in reports.values() if "message" in r), _RESUME)
    raise RankError(lost)
