"""The loaders from a real S3 server, beside plain clients of the same server.

    python benchmarks/loader_s3.py [--mb 2500] [--server PATH | --root s3://bucket/folder]

Starts versitygw (from --server, $SAEV_E2E_BIN or .cache/go-bin: `make e2e-servers`) on this
machine, writes a folder of activations to it and reads all of it once. Then, in turn: plain
parallel GETs of blocks as the loaders read them into memory that is used again, by three clients,
and an epoch of each loader. All with --streams connections. The server shares the machine's cores,
so what a client spends is taken from the server: shares of the fastest client say what the loaders
add. An epoch of a loader is timed between two others: as much was read ahead before it as after.

MB are 10⁶ bytes of the layer, class tokens included.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import http.client
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import typing as tp
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import activations
import botocore.session
import fsspec
import harness
import numpy as np
import obstore
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from obstore.store import S3Store

from saev import storage
from saev.config import LoaderConfig
from saev.loaders import OrderedLoader, ShuffledLoader
from saev.shards import Shards

BUCKET = "saev-bench"
BINARY = "versitygw-*/versitygw"
SHARE = 0.8
"""What the loaders should reach of the fastest client."""
BLOCK = 4 << 20
"""Bytes of one request of the plain clients; blocks of the loaders are at most so large."""

Get = Callable[[int, int, int, memoryview], None]
"""Fill memory with a range of a shard: (shard, start, stop, buffer)."""


def find_server(given: str) -> Path:
    """The program to start."""
    folder = os.environ.get("SAEV_E2E_BIN", "")
    cached = sorted((Path(__file__).parents[1] / ".cache" / "go-bin").glob(BINARY))
    for path in (Path(given or "-"), Path(folder or "-") / "versitygw", *cached[-1:]):
        if path.is_file():
            return path
    sys.exit("There is no versitygw: `make e2e-servers` builds it, --server says where it is.")


@contextlib.contextmanager
def serving(program: Path) -> Iterator[int]:
    """The server with an empty bucket, and its process id; the environment has its address."""
    with tempfile.TemporaryDirectory(prefix="saev-bench-s3-") as scratch:
        folders = [Path(scratch) / name for name in ("metadata", "objects")]
        for folder in folders:
            folder.mkdir()
        address = "127.0.0.1:17070"
        os.environ.update(
            AWS_ENDPOINT_URL=f"http://{address}",
            AWS_ACCESS_KEY_ID="benchmark",
            AWS_SECRET_ACCESS_KEY="benchmark-only",
            AWS_DEFAULT_REGION="us-east-1",
        )
        command = [program, "--quiet", "--keep-alive", "--port", address, "posix"]
        command += ["--sidecar", folders[0], folders[1]]
        env = {"ROOT_ACCESS_KEY": "benchmark", "ROOT_SECRET_KEY": "benchmark-only"}
        with (Path(scratch) / "log").open("wb") as log:
            server = subprocess.Popen(
                [str(word) for word in command], env=env, stdout=log, stderr=log
            )
        try:
            for _ in range(100):
                with contextlib.suppress(BotoCoreError):  # it does not listen yet
                    client().create_bucket(Bucket=BUCKET)
                    break
                time.sleep(0.1)
            yield server.pid
        finally:
            server.terminate()
            server.wait()


def client() -> tp.Any:
    """boto's client of the server."""
    config = Config(signature_version="s3v4", s3={"addressing_style": "path"})
    return botocore.session.get_session().create_client("s3", config=config)


# --- Plain clients -------------------------------------------------------------------------


def http_client(bucket: str, keys: list[str]) -> Get:
    """http.client over a connection per thread, with URLs signed before, straight into memory."""
    boto = client()
    paths = []
    for key in keys:
        params = {"Bucket": bucket, "Key": key}
        url = urllib.parse.urlsplit(boto.generate_presigned_url("get_object", Params=params))
        paths.append(f"{url.path}?{url.query}")
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    local = threading.local()

    def get(shard: int, start: int, stop: int, buffer: memoryview) -> None:
        if not hasattr(local, "connection"):
            local.connection = kind(url.netloc)
        local.connection.request(
            "GET", paths[shard], headers={"Range": f"bytes={start}-{stop - 1}"}
        )
        answer, done = local.connection.getresponse(), 0
        if answer.status != 206:
            raise RuntimeError(f"status {answer.status}: {answer.read()!r}")
        while done < stop - start:
            done += answer.readinto(buffer[done : stop - start])
        answer.read()

    return get


def obstore_client(bucket: str, keys: list[str]) -> Get:
    """obstore's get_range, and a copy."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    where: tp.Any = {"endpoint": endpoint} if endpoint else {}
    store = S3Store(bucket, client_options={"allow_http": True}, **where)

    def get(shard: int, start: int, stop: int, buffer: memoryview) -> None:
        data = obstore.get_range(store, keys[shard], start=start, end=stop)
        buffer[: stop - start] = memoryview(data)

    return get


def s3fs_client(bucket: str, keys: list[str]) -> Get:
    """s3fs's cat_file, and a copy."""
    fs, _ = fsspec.core.url_to_fs(f"s3://{bucket}")

    def get(shard: int, start: int, stop: int, buffer: memoryview) -> None:
        buffer[: stop - start] = fs.cat_file(f"{bucket}/{keys[shard]}", start=start, end=stop)

    return get


def gets(get: Get, shards: Shards, n_streams: int) -> float:
    """MB/s of reading the layer in blocks of whole examples, in a random order."""
    index, ranges = shards.layer_index(None), []
    for shard, layout in enumerate(shards.layouts):
        step = max(1, BLOCK // layout.row_bytes)
        for first in range(0, layout.n_examples, step):
            n = min(step, layout.n_examples - first)
            start = layout.offset(index, first)
            ranges.append((shard, start, start + n * layout.row_bytes))
    np.random.default_rng(0).shuffle(ranges)
    size = max(stop - start for _, start, stop in ranges)
    buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    for _ in range(n_streams):
        buffers.put(memoryview(bytearray(b"\1" * size)))  # mapped before the clock starts

    def one(place: tp.Sequence[int]) -> None:
        buffer = buffers.get()
        get(int(place[0]), int(place[1]), int(place[2]), buffer)
        buffers.put(buffer)

    with concurrent.futures.ThreadPoolExecutor(n_streams) as pool:
        start = time.perf_counter()
        list(pool.map(one, ranges))
        seconds = time.perf_counter() - start
    return sum(int(r[2]) - int(r[1]) for r in ranges) / 1e6 / seconds


# --- Loaders -------------------------------------------------------------------------------


def epoch(loader: ShuffledLoader | OrderedLoader, read_mb: float) -> float:
    """MB/s of the second of three epochs."""
    rows, ends = 0, []
    loader.reset()
    for batch in loader:
        rows += len(batch.act)
        if rows == loader.n_tokens * (len(ends) + 1):
            ends.append(time.perf_counter())
            if len(ends) == 2:
                break
    return read_mb / (ends[1] - ends[0])


def measure(url: str, args: argparse.Namespace, report: harness.Report) -> None:
    bucket, _, folder = url.removeprefix("s3://").partition("/")
    with Shards.open(url) as shards:
        keys = [f"{folder}/{info.name}" for info in shards.infos]
        read_mb = sum(x.n_examples * x.row_bytes for x in shards.layouts) / 1e6
        cfg = LoaderConfig(
            tokens="all", buffer_mb=args.buffer_mb, n_threads=args.streams, layer=None
        )
        clients = {
            "http.client": http_client(bucket, keys),
            "obstore": obstore_client(bucket, keys),
            "s3fs": s3fs_client(bucket, keys),
        }
        runs: dict[str, Callable[[], float]] = {
            f"plain GETs, {name}": lambda get=get: gets(get, shards, args.streams)  # type: ignore[misc]
            for name, get in clients.items()
        }
        shuffled = ShuffledLoader(shards, cfg, args.batch_size, epochs=3)
        ordered = OrderedLoader(
            shards, cfg, args.batch_size, epochs=3, n_threads=args.streams, buffer_mb=128
        )
        loaders = {"shuffled loader": shuffled, "ordered loader": ordered}
        for name, loader in loaders.items():
            runs[name] = lambda loader=loader: epoch(loader, read_mb)  # type: ignore[misc]
        found = harness.alternate(runs, args.repeats)
    for name, values in found.items():
        report.add(name, values, "MB/s")
    plain = [values for name, values in found.items() if name.startswith("plain")]
    fastest = max(plain, key=statistics.median)
    for name in loaders:
        what = f"{name}, share of the fastest client"
        report.share(what, found[name], fastest, at_least=SHARE)


def main() -> None:
    parser = harness.parser(__doc__ or "", repeats=7)
    parser.add_argument("--mb", type=float, default=2500, help="size of the layer")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--streams", type=int, default=8, help="connections; reader threads")
    parser.add_argument("--batch-size", type=int, default=16_384)
    parser.add_argument("--buffer-mb", type=float, default=2048, help="of the shuffled loader")
    parser.add_argument("--server", default="", help="the versitygw to start")
    parser.add_argument(
        "--root", default="", help="s3:// URL on a server that runs, reached as AWS_… say"
    )
    args = parser.parse_args()
    if args.small:
        args.mb, args.repeats, args.buffer_mb = min(args.mb, 256), 2, 128
    report = harness.Report(harness.invocation(), args.json)
    with contextlib.ExitStack() as stack:
        root = args.root
        if not root:
            stack.enter_context(serving(find_server(args.server)))
            root = f"s3://{BUCKET}/{datetime.date.today().isoformat()}"
        url = activations.write(
            root, activations.Folder(args.mb, d_model=args.d_model, content_tokens=196)
        )
        measure(url, args, report)
        storage.delete(url, recursive=True)
    report.close()


if __name__ == "__main__":
    main()
