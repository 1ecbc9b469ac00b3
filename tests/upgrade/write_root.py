"""Wrote what root/ holds, with commit acfea7a; later versions must find it (test_upgrade.py).

    git checkout acfea7a; PYTHONPATH=tests .venv/bin/python write_root.py TARGET WORK_FOLDER

A bucket `saev-tests` with upgrade/incoming (a dataset of two classes that a schedule found),
upgrade/masks (a labelled dataset) and upgrade/saev, a storage root in which the pipeline's steps
and `saev run` have done all of it.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import s3_server
import s3fs
from PIL import Image

from saev import cli, storage

BASE = "s3://saev-tests/upgrade"
ROOT = f"{BASE}/saev"
TARGET, WORK = Path(sys.argv[1]), Path(sys.argv[2])

CONFIG = {
    "shards": {
        "family": "timm",
        "ckpt": "test_vit/random",
        "image_size": 64,
        "layers": [-2, -1],
        "dtype": "bfloat16",
        "max_tokens_per_shard": 272,
        "device": "cpu",
    },
    "train": {
        "train_data": {"layer": 5, "val_fraction": 0.25},
        "val_data": {"layer": 5},
        "n_train": 6400,
        "batch_size": 64,
        "n_lr_warmup": 10,
        "device": "cpu",
        "sae": {"d_sae": 96},
    },
    "sweep": {
        "grid": [
            {"sae": {"activation": {"kind": ["top-k", "batch-top-k"], "top_k": 8}}},
            {
                "sae": {"activation": {"kind": ["relu", "jump-relu"]}},
                "objective": {"sparsity_coeff": 1e-3},
            },
        ]
    },
    "inference": {"n_top": 4, "n_dists": 3, "device": "cpu"},
    "visuals": {"log_freq_range": [-6, 0], "n_latents": 2, "n_top": 2, "image_size": 64},
}


def picture(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def images() -> None:
    for c, name in enumerate(("birds", "fishes")):
        for i in range(10):
            url = f"{BASE}/incoming/first/{name}/img{i:02d}.png"
            storage.write_bytes(url, png(picture(100 * c + i)))
    for i in range(8):
        place = f"{BASE}/masks"
        storage.write_bytes(f"{place}/images/training/scene{i}.png", png(picture(500 + i)))
        mask = np.zeros((40, 48), np.uint8)
        mask[:, : 6 * i + 3] = 1
        mask[20:, 24:] = 2
        storage.write_bytes(f"{place}/annotations/training/scene{i}.png", png(mask))


def steps() -> None:
    """A firing of the schedule, as pods do it."""
    out = WORK / "kfp"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = ["--root", ROOT, "--config", json.dumps(CONFIG), "--owner", "firing-1"]

    def step(name: str, *words: str) -> None:
        cli.main(["step", name, *config, *words])

    step(
        "discover",
        "--mode",
        "incoming",
        "--settle-minutes",
        "0",
        "--dataset",
        f"{BASE}/incoming",
        "--to-datasets",
        str(out / "datasets"),
    )
    (dataset,) = json.loads((out / "datasets").read_text())
    d = ["--dataset", dataset]
    step(
        "plan-shards",
        *d,
        "--n-parts",
        "2",
        "--to-shards",
        str(out / "shards"),
        "--to-items",
        str(out / "items"),
    )
    shards = (out / "shards").read_text()
    s = [*d, "--shards", shards]
    for item in json.loads((out / "items").read_text()):
        step("extract", *s, "--item", item)
    step("publish", *s)
    step("plan-training", *s, "--to-items", str(out / "groups"))
    for item in json.loads((out / "groups").read_text()):
        step("train", *s, "--item", item)
    step(
        "plan-inference",
        *s,
        "--n-parts",
        "2",
        "--to-runs",
        str(out / "runs"),
        "--to-items",
        str(out / "passes"),
    )
    for item in json.loads((out / "passes").read_text()):
        step("infer", *s, "--item", item)
    runs = (out / "runs").read_text()
    for run in json.loads(runs):
        step("summarise", *s, "--run", run)
    step("report", *s, "--runs", runs)
    cli.main(["step", "outcome", "--root", ROOT, "--owner", "firing-1"])


def labelled() -> None:
    """`saev run` on a labelled dataset, with one SAE."""
    file = {k: v for k, v in CONFIG.items() if k != "sweep"}
    file["data"] = {"kind": "img-seg-folder", "root": f"{BASE}/masks"}
    file["train"] = {
        **CONFIG["train"],
        "sae": {"d_sae": 96, "activation": {"kind": "top-k", "top_k": 4}},
    }
    place = WORK / "labelled.json"
    place.write_text(json.dumps(file, indent=1))
    cli.main(["run", "--config", str(place), "--root", ROOT])


def in_flight() -> None:
    """A sweep that was killed between two resume points."""
    (shards,) = (
        e.url
        for e in storage.list_dir(f"{ROOT}/shards")
        if json.loads(storage.read_text(f"{e.url}/metadata.json"))["n_examples"] == 20
    )
    sweep = WORK / "sweep.toml"
    sweep.write_text('[sae.activation]\nkind = "top-k"\ntop_k = [4, 8]\n')
    words = f"train --runs-root {ROOT}/flight --sweep {sweep} --train-data.shards {shards}".split()
    words += "--train-data.layer 5 --train-data.val-fraction 0.25 --val-data.layer 5".split()
    words += (
        "--n-train 64000 --batch-size 64 --sae.d-sae 96 --device cpu --checkpoint-every 100".split()
    )
    TARGET.mkdir(parents=True, exist_ok=True)
    (TARGET / "flight.json").write_text(json.dumps(words, indent=1))
    shutil.copy(sweep, TARGET / "flight.toml")
    child = subprocess.Popen([sys.executable, "-m", "saev", *words], start_new_session=True)
    while True:
        time.sleep(0.05)
        found = (
            [str(getattr(e, "url", e)) for e in storage.find(f"{ROOT}/flight")]
            if storage.exists(f"{ROOT}/flight")
            else []
        )
        if any("resume/" in u for u in found) or child.poll() is not None:
            break
    os.killpg(child.pid, 9)
    child.wait()
    time.sleep(1)
    s3fs.S3FileSystem.clear_instance_cache()
    print(child.returncode, found)


def main() -> None:
    with s3_server.running():
        images()
        steps()
        labelled()
        in_flight()
        for entry in storage.find(BASE):
            url = entry if isinstance(entry, str) else entry.url
            place = TARGET / url.removeprefix(BASE + "/")
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                place.write_bytes(storage.read_bytes(url))
            except Exception as err:
                print(err)
    shutil.copy(WORK / "labelled.json", TARGET / "labelled.json")
    (TARGET / "config.json").write_text(json.dumps(CONFIG, indent=1))


if __name__ == "__main__":
    main()
