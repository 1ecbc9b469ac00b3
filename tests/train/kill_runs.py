"""Kills training at random moments until a number of kills is reached; see test_kill.py.

    python kill_runs.py SHARDS FOLDER N_KILLS SEED

A process that has imported everything forks one child per attempt, so an attempt costs no start-up.
Prints a JSON report.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import tensorboard.compat.proto.event_pb2  # noqa: F401
import torch
import torch.fx.experimental.symbolic_shapes

from saev import train
from saev.config import LoaderConfig, TrainConfig


def main(shards: str, folder: str, n_kills: int, seed: int) -> None:
    torch.set_num_threads(1)  # before any parallel region: a fork has no thread pool
    base = Path(folder)
    root, sweep = base / "runs", base / "sweep.toml"
    sweep.write_text(
        "sae.d_sae = 96\nsae.top_k = 3\n[[grid]]\nsae.activation.kind = ['top-k', 'batch-top-k']\n"
        "[[grid]]\nobjective.kind = 'matryoshka'\nbatch_size = 512\n"
    )
    cfg = TrainConfig(
        runs_root=str(root), sweep=str(sweep), device="cpu", n_train=8000, n_val=2000,
        batch_size=256, log_every=2, checkpoint_every=3,
        train_data=LoaderConfig(shards=shards, layer=3, buffer_mb=0.5),
    )  # fmt: skip
    rng = random.Random(seed)
    start = time.monotonic()
    assert attempt(cfg, None) == 0
    whole_s = time.monotonic() - start
    want = contents(root)
    kills, rounds, different = [], 0, []
    while len(kills) < n_kills:
        shutil.rmtree(root)
        rounds += 1
        while True:
            delay = rng.uniform(0, whole_s) if len(kills) < n_kills else None
            before = progress(root)
            if attempt(cfg, delay) == 0:
                break
            kills.append([before, progress(root)])
        found = contents(root)
        different += [k for k in sorted({*want, *found}) if want.get(k) != found.get(k)]
    left = sorted(str(p.relative_to(root)) for p in root.rglob(".tmp-*"))
    report = {
        "kills": kills, "rounds": rounds, "different": different, "whole_s": whole_s,
        "files": sorted(want), "left": left,
    }  # fmt: skip
    print(json.dumps(report))


def attempt(cfg: TrainConfig, delay: float | None) -> int:
    """Train in a child that is killed after so many seconds; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            train.run(cfg)
            status = 0
        finally:
            os._exit(status)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), f"training failed with wait status {status}"
    return status


def contents(root: Path) -> dict[str, str]:
    """Every file of every run as hex, but for those that hold wall times."""
    return {
        str(p.relative_to(root)): p.read_bytes().hex()
        for p in root.rglob("*")
        if p.is_file() and p.parent.name != "tb" and p.name != "timings.jsonl"
    }


def progress(root: Path) -> str:
    """How far training has come: published runs and the newest resume point."""
    done = len(list(root.glob("*/run.json")))
    points = sorted(p.stem for p in root.glob("resume/*/*.json"))
    return f"{done} runs, {points[-1] if points else 'no resume point'}"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
