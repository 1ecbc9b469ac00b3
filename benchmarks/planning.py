"""What it takes to plan a recording of very many images, and to open a folder of very many shards.

    python benchmarks/planning.py --root /tmp      # 8 minutes; needs a million inodes
    python benchmarks/planning.py --small          # a trial

Planning lists the images, makes their digest and the work items; no image is read. The images are
links to a few small files, in a thousand folders, once on the disk and once in a bucket. For the
bucket, a small server answers ListObjectsV2 with keys that it makes up. The model is timm's
smallest, so that the numbers are those of the listing: the libraries alone take 0.8 GB. Each
measurement is in a process of its own. `Shards.open` reads shards.json, the listing and the
metadata of a folder whose shards are links to one file.
"""

import argparse
import bisect
import contextlib
import http.server
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from harness import Memory, Report, invocation, parser

from saev import storage
from saev.config import ShardsConfig
from saev.shards import Shards, extract, protocol
from saev.shards.protocol import shard_name

FOLDERS = 1000
_LINKS = 30_000  # links to one file; ext4 allows 65,000
BUCKET = "planning"


def key(i: int) -> str:
    """A key in the form of ImageNet's."""
    return f"n{i % FOLDERS:08d}/n{i % FOLDERS:08d}_{i:07d}.JPEG"


def write_links(root: Path, n: int) -> None:
    """Write so many images, which are links and take no space but their names."""
    for folder in range(min(n, FOLDERS)):
        (root / "images" / f"n{folder:08d}").mkdir(parents=True)
    for i in range(n):
        file = root / f"file{i // _LINKS}"
        if not i % _LINKS:
            file.write_bytes(b"x" * 100)
        os.link(file, root / "images" / key(i))


# --- A bucket ------------------------------------------------------------------------------


def serve(n: int) -> None:
    """Answer ListObjectsV2 for n keys; says its port on the first line."""
    keys = sorted(f"images/{key(i)}" for i in range(n))

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(404, b"")

        def do_GET(self) -> None:
            query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
            found = page(keys, query) if "list-type" in query else b""
            self.answer(200 if found else 404, found)

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def page(keys: list[str], query: dict[str, str]) -> bytes:
    """One answer. With a delimiter it is the last: the client only asks if anything is there."""
    prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
    first = bisect.bisect_right(keys, after) if after else bisect.bisect_left(keys, prefix)
    most = int(query.get("max-keys", 1000))
    found = [k for k in keys[first : first + most] if k.startswith(prefix)]
    more = first + most < len(keys) and len(found) == most and "delimiter" not in query
    rows = "".join(
        f"<Contents><Key>{k}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        "<ETag>&quot;0123456789abcdef0123456789abcdef&quot;</ETag><Size>100</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
        for k in found
    )
    token = f"<NextContinuationToken>{found[-1]}</NextContinuationToken>" if more else ""
    return (
        f"<?xml version='1.0' encoding='UTF-8'?><ListBucketResult><Name>{BUCKET}</Name>"
        f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{rows}</ListBucketResult>"
    ).encode()


@contextlib.contextmanager
def bucket(n: int) -> Iterator[dict[str, str]]:
    """Environment in which s3://BUCKET/images holds n images."""
    command = [sys.executable, __file__, "--serve", str(n)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        try:
            yield {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
                "AWS_DEFAULT_REGION": "us-east-1",
            }  # fmt: skip
        finally:
            server.kill()


# --- Measurements --------------------------------------------------------------------------


def plan(url: str, root: str) -> dict[str, float]:
    """Plan a recording in this process."""
    cfg = ShardsConfig.from_dict(
        {
            "family": "timm", "ckpt": "test_vit/random", "layers": [-1], "device": "cpu",
            "shards_root": root, "data": {"kind": "img-folder", "root": url},
        }
    )  # fmt: skip
    recording = extract.Recording(cfg)
    _ = recording.model.weights
    before, memory = time.process_time(), Memory()
    items = recording.items()
    n = round(sum(item.cost for item in items))
    status = Path("/proc/self/status").read_text()
    peak = float(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return {
        "n": n, "s": time.process_time() - before, "mb": memory.added(), "peak_mb": peak,
        "total_s": time.process_time(),
    }  # fmt: skip


def planned(url: str, root: str, environment: dict[str, str]) -> dict[str, float]:
    """:func:`plan` in a process of its own."""
    command = [sys.executable, __file__, "--plan", url, "--root", root]
    ran = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def write_shards(root: Path, n: int) -> str:
    """A folder of n shards of one image each."""
    cfg = ShardsConfig.from_dict(
        {
            "family": "timm", "ckpt": "test_vit/random", "layers": [-1], "device": "cpu",
            "image_size": 16, "cls_token": False, "max_tokens_per_shard": 1,
            "shards_root": str(root / "few"), "data": {"kind": "fake-img", "n_examples": 1},
        }
    )  # fmt: skip
    url = extract.run(cfg)
    (row,) = storage.read_json(storage.join(url, protocol.SHARDS))
    rows = json.dumps([{**row, "name": shard_name(i)} for i in range(n)]).encode()
    storage.write_bytes(storage.join(url, protocol.SHARDS), rows)
    files = dict(storage.Folder.open(url, protocol.FILES).files or {})
    files[protocol.SHARDS] = storage.Listed.of(rows)
    storage.write_json(storage.join(url, protocol.FILES), storage.seal({}, files))
    for i in range(1, n):
        source = Path(url) / f"of{i // _LINKS}"
        if i % _LINKS == 1 or not source.exists():
            source.write_bytes((Path(url) / shard_name(0)).read_bytes())
        os.link(source, Path(url) / shard_name(i))
    return url


def opened(url: str, n: int) -> tuple[float, float]:
    """Seconds until the folder is open, and of processor time."""
    start, before = time.perf_counter(), time.process_time()
    with Shards.open(url) as shards:
        assert len(shards.infos) == n
    return time.perf_counter() - start, time.process_time() - before


def main() -> None:
    """Measure and report."""
    made = parser(__doc__ or "", repeats=3)
    made.add_argument("--root", default=tempfile.gettempdir(), help="where the links are made")
    made.add_argument("--n-images", type=int, default=1_000_000)
    made.add_argument("--n-shards", type=int, default=100_000)
    made.add_argument("--plan", default="", help=argparse.SUPPRESS)
    made.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.serve:
        serve(args.serve)
    if args.plan:
        print(json.dumps(plan(args.plan, args.root)))
        return
    n = 3000 if args.small else args.n_images
    n_shards = 300 if args.small else args.n_shards
    report = Report(invocation(), args.json)
    with tempfile.TemporaryDirectory(prefix="saev-bench-", dir=args.root) as folder:
        write_links(Path(folder), n)
        with bucket(n) as environment:
            places = {
                "on a disk": (str(Path(folder) / "images"), {}),
                "in a bucket": (f"s3://{BUCKET}/images", environment),
            }
            for where, (url, variables) in places.items():
                found = [planned(url, folder, variables) for _ in range(args.repeats)]
                assert all(one["n"] == n for one in found)
                what = f"planning {n:,} images {where}"
                report.add(f"{what}: processor time", [o["total_s"] for o in found], "s",
                           at_most=None if args.small else 60)  # fmt: skip
                report.add(f"{what}: memory of the list", [o["mb"] for o in found], "MB")
                report.add(f"{what}: memory of all", [o["peak_mb"] for o in found], "MB",
                           at_most=None if args.small else 1000)  # fmt: skip
        url = write_shards(Path(folder), n_shards)
        took = [opened(url, n_shards) for _ in range(args.repeats)]
        what = f"Shards.open, {n_shards:,} shards"
        report.add(what, [wall for wall, _ in took], "s", at_most=None if args.small else 2)
        report.add(f"{what}: processor time", [busy for _, busy in took], "s")
    report.close()


if __name__ == "__main__":
    main()
