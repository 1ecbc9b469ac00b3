"""The node's cache beside fsspec's own caches, over a real S3 server.

    python benchmarks/node_cache.py [--mb 512] [--server PATH]

Starts versitygw as benchmarks/loader_s3.py does. One process, and then two at a time, as two pods
of one node, read all blocks of all objects in a random order. They do so twice with one cache
folder, each time in new processes. Then a bit of the cache on the disk is flipped, and all is read
once more. Every block is compared with its checksum.

    none         without a cache
    node         saev.storage.NodeCache with room for everything
    node, half   the same with room for half
    blockcache   fsspec's cache of blocks
    filecache    fsspec's cache of whole objects

MB are 10⁶ bytes, of all processes together. The server's own counter tells what the store sent.
"""

import concurrent.futures
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np

from saev import storage

BLOCK = 4 << 20
"""Bytes of one read, as the loaders read."""
N_OBJECTS = 8
N_THREADS = 8
KINDS = ("none", "node", "node, half", "blockcache", "filecache")

Read = Callable[[int, int], bytes]
"""A block of an object: (object, offset)."""


def name(number: int) -> str:
    return f"{number:03d}.bin"


# --- One process of the node -----------------------------------------------------------------


def through_saev(root: str, cache: storage.NodeCache | None) -> Read:
    urls = (storage.join(root, name(i)) for i in range(N_OBJECTS))
    readers = [storage.RangeReader(url, cache=cache) for url in urls]
    return lambda i, offset: readers[i].read(offset, min(BLOCK, readers[i].size - offset))


def through_fsspec(kind: str, root: str, folder: str) -> Read:
    """One file per object, under a lock: fsspec's files are for one thread."""
    fs = fsspec.filesystem(kind, target_protocol="s3", cache_storage=folder)
    opening, locks = threading.Lock(), [threading.Lock() for _ in range(N_OBJECTS)]
    files: dict[int, object] = {}

    def read(i: int, offset: int) -> bytes:
        with locks[i]:
            if i not in files:
                place = storage.join(root, name(i)).removeprefix("s3://")
                with opening:
                    files[i] = fs.open(place, "rb", block_size=BLOCK)
            files[i].seek(offset)  # type: ignore[attr-defined]
            return bytes(files[i].read(BLOCK))  # type: ignore[attr-defined]

    return read


def work(kind: str, root: str, folder: str, max_bytes: int, sums: list[list[int]]) -> None:
    """Read every block once; print the seconds and the number of wrong blocks."""
    if kind.startswith("node"):
        read = through_saev(root, storage.NodeCache(folder, max_bytes))
    elif kind == "none":
        read = through_saev(root, None)
    else:
        read = through_fsspec(kind, root, folder)
    blocks = [(i, n) for i, of_object in enumerate(sums) for n in range(len(of_object))]
    np.random.default_rng().shuffle(blocks)

    def is_wrong(block: tuple[int, int]) -> bool:
        i, n = (int(x) for x in block)
        return storage.crc32c(read(i, n * BLOCK)) != sums[i][n]

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(N_THREADS) as pool:
        n_wrong = sum(pool.map(is_wrong, blocks))
    print(json.dumps([time.perf_counter() - start, n_wrong]))


# --- The node ----------------------------------------------------------------------------------


def sent(server: int) -> float:
    """MB that the server has written so far."""
    lines = Path(f"/proc/{server}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar")) / 1e6


def on_disk(folder: str) -> float:
    """MB of a folder's files."""
    return sum(p.stat().st_blocks * 512 for p in Path(folder).rglob("*") if p.is_file()) / 1e6


def flip(folder: str) -> bool:
    """Flip a bit in the middle of the largest file, as a disk may."""
    files = sorted(
        (p for p in Path(folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    if not files:
        return False
    with files[-1].open("r+b") as file:
        file.seek(files[-1].stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    return True


class FailedError(Exception):
    """A process ended with an error."""


def read_all(
    kind: str, n: int, root: str, folder: str, max_bytes: int, sums: Path
) -> tuple[float, int]:
    """All processes of the node at once: the seconds of the slowest, and the wrong blocks."""
    command = [sys.executable, __file__, "--worker", kind, root, folder, str(max_bytes), str(sums)]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(n)
    ]
    outs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise FailedError(kind)
    found = [json.loads(out) for out in outs]
    return max(seconds for seconds, _ in found), sum(n for _, n in found)


def trial(
    kind: str, n: int, root: str, size: int, sums: Path, server: int
) -> dict[str, tuple[float, str]]:
    """Values and units by name. Ends at the first reading that fails or gives wrong blocks."""
    found: dict[str, tuple[float, str]] = {}
    max_bytes = size // 2 if kind == "node, half" else 2 * size
    with tempfile.TemporaryDirectory(prefix="saev-bench-cache-") as folder:
        try:
            for number in ("first", "second"):
                before = sent(server)
                seconds, n_wrong = read_all(kind, n, root, folder, max_bytes, sums)
                found[f"{number} reading: wrong blocks"] = n_wrong, ""
                if n_wrong:
                    return found
                found[f"{number} reading"] = n * size / 1e6 / seconds, "MB/s"
                found[f"{number} reading: sent by the store"] = sent(server) - before, "MB"
            found["on the disk"] = on_disk(folder), "MB"
            if flip(folder):
                _, n_wrong = read_all(kind, n, root, folder, max_bytes, sums)
                found["after a flipped bit: wrong blocks"] = n_wrong, ""
        except FailedError:
            found["readings that failed"] = 1, ""
    return found


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, root, folder, max_bytes, sums = sys.argv[2:]
        work(kind, root, folder, int(max_bytes), json.loads(Path(sums).read_text()))
        return
    import harness  # imports torch, which the processes of the node do without
    import loader_s3

    parser = harness.parser(__doc__ or "", repeats=3)
    parser.add_argument("--mb", type=float, default=512, help="size of all objects")
    parser.add_argument("--server", default="", help="the versitygw to start")
    args = parser.parse_args()
    if args.small:
        args.mb, args.repeats = min(args.mb, 64), 1
    report = harness.Report(harness.invocation(), args.json)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(loader_s3.serving(loader_s3.find_server(args.server)))
        root = f"s3://{loader_s3.BUCKET}/node-cache"
        sums, size = write(root, args.mb)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "sums.json"
        scratch.write_text(json.dumps(sums))
        rows: dict[str, tuple[list[float], str]] = {}
        for _ in range(args.repeats):
            for kind in KINDS:
                for n in (1, 2):
                    found = trial(kind, n, root, size, scratch, server)
                    for what, (value, unit) in found.items():
                        title = f"{kind}, {n} process{'es' * (n > 1)}: {what}"
                        rows.setdefault(title, ([], unit))[0].append(value)
        for what, (values, unit) in rows.items():
            report.add(what, values, unit)
    report.close()


def write(root: str, mb: float) -> tuple[list[list[int]], int]:
    """Objects of noise; returns the checksum of each block, and the bytes of all."""
    n_bytes = max(1, round(mb * 1e6 / N_OBJECTS / BLOCK)) * BLOCK
    sums = []
    for i in range(N_OBJECTS):
        data = np.random.default_rng(i).bytes(n_bytes)
        storage.write_bytes(storage.join(root, name(i)), data)
        sums.append([storage.crc32c(data[n : n + BLOCK]) for n in range(0, n_bytes, BLOCK)])
    return sums, n_bytes * N_OBJECTS


if __name__ == "__main__":
    main()
