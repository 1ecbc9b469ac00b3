"""The whole pipeline in Docker, on the demo's photographs and a real DINOv2: kfp walks it, every
step is a container as restricted as on a cluster, and the results are those of `saev run`."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker as docker_sdk
import pytest
from containers import ROOT, Images
from described import files_below
from servers import S3Server, s3_server

from pipelines.runners import LABEL
from saev import storage
from saev.config.run import RunFile
from saev.demo.__main__ import DemoConfig, prepare
from saev.steps import discover

UNEQUAL = ("tb/", "timings.jsonl")
"""Parts of names of files that hold times."""


class Job:
    """The demo's images, weights and config, and where results go."""

    def __init__(self, folder: Path, images: Images, base: str, env: dict[str, str]):
        self.folder, self.images = folder, images
        self.dataset = storage.join(base, "photographs")
        self.root = storage.join(base, "out")
        self.config = folder / "demo.toml"
        # Threads that wait for each other by spinning make a busy machine many times slower.
        self.env = os.environ | {"OMP_NUM_THREADS": "1"} | env

    def command(self, *more: str) -> list[str]:
        """run-local, with its pages in the folder."""
        return [
            *(sys.executable, "-m", "pipelines", "run-local", "--config", str(self.config)),
            *("--dataset", self.dataset, "--root", self.root, "--network", "host"),
            *("--image", self.images.gpu, "--cpu-image", self.images.cpu),
            *("--outputs", str(self.folder / "kfp"), *more),
        ]

    def run(self, *more: str) -> "subprocess.CompletedProcess[str]":
        """Run the pipeline to its end."""
        return subprocess.run(
            self.command(*more), capture_output=True, text=True, env=self.env, cwd=ROOT
        )

    def reference(self) -> None:
        """`saev run` with the same config and root, in one container of the same image."""
        client = docker_sdk.from_env()
        names = [name for name in self.env if name.startswith(("AWS_", "OMP_"))]
        command = ["run", "--config", str(self.config), "--root", self.root]
        client.containers.run(
            self.images.gpu,
            [*command, "data:img-seg-folder", "--data.root", self.dataset],
            volumes={str(self.folder): {"bind": str(self.folder), "mode": "rw"}},
            environment={name: self.env[name] for name in names},
            network_mode="host",
            user=f"{os.getuid()}:0",
            remove=True,
        )

    def contents(self) -> dict[str, bytes]:
        """Everything that has to be equal, by key."""
        prefix = len(storage.normalize(self.root)) + 1
        return {
            url[prefix:]: storage.read_bytes(url)
            for url in files_below(self.root)
            if not url[prefix:].startswith(("datasets/", "jobs/"))
            and not any(u in url for u in UNEQUAL)
        }


def make_job(folder: Path, images: Images, base: str, env: dict[str, str]) -> Job:
    """32 photographs in several shards, four SAEs in two groups."""
    prepare(DemoConfig(root=str(folder), n_examples=32, n_train=6_000, n_latents=2))
    config = folder / "demo.toml"
    text = config.read_text()
    text = text.replace("[train]\n", "[train]\nmax_parallel = 2\n", 1)
    text = text.replace("[shards]\n", "[shards]\nmax_tokens_per_shard = 2570\n", 1)
    config.write_text(text)
    job = Job(folder, images, base, env)
    if job.dataset != str(folder / "photographs"):
        photos = folder / "photographs"
        for path in photos.rglob("*"):
            if path.is_file():
                url = storage.join(job.dataset, str(path.relative_to(photos)))
                storage.write_bytes(url, path.read_bytes())
        weights = storage.join(base, "weights.safetensors")
        (local,) = (folder / "weights").iterdir()
        storage.write_bytes(weights, local.read_bytes())
        config.write_text(re.sub(r"@[^\"]+", f"@{weights}", config.read_text()))
    return job


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """A compiled S3 server, whose address and keys are in the environment."""
    import compiled

    try:
        with s3_server() as server, pytest.MonkeyPatch.context() as patch:
            for name, value in server.env.items():
                patch.setenv(name, value)
            yield server
    except compiled.Unavailable as err:
        pytest.skip(str(err))


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return [key for key in expected.keys() | found.keys() if found.get(key) != expected.get(key)]


@pytest.mark.timeout(1800)
def test_in_a_folder(saev_images: Images, tmp_path: Path) -> None:
    job = make_job(tmp_path, saev_images, str(tmp_path), {})
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == storage.join(job.root, "index.html")
    assert len(set(re.findall(r"\[extract: part \d of 2\]", done.stderr))) == 2
    assert len(set(re.findall(r"\[train: group \d of 2", done.stderr))) == 2
    found = job.contents()
    shutil.rmtree(job.root)
    job.reference()
    assert differing(found, job.contents()) == []

    # A container that is killed fails the run; the same command completes it, with equal bytes.
    shutil.rmtree(job.root)
    process = subprocess.Popen(job.command(), stderr=subprocess.PIPE, text=True, env=job.env)
    kill_the_first("train", process)
    _, err = process.communicate()
    assert process.returncode == 1
    assert re.search(r"error: The step train: group \d of 2: .* exit status 137", err), err
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert differing(job.contents(), found) == []


@pytest.mark.timeout(1800)
def test_on_object_storage(saev_images: Images, tmp_path: Path, s3: S3Server) -> None:
    job = make_job(tmp_path, saev_images, storage.join(s3.bucket, "job"), s3.env)
    done = job.run()
    assert done.returncode == 0, done.stderr
    found = job.contents()
    storage.delete(job.root, recursive=True)
    job.reference()
    assert differing(found, job.contents()) == []


@pytest.mark.timeout(900)
def test_a_step_that_fails_fails_the_run_ten_times_of_ten(
    saev_images: Images, tmp_path: Path
) -> None:
    """kfp's runner takes a quick failure for success when Docker removes the container first."""
    job = make_job(tmp_path, saev_images, str(tmp_path), {})
    empty = tmp_path / "empty"
    empty.mkdir()
    job.dataset = str(empty)
    for _ in range(10):
        done = job.run()
        assert done.returncode == 1
        assert "error: The step discover ended with exit status 65" in done.stderr
        assert "holds no files" in done.stderr


@pytest.mark.timeout(900)
def test_ctrl_c_stops_the_containers(saev_images: Images, tmp_path: Path) -> None:
    job = make_job(tmp_path, saev_images, str(tmp_path), {})
    process = subprocess.Popen(job.command(), stderr=subprocess.PIPE, text=True, env=job.env)
    wait_for("plan", process)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert docker_sdk.from_env().containers.list(all=True, filters={"label": LABEL}) == []


def test_ten_thousand_keys(s3: S3Server) -> None:
    prefix = storage.join(s3.bucket, "incoming")
    root = storage.join(s3.bucket, "saev")
    with ThreadPoolExecutor(8) as pool:
        urls = [storage.join(prefix, "big", f"{i:05d}.png") for i in range(10_000)]
        list(pool.map(lambda url: storage.write_bytes(url, b"x"), urls))
    (found,) = discover.candidates(root, prefix, RunFile(), marker="", settle_minutes=0.0)
    discover.check_unchanged(found)
    discover.mark_processed(root, found, "one", {})
    assert discover.candidates(root, prefix, RunFile(), marker="", settle_minutes=0.0) == []


def wait_for(step: str, process: "subprocess.Popen[str]") -> docker_sdk.models.containers.Container:
    """The first running container of a step."""
    client = docker_sdk.from_env()
    while process.poll() is None:
        for container in client.containers.list(filters={"label": LABEL}):
            if step in container.attrs["Args"]:
                return container
        time.sleep(0.1)
    raise AssertionError(f"it ended before {step}: {process.communicate()[1]}")


def kill_the_first(step: str, process: "subprocess.Popen[str]") -> None:
    container = wait_for(step, process)
    time.sleep(2)  # into its work
    container.kill()
