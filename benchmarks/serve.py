"""The live explorer with very many latents and images: memory, search, and many users at once.

    python benchmarks/serve.py            # 16,384 latents × 1,000,000 images; ten minutes, 2 GB
    python benchmarks/serve.py --small    # a trial
    python benchmarks/serve.py --s3       # the same through an S3 server, with 20 ms latency

Tables of one SAE are made, with as many rows as inference would write: 28 images of each latent,
the classes that latents find, and 20 latents of each image. `saev serve` then runs in a process of
its own. Twenty clients look at latents, images and classes, scroll and search, each with a pause of
0.1 to 0.5 s before each request. Two more compare groups of images without a pause. Times are those
of whole answers. A browser, started three times, opens the list, scrolls, searches, and opens a
latent; its times are those of benchmarks/explorer.py. All share the machine with the server.

--s3 needs versitygw (`make e2e-servers`, or --server PATH). A proxy holds each request back for 20
ms. Memory is the largest resident set of the server's process (VmHWM).
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing as tp
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from browsing import FIRST, SCROLL, chromium, picture, timed, typed
from harness import Report, invocation, parser
from loader_s3 import find_server

from saev import storage
from saev.config import LoaderConfig, SaeConfig, TopK, TrainConfig
from saev.config.train import RUN
from saev.inference import files
from saev.parquet import TABLES, Index, TableWriter, schema
from saev.visuals.files import DONE, REPORT
from saev.visuals.stored import EXAMPLES, GROUP_ROWS, IMAGE_SIZE, N_NAMED

N_PICTURES = 20_000
"""Images whose pictures are stored, as `saev visuals` stores them by default."""
GRID, N_CLASSES, LATENTS_PER_IMAGE, N_PATCHES = 16, 1000, 20, 40
N_TOP, N_SPREAD = 16, 12
CLIENTS, COMPUTERS = 20, 2
MEMORY_MB = 1024
LATENCY_S = 0.020
BUCKET = "saev-bench"


class Size(tp.NamedTuple):
    """What is generated."""

    latents: int
    images: int
    seconds: float
    """How long the clients work."""


# --- A root --------------------------------------------------------------------------------------


def make_root(root: str, size: Size) -> str:
    """Write a root with one SAE. Returns the key of it."""
    rng = np.random.default_rng(0)
    cfg = TrainConfig(
        runs_root=storage.join(root, "runs"), n_train=1_000_000,
        sae=SaeConfig(d_model=384, d_sae=size.latents, activation=TopK(top_k=32)),
        train_data=LoaderConfig(shards=storage.join(root, "shards", "0123456789abcdef")),
    )  # fmt: skip
    run = storage.join(root, "runs", "0123456789ab")
    storage.write_json(storage.join(run, "config.json"), cfg.to_dict())
    listed = {"config.json": _listed(run, "config.json")}
    storage.write_json(storage.join(run, RUN), storage.seal({"run_id": "0123456789ab"}, listed))
    inference = storage.join(run, "inference", "fedcba9876543210")
    made = _Tables(inference, size, rng)
    listed = dict(made.write())
    metrics = {
        "d_model": 384, "d_sae": size.latents, "content_tokens": GRID**2,
        "n_tokens": size.images * GRID**2, "n_examples": size.images, "layer": 10,
        "shards_hash": "0123456789abcdef", "tokens": "content", "normalized_mse": 0.2, "l0": 32.0,
        "n_dead": 0,
    }  # fmt: skip
    storage.write_json(storage.join(inference, files.METRICS), storage.seal(metrics, listed))
    write_pictures(storage.join(inference, REPORT), shown(size), rng)
    return "0123456789ab.fedcba9876543210"


def _listed(folder: str, name: str) -> storage.Listed:
    return storage.Listed.of(storage.read_bytes(storage.join(folder, name)))


def shown(size: Size) -> np.ndarray:
    """The images that are among the strongest of latents, and have a picture."""
    n = min(N_PICTURES, size.images)
    return np.sort(np.random.default_rng(1).permutation(size.images)[:n])


def write_pictures(folder: str, examples: np.ndarray, rng: np.random.Generator) -> None:
    """Store pictures as `saev visuals` does: of 256 and of 64 pixels, 64 different ones."""
    some = {side: [picture(rng, side) for _ in range(64)] for side in (256, 64)}
    entries, listed = {}, {}
    for name, columns, side, column in (
        (schema.PICTURES, schema.pictures(), 256, "picture"),
        (schema.THUMBS, schema.thumbs(), 64, "thumb"),
    ):
        with TableWriter(folder, name, columns, "number", GROUP_ROWS[name]) as writer:
            number = np.arange(len(examples))
            data = [some[side][i % 64] for i in range(len(examples))]
            sizes = {"width": np.full(len(examples), side), "height": np.full(len(examples), side)}
            writer.write({"number": number, "example": examples, column: data, **sizes})
            entries[name] = writer.close()
        listed |= writer.listed
    facts = {EXAMPLES: examples.tolist(), N_NAMED: len(examples), IMAGE_SIZE: 256}
    storage.write_json(storage.join(folder, TABLES), Index(entries, facts).to_dict())
    listed[TABLES] = _listed(folder, TABLES)
    storage.write_json(storage.join(folder, DONE), storage.seal({}, listed))


class _Tables:
    """The tables of an SAE, as `saev inference` writes them, with random numbers."""

    def __init__(self, folder: str, size: Size, rng: np.random.Generator):
        self.folder, self.size, self.rng = folder, size, rng
        self.value = pa.float16()

    def write(self) -> Iterator[tuple[str, storage.Listed]]:
        """Write all of them, and tables.json."""
        n_latents, n_images = self.size.latents, self.size.images
        tables = {
            schema.LATENTS: (schema.latents(), "latent", self._latents()),
            schema.EXAMPLES: (schema.examples(self.value), "latent", self._examples()),
            schema.IMAGES: (schema.images(), "example", self._images()),
            schema.CLASSES: (schema.classes(), "class_idx", self._classes()),
            schema.IMAGE_ACTS_BY_LATENT: (
                schema.image_acts(self.value, "latent"), "latent", self._acts("latent")
            ),
            schema.IMAGE_ACTS_BY_IMAGE: (
                schema.image_acts(self.value, "example"), "example", self._acts("example")
            ),
        }  # fmt: skip
        entries = {}
        for name, (columns, key, chunks) in tables.items():
            with TableWriter(self.folder, name, columns, key) as writer:
                for chunk in chunks:
                    writer.write(chunk)
                entries[name] = writer.close()
            yield from writer.listed.items()
        side = {"n_tokens": n_images * GRID**2, "n_images": n_images}
        facts = {
            "quantiles": [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99], "image_floor": 0.05,
            "all": side, "held_out": {"n_tokens": 0, "n_images": 0},
            "n_image_acts": n_images * LATENTS_PER_IMAGE, "n_latents": n_latents,
        }  # fmt: skip
        place = storage.join(self.folder, TABLES)
        storage.write_json(place, Index(entries, facts).to_dict())
        yield TABLES, _listed(self.folder, TABLES)

    def _columns(self, columns: pa.Schema, n: int, known: dict[str, tp.Any]) -> dict[str, tp.Any]:
        """Random numbers for what is not known; nothing for texts."""
        found: dict[str, tp.Any] = {}
        for field in columns:
            kind = field.type
            if field.name in known:
                found[field.name] = known[field.name]
            elif pa.types.is_floating(kind):
                found[field.name] = self.rng.random(n)
            elif pa.types.is_integer(kind):
                found[field.name] = self.rng.integers(0, 1000, n)
            elif pa.types.is_list(kind):
                found[field.name] = _lists(self.rng.random((n, 10)), kind)
            else:
                found[field.name] = pa.nulls(n, kind)
        return found

    def _latents(self) -> Iterator[dict[str, tp.Any]]:
        n = self.size.latents
        best = self.rng.integers(0, N_CLASSES, n)
        near = self.rng.integers(0, n, (n, 10))
        yield self._columns(schema.latents(), n, {
            "latent": np.arange(n), "best_class": best, "best_class_name": [name(i) for i in best],
            "frequency": 10 ** self.rng.uniform(-6, -1, n),
            "neighbours": _lists(near, pa.list_(pa.int32())),
            "coactive": _lists(near, pa.list_(pa.int32())),
            "histogram": _lists(self.rng.integers(0, 1e6, (n, 60)), pa.list_(pa.int64())),
        })  # fmt: skip

    def _examples(self) -> Iterator[dict[str, tp.Any]]:
        each = N_TOP + N_SPREAD
        for first in range(0, self.size.latents, 512):
            latents = np.arange(first, min(first + 512, self.size.latents))
            n = len(latents) * each
            values = -np.sort(-self.rng.random((len(latents), each)), axis=1)
            patches = np.sort(self.rng.integers(0, GRID**2, (n, N_PATCHES)), axis=1)
            yield self._columns(schema.examples(self.value), n, {
                "latent": np.repeat(latents, each),
                "kind": (["top"] * N_TOP + ["spread"] * N_SPREAD) * len(latents),
                "rank": np.tile([*range(N_TOP), *range(N_SPREAD)], len(latents)),
                "example": self.rng.choice(shown(self.size), n),
                "side": ["unknown"] * n, "value": values.ravel(),
                "patches": _lists(patches, pa.list_(pa.int32())),
                "patch_values": _lists(
                    self.rng.random((n, N_PATCHES)).astype(np.float16), pa.list_(self.value)
                ),
            })  # fmt: skip

    def _images(self) -> Iterator[dict[str, tp.Any]]:
        per_class = -(-self.size.images // N_CLASSES)
        for first in range(0, self.size.images, 1 << 16):
            example = np.arange(first, min(first + (1 << 16), self.size.images))
            number = example // per_class
            paths = [
                f"/data/train/n{c:08d}/n{c:08d}_{e:07d}.JPEG"
                for c, e in zip(number.tolist(), example.tolist(), strict=True)
            ]
            yield self._columns(schema.images(), len(example), {
                "example": example, "index": example, "path": paths, "class_idx": number,
                "label": [name(c) for c in number.tolist()], "side": ["unknown"] * len(example),
            })  # fmt: skip

    def _classes(self) -> Iterator[dict[str, tp.Any]]:
        each = 64 + 16 * self.size.latents // N_CLASSES
        each = min(each, self.size.latents)
        for one in range(N_CLASSES):
            yield self._columns(schema.classes(), each, {
                "class_idx": np.full(each, one), "kind": ["image"] * each,
                "value": np.full(each, one), "name": [name(one)] * each,
                "latent": self.rng.permutation(self.size.latents)[:each],
                "ap": -np.sort(-self.rng.random(each)),
                "support": np.full(each, self.size.images // N_CLASSES),
            })  # fmt: skip

    def _acts(self, key: tp.Literal["latent", "example"]) -> Iterator[dict[str, tp.Any]]:
        """The two tables are not the same pairs; sizes and orders are right."""
        n, width = self.size.images, LATENTS_PER_IMAGE
        if key == "example":
            for first in range(0, n, 1 << 14):
                example = np.arange(first, min(first + (1 << 14), n))
                latent = np.sort(self.rng.integers(0, self.size.latents, (len(example), width)))
                yield self._pairs("example", np.repeat(example, width), latent.ravel())
            return
        each = n * width // self.size.latents
        for latent in range(self.size.latents):
            example = np.sort(self.rng.integers(0, n, each))
            yield self._pairs("latent", np.full(each, latent), example)

    def _pairs(
        self, key: tp.Literal["latent", "example"], keys: np.ndarray, others: np.ndarray
    ) -> dict[str, tp.Any]:
        other = "example" if key == "latent" else "latent"
        values = self.rng.random(len(keys)).astype(np.float16)
        return {key: keys, other: others, "max": values, "mean": values}


def _lists(rows: np.ndarray, kind: pa.DataType) -> pa.Array:
    starts = np.arange(0, rows.size + 1, rows.shape[1], dtype=np.int32)
    values = pa.array(rows.ravel()).cast(kind.value_type, safe=False)
    return pa.ListArray.from_arrays(starts, values).cast(kind)


def name(number: int) -> str:
    """Of a class, with an accent."""
    return f"{'æéîøü'[number % 5]}ther thing {number}"


# --- The server ----------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(root: str) -> Iterator[tuple[str, int]]:
    """`saev serve`: its host with port, and its process id."""
    command = [sys.executable, "-m", "saev", "serve", "--root", root, "--no-browser"]
    command += ["--memory-mb", str(MEMORY_MB)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    address = server.stdout.readline().strip()
    if not address:
        sys.exit("saev serve did not start.")
    try:
        yield urllib.parse.urlsplit(address).netloc, server.pid
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


def peak_mb(pid: int) -> float:
    """The largest resident set of a process, in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return float(text.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


@contextlib.contextmanager
def slowed(port: int) -> Iterator[int]:
    """A proxy that holds back what clients send for LATENCY_S. Gives its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pass_on(source: socket.socket, target: socket.socket, wait: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(wait)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                for pair in ((client, server, LATENCY_S), (server, client, 0.0)):
                    threading.Thread(target=pass_on, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


@contextlib.contextmanager
def store(folder: Path, program: Path) -> Iterator[None]:
    """An S3 server over a folder with buckets, behind the proxy. Sets the environment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    meta = folder.parent / "metadata"
    meta.mkdir(exist_ok=True)
    command = [program, "--quiet", "--keep-alive", "--port", f"127.0.0.1:{port}", "posix"]
    env = {"ROOT_ACCESS_KEY": "benchmark", "ROOT_SECRET_KEY": "benchmark-only"}
    words = [str(word) for word in (*command, "--sidecar", meta, folder)]
    server = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL)
    try:
        with slowed(port) as proxy:
            os.environ.update(
                AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy}", AWS_ACCESS_KEY_ID="benchmark",
                AWS_SECRET_ACCESS_KEY="benchmark-only", AWS_DEFAULT_REGION="us-east-1",
            )  # fmt: skip
            yield
    finally:
        server.terminate()
        server.wait()


# --- Clients -------------------------------------------------------------------------------------


class Client:
    """One user. Counts errors, and times each kind of answer."""

    def __init__(self, netloc: str, key: str, size: Size, seed: int):
        self.connection = http.client.HTTPConnection(netloc, timeout=120)
        self.base, self.size, self.random = f"/api/runs/{key}", size, random.Random(seed)
        self.times: dict[str, list[float]] = {}
        self.errors: list[str] = []

    def ask(self, kind: str, path: str) -> bytes:
        """Ask, and note the time in milliseconds."""
        start = time.perf_counter()
        self.connection.request("GET", self.base + path)
        answer = self.connection.getresponse()
        data = answer.read()
        self.times.setdefault(kind, []).append((time.perf_counter() - start) * 1000)
        if answer.status != 200:
            self.errors.append(f"{path}: {answer.status} {data[:200]!r}")
        return data

    def browse(self, end: float) -> None:
        """Look around until a time."""
        while time.monotonic() < end:
            time.sleep(self.random.uniform(0.1, 0.5))
            latent, image = (self.random.randrange(n) for n in self.size[:2])
            some = ",".join(str((latent + i) % self.size.latents) for i in range(20))
            kind, path = self.random.choice([
                ("scroll", f"/examples?latents={some}&n=4"),
                ("scroll", f"/examples?latents={some}&n=4"),
                ("latent", f"/latents/{latent}"), ("latent", f"/latents/{latent}"),
                ("images of a latent", f"/latents/{latent}/images?n=50"),
                ("image", f"/images/{image}"), ("class", f"/classes/{image % N_CLASSES}"),
                ("search", f"/search?q={self.query(image)}"),
            ])  # fmt: skip
            self.ask(kind, path)

    def query(self, image: int) -> str:
        """Words of a file, a class or a number."""
        words = self.random.choice([
            f"n{image % N_CLASSES:08d}", f"{image:07d}"[:5], f"ether {image % N_CLASSES}",
            "n000", str(image % 500), "thing jpeg",
        ])  # fmt: skip
        return urllib.parse.quote(words)

    def compute(self, end: float) -> None:
        """Compare classes until a time."""
        while time.monotonic() < end:
            a, b = (self.random.randrange(N_CLASSES) for _ in range(2))
            self.ask("comparison", f"/compare?a=class:{a}&b=class:{b}")


def measure(root: str, key: str, size: Size, report: Report, where: str) -> None:
    """Start the server, ask it, and add rows."""
    with serving(root) as (netloc, pid):
        first = Client(netloc, key, size, seed=0)
        first.ask("opening", "")
        first.ask("opening", "/figures")
        report.add(f"open an SAE, cold, {where}", [sum(first.times["opening"])], "ms")
        first.ask("index", "/search?q=n00000012")
        report.add(f"first search, with its index, {where}", first.times["index"], "ms")
        for query in ("n00000012", "n000", "%C3%A9ther%20thing%2012", "0012345", "12", "n"):
            for _ in range(3):
                first.ask("search", f"/search?q={query}")
        report.add(f"search alone, {where}", first.times["search"], "ms", at_most=100)
        if chromium.BINARY is None:
            report.leave_out("pages in a browser", chromium.MISSING)
        else:
            look(f"http://{netloc}/#/{key}", size, report, where)
        end = time.monotonic() + size.seconds
        users = [Client(netloc, key, size, seed) for seed in range(CLIENTS + COMPUTERS)]
        with concurrent.futures.ThreadPoolExecutor(len(users)) as pool:
            works = [one.browse for one in users[:CLIENTS]]
            works += [one.compute for one in users[CLIENTS:]]
            for work in [pool.submit(work, end) for work in works]:
                work.result()
        times: dict[str, list[float]] = {}
        for user in users:
            for kind, found in user.times.items():
                times.setdefault(kind, []).extend(found)
        browsing = [t for kind, found in times.items() if kind != "comparison" for t in found]
        report.add(f"requests of {CLIENTS} browsing users, {where}", [len(browsing)], "")
        for kind, found in sorted(times.items()):
            report.add(f"{kind}, 95th percentile, {where}", [np.percentile(found, 95)], "ms")
        p95 = [float(np.percentile(browsing, 95))]
        report.add(f"all of {CLIENTS} browsing users, 95th percentile, {where}", p95, "ms",
                   at_most=1000)  # fmt: skip
        errors = [error for user in [first, *users] for error in user.errors]
        report.add(f"errors, {where}", [len(errors)], "", at_most=0)
        for error in errors[:3]:
            print(error, file=sys.stderr)
        report.add(f"memory of the server, {where}", [peak_mb(pid)], "MB", at_most=MEMORY_MB)
    print(json.dumps({"load average": os.getloadavg()}), file=sys.stderr)


def look(address: str, size: Size, report: Report, where: str) -> None:
    """Open the list in a browser that is started for it, scroll, search, open a latent."""
    rows: dict[str, list[float]] = {}
    for _ in range(3):
        with chromium.browser() as tab:
            tab.open(address, height=900)
            rows.setdefault("first", []).append(tab.js(FIRST))
            times, most = tab.js(SCROLL)
            rows.setdefault("scroll", []).append(times[int(0.95 * len(times))])
            rows.setdefault("rows", []).append(most)
            tab.js("scrollTo(0, 0)")
            count = "document.getElementById('count').textContent"
            said = tab.js(count)
            found = tab.js(timed(typed("n00000012"), f"{count} !== {json.dumps(said)}"))
            rows.setdefault("search", []).append(found)
            tab.js(typed(""))
            opened = "document.querySelectorAll('.pictures canvas[data-drawn]').length >= 4"
            latent = f"location.hash = '{address.partition('#')[2]}/latent/7'"
            rows.setdefault("latent", []).append(tab.js(timed(latent, opened)))
            for problem in tab.problems():
                print(problem, file=sys.stderr)
    name = f"{size.latents:,} latents, {where}"
    report.add(f"first rows with pictures, {name}", rows["first"], "ms", at_most=1000)
    report.add(f"frames of a scroll, 95th percentile, {name}", rows["scroll"], "ms", at_most=33)
    report.add(f"most rows in the document, {name}", rows["rows"], "", at_most=200)
    report.add(f"search in the page, {name}", rows["search"], "ms", at_most=100)
    report.add(f"page of a latent with its pictures, {name}", rows["latent"], "ms", at_most=200)


def flags() -> argparse.Namespace:
    """The flags."""
    made = parser(__doc__, repeats=1)
    made.add_argument("--s3", action="store_true", help="also through an S3 server")
    made.add_argument("--server", default="", help="versitygw")
    made.add_argument("--root", default="", help="folder for what is made, which is kept")
    return made.parse_args()


def main() -> None:
    """Measure, print, write."""
    args = flags()
    size = Size(512, 5_000, 3.0) if args.small else Size(16_384, 1_000_000, 30.0)
    report = Report(invocation(), args.json)
    with contextlib.ExitStack() as stack:
        if args.root:
            folder = Path(args.root)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saev-bench-")))
        objects = folder / "objects"
        root = objects / BUCKET / f"{size.latents}x{size.images}"
        key = "0123456789ab.fedcba9876543210"
        if not root.exists():
            try:
                key = make_root(str(root), size)
            except BaseException:
                shutil.rmtree(root, ignore_errors=True)
                raise
        measure(str(root), key, size, report, "disk")
        if args.s3:
            with store(objects, find_server(args.server)):
                measure(f"s3://{BUCKET}/{root.name}", key, size, report, "S3 with 20 ms")
    report.close()


if __name__ == "__main__":
    main()
