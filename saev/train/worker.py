"""One rank of a training that :mod:`saev.train.launch` started: `python -m saev.train.worker`."""

import json
import os
import signal
import sys
import threading
import traceback
import typing as tp

import torch.distributed as dist

from saev import storage
from saev.errors import SaevError
from saev.progress import Progress, log_to
from saev.torchrun import Place
from saev.train import team
from saev.train.members import Group
from saev.train.signals import EXIT_SIGTERM
from saev.train.stage import train_group

_LONGEST = 20_000
"""Most characters of a traceback. A pipe holds 64 KiB until it is read."""


def main() -> None:
    """Read the job from standard input, do it, and say how it ended on standard output."""
    report = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to standard error
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    status, said = 0, {}
    try:
        _train(job)
    except SaevError as err:
        passing = "yes" if storage.is_passing(err) else ""
        status, said = 1, {"kind": type(err).__name__, "message": str(err), "passing": passing}
    except (SystemExit, KeyboardInterrupt):
        status = EXIT_SIGTERM
    except BaseException as err:
        words = f"{type(err).__name__}: {err}"[:_LONGEST]
        status, said = 1, {"message": words, "trace": traceback.format_exc()[-_LONGEST:]}
    if said:
        os.write(report, json.dumps(said).encode())
    sys.stderr.flush()
    os._exit(status)  # a usual exit waits for threads, which may wait for ranks that have ended


def _train(job: dict[str, tp.Any]) -> None:
    place = Place(job["rank"], job["size"], job["rank"])
    progress = Progress(quiet=job["quiet"] or place.rank > 0, slot=job["place"])
    log_to(progress, rank=place.rank)
    group = Group.from_item(job["item"])
    store = dist.TCPStore("127.0.0.1", job["port"], is_master=False, timeout=team.TIMEOUT)
    mine = team.join(place, group.members[0].config, store)
    signal.signal(signal.SIGTERM, _terminate)
    with progress:
        train_group(group, mine, progress)
    team.leave()


def _terminate(signum: int, frame: object) -> tp.NoReturn:
    raise SystemExit(EXIT_SIGTERM)


def _end_with_parent() -> None:
    """End this process when its parent ends, even by SIGKILL: that closes standard input."""
    while sys.stdin.buffer.readline():
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
