"""`make conformance`: whether a cluster does what saev needs, tried out, one line per check.

    python tests/conformance [--quick] [--only fault job …] [--skip schedule …] [--keep]
        [--minutes 60] [--side-by-side 3]

The cluster is the one that the client's settings reach (docs/cluster-client.md). Runs, pods and
files have a name of their own below the storage root and are deleted in the end.
"""

import argparse
import contextlib
import datetime
import io
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")

from conformance import facts, faults, installing, jobs, launching, mistakes, schedules, volumes  # noqa: E402
from conformance.cluster import Cluster  # noqa: E402
from conformance.table import Check, Failed, Table  # noqa: E402
from pipelines import doctor, settings  # noqa: E402
from pipelines.connect import connect  # noqa: E402
from saev import interrupts  # noqa: E402
from saev.console import Console  # noqa: E402
from saev.errors import ConfigError, SaevError  # noqa: E402


def say(line: str) -> None:
    """A line of the table."""
    print(line, flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the checks that take 20 minutes")
    parser.add_argument("--only", nargs="+", default=[], help="checks whose names begin so")
    parser.add_argument("--skip", nargs="+", default=[], help="all but those")
    parser.add_argument("--keep", action="store_true", help="leave everything there")
    parser.add_argument("--minutes", type=float, default=0.0, help="no check begins later; 60")
    parser.add_argument("--side-by-side", type=int, default=3, help="faults at a time")
    return parser.parse_args()


def main() -> int:
    """Returns the exit status: 0 if all is well, 1 if not, 2 if there is no cluster."""
    args = parse()
    minutes = args.minutes or (20 if args.quick else 60)
    started = time.monotonic()

    def wanted(name: str) -> bool:
        chosen = not args.only or name.startswith(tuple(args.only))
        return chosen and not (args.skip and name.startswith(tuple(args.skip)))

    table = Table(say, wanted, started + 60 * minutes)
    interrupts.unwind()
    try:
        found = settings.load({})
        if not found.image or not found.root:
            raise ConfigError(
                "No cluster is set up: image and root are missing. Write cluster.toml "
                "(cluster.example.toml), until `make doctor` is content."
            )
        with connect(found) as kfp:
            cluster = Cluster(kfp, table.stopped)
            for line in facts.lines(cluster):
                say(line)
            say(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {cluster.base}\n")
            try:
                make(table, cluster, args)
            finally:
                clean(cluster, keep=args.keep)
    except (SaevError, Failed) as err:
        say(f"conformance: error: {err}")
        return 2
    say(f"\n{table.summary} in {(time.monotonic() - started) / 60:.0f} min")
    return 0 if table.is_well else 1


def make(table: Table, cluster: Cluster, args: argparse.Namespace) -> None:
    """All checks that are asked for, in their order."""
    many, quick = args.side_by_side, args.quick
    table.run(*installing.checks(cluster), Check("doctor", lambda: examined(cluster)))
    table.run(*faults.checks(cluster), side_by_side=many)
    table.run(*mistakes.checks(cluster), side_by_side=many)
    runs = jobs.Jobs(cluster)
    table.run(*jobs.checks(runs, quick=quick))
    if not quick:
        table.run(*launching.checks(runs))
    table.run(Check("gc", runs.collected))
    table.run(*schedules.checks(cluster, quick=quick))
    if not quick:
        table.run(*volumes.checks(cluster))


def examined(cluster: Cluster) -> str:
    """The doctor's verdict."""
    text = io.StringIO()
    console = Console(file=text, markup=False, width=1000)
    is_well = doctor.examine(cluster.settings, console)
    lines = text.getvalue().splitlines()
    bad = [line.strip() for line in lines if line.startswith(("fail", "warn"))]
    if not is_well:
        raise Failed("; ".join(bad), "`make doctor` says it with the remedies.")
    return f"{len(lines)} lines, nothing failed" + (f"; {'; '.join(bad)}" if bad else "")


def clean(cluster: Cluster, *, keep: bool) -> None:
    """Take everything back, and say what is left."""
    if keep:
        say(f"Everything is left there (--keep): experiment {cluster.settings.experiment}.")
        return
    with contextlib.suppress(KeyboardInterrupt):
        for line in cluster.clean():
            say(f"left behind: {line}")


if __name__ == "__main__":
    sys.exit(main())
