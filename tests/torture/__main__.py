"""`make torture`: storage that misbehaves, and processes that are killed, counted.

    python tests/torture [--kills 30] [--runs 3] [--share 0.3] [--objects 60] [--seed 0]
        [--only shards run …] [--skip bits]

Needs the S3 server that `make e2e-servers` builds; without it moto takes its place.
"""

import argparse
import contextlib
import logging
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "e2e")]

os.environ.setdefault("SAEV_PATIENCE_S", "300")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import s3_server  # noqa: E402
from forker import Forker  # noqa: E402

from torture import stages as torture  # noqa: E402


@contextlib.contextmanager
def server() -> Iterator[tuple[str, str]]:
    """URL of an empty bucket, and the name of the server."""
    import compiled
    import servers

    try:
        compiled.find(compiled.VERSITYGW)
    except compiled.Unavailable:
        with s3_server.running() as bucket:
            yield bucket, "moto"
        return
    with servers.s3_server() as found:
        os.environ.update(found.env)
        yield found.bucket, f"versitygw {compiled.VERSITYGW.version}"


def run(args: argparse.Namespace) -> list[torture.Count]:
    """Everything that was asked for; tells each count as it comes."""
    counts: list[torture.Count] = []
    rng = random.Random(args.seed)

    def count(found: torture.Count) -> None:
        counts.append(found)
        print(f"{time.strftime('%H:%M:%S')} {found}", file=sys.stderr, flush=True)

    wanted = [name for name in (*torture.STAGES, "objects") if not args.only or name in args.only]
    wanted_stages = [stage for stage in torture.STAGES if stage in wanted]
    with tempfile.TemporaryDirectory() as name, server() as (bucket, kind), Forker() as forker:
        print(f"S3 server: {kind}.", file=sys.stderr, flush=True)
        if "objects" in wanted:
            count(torture.write_objects(f"{bucket}/objects", args.objects, args.share, rng))
        for where, root in (("S3", f"{bucket}/stages"), ("disk", f"{name}/stages")):
            if not wanted_stages:
                break
            folder = Path(name) / f"configs-{where}"
            folder.mkdir()
            stages = torture.Stages(forker, root, folder, wanted_stages)
            for stage in wanted_stages:
                if where == "S3":
                    broken = torture.break_requests(
                        stages, stage, where, args.runs, args.share, rng
                    )
                    count(broken)
                count(torture.kill(stages, stage, where, args.kills, rng))
    return counts


def bits() -> int:
    """Flipped bits in stored files, if that driver is there."""
    script = HERE / "bits.py"
    if not script.exists():
        return 0
    import subprocess

    return subprocess.run([sys.executable, str(script)], check=False).returncode


def main() -> int:
    """Run, print a table, and say by the status whether all was well."""
    parser = argparse.ArgumentParser(prog="torture", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs per stage and storage")
    parser.add_argument("--runs", type=int, default=3, help="runs per stage with broken requests")
    parser.add_argument("--share", type=float, default=0.3, help="of requests that are broken")
    parser.add_argument("--objects", type=int, default=60, help="that 24 threads write twice")
    parser.add_argument("--seed", type=int, default=0, help="of moments and faults")
    parser.add_argument(
        "--only", nargs="*", choices=[*torture.STAGES, "objects", "bits"], default=[]
    )
    parser.add_argument("--skip", nargs="*", choices=["bits"], default=[])
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    started = time.time()
    counts = run(args) if args.only != ["bits"] else []
    print(torture.describe(counts))
    print(
        f"\n{time.strftime('%Y-%m-%d')}, {(time.time() - started) / 60:.0f} minutes on "
        f"{os.cpu_count()} cores, Python {platform.python_version()}: {' '.join(sys.argv[1:])}"
    )
    status = int(not all(c.is_good for c in counts))
    if "bits" not in args.skip and (not args.only or "bits" in args.only):
        status = bits() or status
    return status


if __name__ == "__main__":
    sys.exit(main())
