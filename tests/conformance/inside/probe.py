"""The first step of the probe: meets a fault when it starts first, and succeeds afterwards.

python -c THIS FAULT FOLDER OUT. FOLDER, on the storage, counts the starts, those of other pods
too.
"""

import mmap
import os
import signal
import socket
import sys
import time

from saev import storage
from saev.errors import ConfigError, StorageError
from saev.steps import last_word

WAIT_SECONDS = 240


def wait(folder: str) -> None:
    """Until the fault comes from outside. Asked to end, it writes what training would write."""

    def stop(*_: object) -> None:
        storage.write_json(storage.join(folder, "stopped.json"), {"pod": socket.gethostname()})
        print("probe: asked to end, wrote where it is", flush=True)
        sys.exit(1)

    signal.signal(signal.SIGTERM, stop)
    print("probe: waits", flush=True)
    time.sleep(WAIT_SECONDS)
    print("probe: nothing came", flush=True)


def fill(chunk: int, pause: float) -> None:
    """Use memory until somebody ends it."""
    held = []
    for _ in range(10_000):
        held.append(mmap.mmap(-1, chunk, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE))
        time.sleep(pause)


def fail(error: Exception) -> None:
    """As `saev` does."""
    last_word.tell(error)
    print(f"saev: error: {error}", file=sys.stderr, flush=True)
    sys.exit(1)


def meet(fault: str, folder: str) -> None:
    """The fault."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "container":  # its processes, as where memory's end is the whole container's
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(10)
    elif fault == "memory":
        fill(8 << 20, 0.05)
    elif fault == "memory at once":
        for _ in range(3):
            os.fork()
        fill(1 << 30, 0.0)
    elif fault == "passing":
        error = StorageError("The store is away. Try again.")
        error.passing = True
        fail(error)
    elif fault == "wait":
        wait(folder)
    elif fault != "none":
        raise SystemExit(f"no such fault: {fault}")


def main() -> None:
    fault, folder, out = sys.argv[1:]
    n = len(storage.list_dir(folder, missing_ok=True)) + 1
    storage.write_json(storage.join(folder, f"start-{n}.json"), {"pod": socket.gethostname()})
    print(f"probe: start {n} in {socket.gethostname()}", flush=True)
    if fault == "permanent":
        fail(ConfigError("A mistake in the config. Correct it."))
    if n == 1:
        meet(fault, folder)
    storage.write_text(out, f"{n}")
    print("probe: done", flush=True)


main()
