"""Runs a step as a child process, and runs it again after a failure that may pass.

    python -m saev.steps.supervisor step train --job … --slot …     # what a pod runs
    python -m saev.steps.supervisor --ranks 8 step train …          # 8 ranks, started by torchrun
    python -m saev.steps.supervisor --signal 15                     # what Argo runs to stop it
    python -m saev.steps.supervisor -- COMMAND …                    # another command, same rules

Kubeflow Pipelines 2.17 does not retry a container that fails. It replaces only lost pods. So the
supervisor handles an unavailable store, a killed process or a broken network: it runs the step
again in the same pod, and the step continues from its finished work. After a mistake in the config
or a damaged file, the step ends at once, because a retry would find the same.
"""

import collections
import collections.abc
import contextlib
import ctypes
import itertools
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import typing as tp
from pathlib import Path

import tenacity

from saev.errors import SaevError
from saev.interrupts import PERMANENT
from saev.progress import Progress, log_to
from saev.steps import environment, last_word, memory
from saev.steps.last_word import LastWord

logger = logging.getLogger("saev.steps.supervisor")  # messages of __main__ are not shown

MODULE = "saev.steps.supervisor"
_RETRIES = "SAEV_RETRIES"
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1
STOPPED = 128 + signal.SIGTERM
_MEET_SECONDS = 1800
"""How long torchrun waits for the other machines. Some of them may first pull the image."""


class Policy(tp.NamedTuple):
    """How often a step is run again, and when."""

    retries: int = 3
    """Most restarts within a window."""
    window_s: float = 3600.0
    """Seconds of the window. Older failures do not count, because a step may take days."""
    wait_s: float = 10.0
    """Seconds before the first restart. They are doubled before each further one."""
    most_wait_s: float = 300.0
    """Most seconds before a restart."""

    @classmethod
    def from_environment(cls) -> tp.Self:
        """The policy with SAEV_RETRIES as `retries`, if that is a number."""
        text = os.environ.get(_RETRIES, "")
        return cls(retries=int(text)) if text.isdecimal() else cls()


class Supervisor:
    """Runs one step in a process, and in a new process after each failure that may pass.

    Args:
        command: the step's command.
        policy: how often it is run again.
        look: returns the memory of the container.
    """

    def __init__(
        self,
        command: tp.Sequence[str],
        policy: Policy,
        look: tp.Callable[[], memory.Memory | None] = memory.look,
    ):
        self._command, self._policy, self._look = list(command), policy, look
        self._child: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._failures: collections.deque[float] = collections.deque()
        self._before: LastWord | None = None
        """Why the last process ended."""
        self._was_short = False
        """Whether it ended for lack of memory."""
        self.n_runs = 0

    def run(self) -> LastWord | None:
        """Run the step until it is done or a retry cannot help.

        Returns:
            Why it failed; None if it is done.
        """
        again = tenacity.Retrying(
            retry=tenacity.retry_if_result(
                lambda word: word is not None and word.kind == "passing" and not word.is_spent
            ),
            stop=lambda state: self._stop.is_set() or len(self._failures) > self._policy.retries,
            wait=lambda state: self._pause(),
            sleep=self._wait,
            before_sleep=self._say,
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        word: LastWord | None = again(self._run_once)
        if self._stop.is_set() and word is not None and word.kind == "passing":
            return LastWord("stopped", word.error)
        return word

    def stop(self, *_: object) -> None:
        """Ask the step to end; training first writes a resume point. This is a signal handler."""
        self._stop.set()
        child = self._child
        if child is not None:
            child.terminate()

    def _run_once(self) -> LastWord | None:
        if self._stop.is_set():
            return LastWord("stopped", "It was stopped before it was run again.")
        self.n_runs += 1
        environment.take()  # each time, because keys may have been renewed
        with tempfile.TemporaryDirectory(prefix="saev-last-word-") as folder:
            self._child = child = subprocess.Popen(
                self._command,
                env={**os.environ, last_word.FOLDER_VARIABLE: folder},
                start_new_session=True,  # so a terminal's signals reach the child only through us
                preexec_fn=_end_with_the_parent if sys.platform == "linux" else None,
            )
            if self._stop.is_set():  # the signal came while the process was started
                child.terminate()
            short = self._follow(child)
            word = self._judge(child.returncode, last_word.heard(Path(folder)), short)
        self._child = None
        self._count(word)
        self._before, self._was_short = word, short is not None
        return word

    def _follow(self, child: "subprocess.Popen[bytes]") -> memory.Memory | None:
        """Wait for a process's end.

        Returns:
            The memory in use, if the process was ended for lack of memory; otherwise None.
        """
        while child.poll() is None:
            found = self._look()
            if found is not None and found.is_short:
                child.kill()
                child.wait()
                return found
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_SECONDS)
        return None

    def _judge(
        self, status: int, said: LastWord | None, short: memory.Memory | None
    ) -> LastWord | None:
        """Why a process ended, and whether a new process may succeed; None after a success."""
        if short is not None:
            return self._judge_memory(short)
        if status == 0:
            return None
        if self._stop.is_set():
            return LastWord("stopped", "It was asked to end, and did.")
        if status < 0:
            return LastWord("passing", f"The process was killed by {signal.Signals(-status).name}.")
        if said is None:  # it wrote no reason: a wrong flag, or a crash of the interpreter
            kind: last_word.Kind = "permanent" if status == 2 else "passing"
            said = LastWord(kind, f"The process ended with exit status {status}.")
        if said.is_unexpected and said == self._before:
            return LastWord("permanent", f"{said.error} (twice the same)")
        return said

    def _judge_memory(self, found: memory.Memory) -> LastWord:
        used, limit = found.used / 2**30, found.limit / 2**30
        text = (
            f"The step used {used:.2f} of the {limit:.2f} GiB of memory that its pod may use, and "
            "was ended before the kernel would have ended the pod. Give it more, such as "
            "PARAMS='memory=64Gi', or let it use less (docs/costs.md)."
        )
        # It is tried once more, because another process may have used the memory.
        return LastWord("permanent" if self._was_short else "passing", text)

    def _count(self, word: LastWord | None) -> None:
        now = time.monotonic()
        while self._failures and now - self._failures[0] > self._policy.window_s:
            self._failures.popleft()
        if word is not None:
            self._failures.append(now)

    def _pause(self) -> float:
        wait = self._policy.wait_s * 2.0 ** (len(self._failures) - 1)
        return min(wait, self._policy.most_wait_s)

    def _wait(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _say(self, state: tenacity.RetryCallState) -> None:
        word = state.outcome.result() if state.outcome else None
        assert word is not None
        logger.warning(
            "This may pass: %s The step is run again in %.0f s and continues where it was "
            "(%d of %d restarts).",
            word.error, self._pause(), len(self._failures), self._policy.retries,
        )  # fmt: skip


def _end_with_the_parent() -> None:
    """Make a new process end when the supervisor is killed (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(argv: tp.Sequence[str] | None = None) -> None:
    """Entry point of a pod.

    Exits with 0, 65 (permanent failure), 1 (passing failure), or 143 if it was stopped.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--signal"]:
        send(int(words[1]))
        return
    environment.take()
    log_to(Progress(quiet=True))
    ranks = 0
    if words[:1] == ["--ranks"]:
        ranks, words = int(words[1]), words[2:]
    command = words[1:] if words[:1] == ["--"] else _saev(words, ranks)
    supervisor = Supervisor(command, Policy.from_environment())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, supervisor.stop)
    word = supervisor.run()
    _keep(word, words)
    if word is None:
        return
    sys.stderr.write(closing_line(word, supervisor.n_runs) + "\n")
    sys.exit({"stopped": STOPPED, "permanent": PERMANENT, "passing": 1}[word.kind])


def _saev(words: tp.Sequence[str], ranks: int) -> list[str]:
    """A command of saev, in one process, or in several that torchrun starts.

    torchrun reads the other machines from the environment (PET_NNODES and others). It restarts
    nothing: when one rank ends, all ranks of all machines have to start again together.
    """
    if not ranks:
        return [sys.executable, "-m", "saev", *words]
    flags = [f"--nproc-per-node={ranks}", "--max-restarts=0"]
    flags += [f"--rdzv-conf=timeout={_MEET_SECONDS}"]
    return [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "saev", *words]


def closing_line(word: LastWord, n_runs: int) -> str:
    """The last line of a failed step's log."""
    error = " ".join(word.error.split())
    if word.kind == "stopped":
        return f"saev: stopped: {error} The same command continues from here."
    if word.kind == "permanent":
        return f"saev: permanent error: {error}"
    tries = "once" if n_runs == 1 else f"{n_runs} times"
    return (
        f"saev: passing error, tried {tries}: {error} Retry the run in Kubeflow or submit the "
        "dataset again; what is done is kept."
    )


def _keep(word: LastWord | None, words: tp.Sequence[str]) -> None:
    """Write the last word to storage, or delete an earlier one after a success."""
    flags = dict(itertools.pairwise(words))
    root, owner = flags.get("--root", ""), flags.get("--owner", "")
    if "--job" in flags:
        from saev.steps import jobs  # slow to import, and needed only here

        with contextlib.suppress(SaevError):  # the step has already reported a wrong URL
            job = jobs.read(flags["--job"])
            root, owner = job.root, job.owner
    if words[:1] != ["step"] or not root or not owner or (word and word.kind == "stopped"):
        return
    step, rest = words[1], list(words[2:])
    machine = os.environ.get("PET_NODE_RANK", "0")
    if machine != "0":  # each machine of a training has an own record
        rest += ["--machine", machine]
    if word is None:
        last_word.withdraw(root, owner, step, rest)
    else:
        last_word.keep(word, root, owner, step, rest)


def send(number: int, proc: Path = Path("/proc")) -> None:
    """Send a signal to the supervisors of this container.

    Args:
        number: the signal's number.
        proc: the folder of the proc file system.
    """
    for pid in _supervisors(proc):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _supervisors(proc: Path) -> collections.abc.Iterator[int]:
    own = _namespace(Path("/proc/self"))
    for folder in proc.iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            is_one = words[1:3] == [b"-m", MODULE.encode()] and b"--signal" not in words[3:4]
            # /proc may list the processes of other containers of the node, too.
            if is_one and (not own or _namespace(folder) in ("", own)):
                yield int(folder.name)


def _namespace(process: Path) -> str:
    """A process's PID namespace; "" if it cannot be read."""
    try:
        return str((process / "ns" / "pid").readlink())
    except OSError:
        return ""


if __name__ == "__main__":
    main()
