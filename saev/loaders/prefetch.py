"""Threads that complete jobs ahead of a consumer, in order."""

import contextlib
import logging
import os
import threading
import time
import typing as tp
from collections import deque
from collections.abc import Callable, Iterator

from saev.errors import SaevError

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 10.0
"""Seconds that closing waits for running reads. A stalled network read cannot be interrupted."""


class Job(tp.Protocol):
    """Work that is complete when all of its tasks have run, in any order and on any threads."""

    tasks: list[Callable[[], None]]


JobT = tp.TypeVar("JobT", bound=Job)


class Prefetcher(tp.Generic[JobT]):
    """Runs jobs ahead of one consumer, which takes them in order.

    At most ``depth`` jobs exist at a time. When the consumer releases the oldest job, one thread
    takes a new one from ``jobs``. The lock is taken once per task (a read of up to megabytes),
    never per row. An error on any thread ends all threads, and the consumer's next call raises it.

    Threads refer to this object, so its owner must close it; see :func:`weakref.finalize`.
    """

    def __init__(self, jobs: Iterator[JobT], *, n_threads: int, depth: int = 2):
        self._jobs = jobs
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._in_flight: deque[_InFlight[JobT]] = deque()
        self._tasks: deque[tuple[_InFlight[JobT], Callable[[], None]]] = deque()
        self._free = depth
        self._planning = False
        self._exhausted = False
        self._closed = False
        self._error: BaseException | None = None
        self.wait_s = 0.0
        """Seconds that the consumer has waited."""
        self._threads = [
            threading.Thread(target=self._work, name=f"saev-reader-{i}", daemon=True)
            for i in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    # --- The consumer's side ---------------------------------------------------------------

    def take(self) -> JobT | None:
        """Wait for the oldest job and return it; None after the last job. The caller must call
        :meth:`release` when it has used the job up.

        Raises:
            Exception: the error of a thread. All threads have ended.
        """
        if os.getpid() != self._pid:
            raise SaevError(
                "A loader was used in a forked process, where its reader threads do not exist. "
                "Make the loader (or its iterator) in the process that uses it."
            )
        start = time.perf_counter()
        with self._changed:
            self._changed.wait_for(self._decided)
            self.wait_s += time.perf_counter() - start
            if self._error is None:
                return self._in_flight[0].job if self._in_flight and not self._closed else None
        self.close()
        raise self._error

    def _decided(self) -> bool:
        if self._error is not None or self._closed:
            return True
        if self._in_flight:
            return not self._in_flight[0].pending
        return self._exhausted

    def check(self) -> None:
        """Raise the error of a thread, if there was one."""
        if self._error is not None:
            self.close()
            raise self._error

    def release(self) -> None:
        """Free the job that was taken."""
        with self._changed:
            self._in_flight.popleft()
            self._free += 1
            self._changed.notify_all()

    def fill(self) -> list[float]:
        """Share of finished tasks of each job in flight, oldest first."""
        with self._changed:
            return [1.0 - f.pending / max(1, f.n_tasks) for f in self._in_flight]

    def close(self) -> None:
        """End all threads and drop all jobs. May be called twice, from any thread."""
        self._closed = True
        if os.getpid() != self._pid:
            return
        me = threading.current_thread()
        if me not in self._threads:
            self._free_leaked_lock()
        with self._changed:
            self._tasks.clear()
            self._in_flight.clear()
            self._changed.notify_all()
        if me in self._threads:  # a finalizer, which the garbage collector may run on any thread
            return
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("A read still runs %.0f s after its loader closed", JOIN_TIMEOUT_S)

    def _free_leaked_lock(self) -> None:
        """Release the lock if an interrupted call still holds it.

        Ctrl-C can interrupt a call after it has taken the lock and before it has entered the block
        that releases it. A consumer that calls `close` must not hold the lock otherwise.
        """
        with contextlib.suppress(RuntimeError):  # raised when the lock is no longer held
            while True:
                self._changed.release()

    # --- The threads' side -----------------------------------------------------------------

    def _work(self) -> None:
        try:
            while True:
                step = self._next_step()
                if step is None:
                    return
                step()
                del step  # frees its window before the next wait
        except BaseException as err:
            with self._changed:
                if not self._closed:
                    self._error = err
                    self._closed = True
                self._changed.notify_all()

    def _next_step(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._closed:
                if self._tasks:
                    flight, task = self._tasks.popleft()
                    return lambda: self._run(flight, task)
                if self._free and not self._planning and not self._exhausted:
                    self._planning = True
                    return self._plan
                self._changed.wait()
        return None

    def _plan(self) -> None:
        job = next(self._jobs, None)
        tasks: list[Callable[[], None]] = []
        if job is not None:  # avoid a reference cycle between the job and its tasks
            tasks, job.tasks = job.tasks, tasks
        with self._changed:
            self._planning = False
            if job is None:
                self._exhausted = True
            elif not self._closed:
                self._free -= 1
                flight = _InFlight(job, len(tasks))
                self._in_flight.append(flight)
                self._tasks.extend((flight, task) for task in tasks)
            self._changed.notify_all()

    def _run(self, flight: "_InFlight[JobT]", task: Callable[[], None]) -> None:
        task()
        with self._changed:
            flight.pending -= 1
            if not flight.pending:
                self._changed.notify_all()


class _InFlight(tp.Generic[JobT]):
    """A job and the number of its unfinished tasks."""

    def __init__(self, job: JobT, n_tasks: int):
        self.job = job
        self.n_tasks = self.pending = n_tasks
