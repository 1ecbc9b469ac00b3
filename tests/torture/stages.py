"""Whole stages whose storage misbehaves and whose processes are killed: the same bytes come out."""

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
import typing as tp
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import s3_proxy
import s3fs
from forker import Ended, Forker

from saev import storage
from saev.storage import uploads

FAULTS = ("reset", "lost", "cut", "twice", "late", "503", "500", "429", "slow-down", "in-200")
_REPLIES = {
    "slow-down": s3_proxy.error(503, "SlowDown", "Please reduce your request rate."),
    "in-200": s3_proxy.error(200, "InternalError", "We encountered an internal error."),
}
_PATTERN = """
[shards]
family = "timm"
ckpt = "test_vit/random"
image_size = 64
layers = [-1]
max_tokens_per_shard = 68
n_workers = 2
[train]
n_train = 1600
n_val = 100
batch_size = 64
checkpoint_every = 5
log_every = 5
device = "cpu"
sweep = "{sweep}"
[train.sae]
d_sae = 64
[train.train_data]
val_fraction = 0.25
[visuals]
n_latents = 2
"""
_DATA = ["data:fake-img-seg", "--data.n-examples", "16", "--data.image-size", "64"]


STAGES = ("shards", "train", "inference", "run")


def of_an_upload(request: s3_proxy.Request) -> bool:
    """Whether a request is of an upload in parts."""
    return "uploadId" in request.path or request.path.endswith("?uploads")


class Count(tp.NamedTuple):
    """What happened to one stage."""

    stage: str
    storage: str
    n_runs: int
    """Times that it was brought to its end."""
    n_kills: int
    n_requests: int
    n_faults: int
    different: list[str]
    """Objects that are not as without any trouble."""
    failed: list[str]
    """Ends with another status than 0."""

    @property
    def is_good(self) -> bool:
        """Whether nothing went wrong."""
        return not self.different and not self.failed


class Stages:
    """The stages' commands over one root, and what they leave without any trouble.

    Args:
        forker: starts commands.
        root: URL of an empty place.
        folder: for configs.
        wanted: the stages that are asked for.
    """

    def __init__(self, forker: Forker, root: str, folder: Path, wanted: tp.Sequence[str] = STAGES):
        self._forker = forker
        (folder / "sweep.toml").write_text("[sae.activation]\ntop_k = [2, 4]\n")
        config = folder / "run.toml"
        config.write_text(_PATTERN.format(sweep=folder / "sweep.toml"))
        self.out = storage.join(root, "out")
        shards = run = ""
        if {"train", "inference"} & set(wanted):  # they read what was made before
            given = storage.join(root, "given")
            self._must(["run", "--config", str(config), "--root", given, *_DATA])
            (shards,) = [e.url for e in storage.list_dir(storage.join(given, "shards"))]
            runs = storage.list_dir(storage.join(given, "runs"))
            run = min(e.url for e in runs if e.is_dir and e.name != "resume")
        self.commands = {
            "shards": [
                "shards", "--shards-root", self.out, "--family", "timm", "--ckpt",
                "test_vit/random", "--image-size", "64", "--layers", "-1", "--n-workers", "2",
                "--max-tokens-per-shard", "68", "--device", "cpu", *_DATA,
            ],
            "train": [
                "train", "--runs-root", self.out, "--train-data.shards", shards,
                "--train-data.layer", "5", "--train-data.val-fraction", "0.25", "--sae.d-sae",
                "64", "--n-train", "1600", "--n-val", "100", "--batch-size", "64",
                "--checkpoint-every", "5", "--device", "cpu",
            ],
            "inference": [
                "inference", "--run", run, "--data.shards", shards, "--out", self.out,
            ],
            "run": ["run", "--config", str(config), "--root", self.out, *_DATA],
        }  # fmt: skip
        self._expected: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        for stage in wanted:
            started = time.monotonic()
            self._must(self.commands[stage])
            self.seconds[stage] = time.monotonic() - started
            self._expected[stage] = contents(self.out)
            self.clear()

    def _must(self, argv: list[str]) -> Ended:
        ended = self._forker.run(argv)
        if ended.status:
            raise RuntimeError(f"saev {argv[0]} failed without any trouble: {ended.stderr[-2000:]}")
        return ended

    def clear(self) -> None:
        """Remove what a command left."""
        path = storage.local_path(self.out)
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
        else:
            storage.delete(self.out, recursive=True)

    def different(self, stage: str) -> list[str]:
        """Objects that are not as they should be."""
        want, found = self._expected[stage], contents(self.out)
        return [name for name in sorted({*want, *found}) if want.get(name) != found.get(name)]

    def run(self, stage: str, kill_after: float | None = None) -> Ended:
        """Run a command; kill it after so many seconds."""
        pid = self._forker.start(self.commands[stage])
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self._forker.wait(pid)


def contents(url: str) -> dict[str, bytes]:
    """Every object below a place, but for those that hold wall times."""
    found = {}
    path = storage.local_path(url)
    if path is not None:
        files = {str(p.relative_to(path)): p for p in path.rglob("*") if p.is_file()}
        found = {name: file.read_bytes() for name, file in files.items()}
    else:
        found = {o.key: storage.read_bytes(storage.join(url, o.key)) for o in storage.walk(url)}
    timed = ("tb/", "timings.jsonl")
    return {name: data for name, data in found.items() if not any(t in name for t in timed)}


def kill(stages: Stages, stage: str, where: str, n_kills: int, rng: random.Random) -> Count:
    """Kill a stage at random moments and start it again, until there were so many kills."""
    different: list[str] = []
    failed: list[str] = []
    killed = runs = 0
    while killed < n_kills:
        while True:
            wait = rng.uniform(0, stages.seconds[stage]) if killed < n_kills else None
            ended = stages.run(stage, wait)
            if ended.status != -signal.SIGKILL:
                break
            killed += 1
        runs += 1
        if ended.status:
            failed.append(f"{ended.status}: {ended.stderr[-500:]}")
        different += stages.different(stage)
        stages.clear()
    return Count(stage, where, runs, killed, 0, 0, different, failed)


def break_requests(
    stages: Stages, stage: str, where: str, n_runs: int, share: float, rng: random.Random
) -> Count:
    """Run a stage while a share of all requests is broken in every way."""
    different: list[str] = []
    failed: list[str] = []
    n_requests = n_faults = 0
    for _ in range(n_runs):
        with behind_proxy(share, rng) as (proxy, faults):
            ended = stages.run(stage)
            n_requests += len(proxy.requests)
            n_faults += len(faults)
            proxy.release(of_an_upload)  # what was late comes now
        if ended.status:
            failed.append(f"{ended.status}: {ended.stderr[-500:]}")
        different += stages.different(stage)
        stages.clear()
    return Count(stage, where, n_runs, 0, n_requests, n_faults, different, failed)


@contextlib.contextmanager
def behind_proxy(share: float, rng: random.Random) -> Iterator[tuple[s3_proxy.Proxy, list[str]]]:
    """A proxy before the server of the environment; commands that start meanwhile go through it."""
    endpoint, faults = os.environ["AWS_ENDPOINT_URL"], []

    def fault(request: s3_proxy.Request) -> s3_proxy.Fault:
        if rng.random() >= share:
            return ""
        kind = rng.choice(FAULTS)
        if kind == "in-200" and not (request.method == "POST" and "uploadId" in request.path):
            kind = "500"  # only a completion is answered so
        faults.append(kind)
        return _REPLIES.get(kind, kind)

    with s3_proxy.before(endpoint) as proxy:
        proxy.fault = fault
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        try:
            yield proxy, faults
        finally:
            os.environ["AWS_ENDPOINT_URL"] = endpoint


def write_objects(root: str, n_objects: int, share: float, rng: random.Random) -> Count:
    """24 threads write objects of one to three parts, twice each, and read them back."""
    sizes = (1 << 10, (5 << 20) + 1, 11 << 20)
    pool_bytes = random.Random(0).randbytes((12 << 20) + n_objects * 64)
    different: list[str] = []
    failed: list[str] = []
    lock = threading.Lock()

    def data(i: int) -> memoryview:
        return memoryview(pool_bytes)[i * 64 : i * 64 + sizes[i % len(sizes)]]

    def write(i: int) -> None:
        url = f"{root}/{i // 2:06d}.bin"
        try:
            storage.write_bytes(url, data(i))
            if storage.read_bytes(url) != data(i):
                with lock:
                    different.append(url)
        except storage.StorageError as err:
            with lock:
                failed.append(str(err))

    before, uploads.PART_BYTES = uploads.PART_BYTES, 5 << 20
    try:
        with behind_proxy(share, rng) as (proxy, faults), ThreadPoolExecutor(24) as pool:
            s3fs.S3FileSystem.clear_instance_cache()
            for turn in (0, 1):  # each object is written over by another
                list(pool.map(write, range(turn, 2 * n_objects, 2)))
            n_requests, n_faults = len(proxy.requests), len(faults)
            proxy.fault = lambda request: ""
            proxy.release(of_an_upload)  # a late PUT of a whole object would win, as on any store
            for i in range(1, 2 * n_objects, 2):
                url = f"{root}/{i // 2:06d}.bin"
                if storage.read_bytes(url) != data(i):
                    different.append(f"{url}, after what was late")
            storage.delete(root, recursive=True)
    finally:
        uploads.PART_BYTES = before
        s3fs.S3FileSystem.clear_instance_cache()
    return Count("objects", "S3", 2 * n_objects, 0, n_requests, n_faults, different, failed)


def describe(counts: tp.Sequence[Count]) -> str:
    """A table."""
    lines = [
        "| What | On | Brought to its end | SIGKILLs | Requests | of these broken | Different "
        "objects | Failures |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in counts:
        lines.append(
            f"| {c.stage} | {c.storage} | {c.n_runs} | {c.n_kills} | {c.n_requests:,} | "
            f"{c.n_faults:,} | {len(c.different)} | {len(c.failed)} |"
        )
    for c in counts:
        lines += [f"\n{c.stage} on {c.storage}: {json.dumps(w)}" for w in (*c.different, *c.failed)]
    return "\n".join(lines)
