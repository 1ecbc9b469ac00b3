"""The whole pipeline on this machine: every step in a container of its own, as on a cluster.

kfp.local walks the pipeline. Two of its functions are replaced here, each for a reason that has a
test: its container runner can take a failed container for a successful one, and its loops mix up what
steps of the same graph wrote.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import typing as tp
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import docker
import docker.errors
import docker.models.containers
import docker.types
import pydantic
from kfp import local
from kfp.compiler import pipeline_spec_builder
from kfp.local import docker_task_handler
from kfp.local.orchestrator import enhanced_dag_orchestrator

from pipelines.definition import CONFIG_ENV, SECRET_ENV, build
from pipelines.errors import RunFailedError
from pipelines.options import CompileOptions, PipelineName
from saev import storage
from saev.config import Config
from saev.config.run import RunFile
from saev.config.stages import images_of, resolve
from saev.errors import ConfigError

logger = logging.getLogger(__name__)

LABEL = "saev.run-local"
"""Label of the containers; its value is the run's id."""
STOP_SECONDS = 30
"""As on Kubernetes: how long a container may take to stop before it is killed."""

_ENV = (*SECRET_ENV, *CONFIG_ENV)


class LocalRun(Config):
    """Run the whole pipeline on this machine, every step in a Docker container."""

    dataset: str = ""
    """Folder or URL of the images; empty takes the config's [data] as it is."""
    config: str
    """The file that `saev run --config` takes."""
    root: str = "./saev-out"
    """Folder or URL for everything."""
    image: str = "saev:dev"
    """The runtime image, from `make image`."""
    cpu_image: str = "saev-cpu:dev"
    """The small image."""
    pipeline: PipelineName = "saev"
    """saev: one dataset. saev-incoming: every new dataset in the folder."""
    n_parts: int = pydantic.Field(default=2, ge=1)
    """Most containers that extraction, and each SAE's inference, is cut into."""
    outputs: str = "./saev-local"
    """Folder for what the Kubeflow UI would show: metrics and pages of each step."""
    gpus: bool = False
    """Give every container all GPUs."""
    network: str = "bridge"
    """Docker network; `host` reaches servers on this machine."""
    user: str = ""
    """UID:GID of the containers; by default yours, with group 0."""
    parameters: dict[str, str] = pydantic.Field(default_factory=dict)
    """Further parameters of the pipeline, such as settle_minutes 0."""


def run(cfg: LocalRun) -> str:
    """Run the pipeline.

    Returns:
        URL of the root's index.html.

    Raises:
        ConfigError: config, dataset or images are not as they should be; nothing was started.
        RunFailedError: a step failed; what was finished is kept, and the same call goes on.
        KeyboardInterrupt: after the containers were stopped.
    """
    file = RunFile.portable(cfg.config)
    dataset = storage.normalize(cfg.dataset) if cfg.dataset else ""
    root = storage.normalize(cfg.root)
    resolve(file, root, images_of(file, dataset), storage.normalize(cfg.config))
    options = CompileOptions(image=cfg.image, cpu_image=cfg.cpu_image, retries=0)
    arguments: dict[str, tp.Any] = {
        "dataset": dataset,
        "root": root,
        "config": _used(file.to_dict()),
        "n_parts": cfg.n_parts,
        **{key: _parse(value) for key, value in cfg.parameters.items()},
    }
    outputs = Path(cfg.outputs).absolute()
    outputs.mkdir(parents=True, exist_ok=True)
    containers = _Containers(cfg, _mounts(file, dataset, root))
    containers.check_images()
    with containers.stopped_by_signals(), contextlib.redirect_stdout(sys.stderr):
        _walk(cfg.pipeline, options, arguments, containers, outputs)
    return storage.join(root, "index.html")


def _walk(
    name: PipelineName,
    options: CompileOptions,
    arguments: dict[str, tp.Any],
    containers: "_Containers",
    outputs: Path,
) -> None:
    replaced = (
        (docker_task_handler, "run_docker_container", containers.run),
        (enhanced_dag_orchestrator, "_run_parallel_for_task", _run_loop),
    )
    originals = [getattr(module, attribute) for module, attribute, _ in replaced]
    for module, attribute, ours in replaced:
        setattr(module, attribute, ours)
    local.init(runner=local.DockerRunner(), pipeline_root=str(outputs))
    # kfp reports each task several times, and warns of settings that a cluster needs.
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build(name, options)(**arguments)
    except RuntimeError as err:
        if containers.interrupted:
            raise KeyboardInterrupt from err
        first = containers.failures[0] if containers.failures else str(err)
        raise RunFailedError(
            f"{first} What was finished is kept: the same command goes on from there."
        ) from err
    finally:
        logging.disable(logging.NOTSET)
        for (module, attribute, _), original in zip(replaced, originals, strict=True):
            setattr(module, attribute, original)
    if containers.interrupted:
        raise KeyboardInterrupt


def _used(table: dict[str, tp.Any]) -> dict[str, tp.Any]:
    """Without tables that are empty: KFP has no null."""
    return {key: value for key, value in table.items() if value not in (None, {})}


def _parse(text: str) -> tp.Any:
    """A parameter's value: JSON where it is JSON, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


# --- What the containers see ---------------------------------------------------------------------


def _mounts(file: RunFile, dataset: str, root: str) -> list[docker.types.Mount]:
    """Local folders at the same paths, so that results name the places that a person knows."""
    mounts: dict[str, docker.types.Mount] = {}
    place = storage.local_path(root)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        mounts[str(place)] = docker.types.Mount(str(place), str(place), type="bind")
    for text in (dataset, *_texts(file.to_dict())):
        path = Path(text.rpartition("@")[2])
        if path.is_absolute() and path.exists() and str(path) not in mounts:
            mounts[str(path)] = docker.types.Mount(
                str(path), str(path), type="bind", read_only=True
            )
    if dataset and storage.local_path(dataset) and not Path(dataset).exists():
        raise ConfigError(f"The dataset {dataset} does not exist. Check the path.")
    return list(mounts.values())


def _texts(obj: tp.Any) -> Iterator[str]:
    if isinstance(obj, dict):
        for value in obj.values():
            yield from _texts(value)
    elif isinstance(obj, list):
        for value in obj:
            yield from _texts(value)
    elif isinstance(obj, str):
        yield obj


class _Containers:
    """Runs one container per step, with the limits that a restricted pod has."""

    def __init__(self, cfg: LocalRun, mounts: list[docker.types.Mount]):
        self.run_id = uuid.uuid4().hex[:12]
        self.interrupted = False
        self.failures: list[str] = []
        self._lock = threading.Lock()
        self._images = (cfg.image, cfg.cpu_image)
        self._settings: dict[str, tp.Any] = {
            "mounts": mounts,
            "environment": {key: os.environ[key] for key in _ENV if os.environ.get(key)},
            "network_mode": cfg.network,
            "user": cfg.user or f"{os.getuid()}:0",
            "labels": {LABEL: self.run_id},
            "read_only": True,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "shm_size": "1g",
        }
        if cfg.gpus:
            request = docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])
            self._settings["device_requests"] = [request]

    def check_images(self) -> None:
        """Raises ConfigError if there is no Docker, or an image is not here."""
        try:
            client = docker.from_env()
        except docker.errors.DockerException as err:
            raise ConfigError(
                f"Docker cannot be used ({err}). Install it, start it, and see that you may use it."
            ) from err
        with contextlib.closing(client):
            for image in self._images:
                try:
                    client.images.get(image)
                except docker.errors.ImageNotFound as err:
                    raise ConfigError(
                        f"There is no image {image} on this machine. Build it: make image "
                        f"IMAGE={self._images[0]} CPU_IMAGE={self._images[1]}"
                    ) from err

    def run(
        self,
        client: docker.DockerClient,
        image: str,
        command: list[str],
        volumes: dict[str, tp.Any],
        **more: tp.Any,
    ) -> int:
        """In place of kfp's `run_docker_container`: the exit status is the container's own.

        kfp removes a container as soon as it ends, and where that is faster than its look at the
        exit status, it reports success.
        """
        del more
        step = _describe(command)
        with self._lock:
            if self.interrupted:
                return 130
        scratch = tempfile.mkdtemp(prefix="saev-step-")
        Path(scratch).chmod(0o1777)
        try:
            container = client.containers.create(
                image=image,
                entrypoint=command[:1],
                command=command[1:],
                volumes={**volumes, scratch: {"bind": "/tmp", "mode": "rw"}},
                **self._settings,
            )
            try:
                return self._follow(container, step)
            finally:
                container.remove(force=True)
        except docker.errors.APIError as err:
            self._fail(f"The container of {step} could not be run: {err.explanation or err}.")
            return 125
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _follow(self, container: docker.models.containers.Container, step: str) -> int:
        with self._lock:
            if self.interrupted:
                return 130
            container.start()
        began, tail = time.monotonic(), ""
        for line in _lines(container.logs(stream=True, follow=True)):
            sys.stderr.write(f"[{step}] {line}\n")
            tail = line or tail
        status = int(container.wait()["StatusCode"])
        if status:
            self._fail(f"The step {step} ended with exit status {status}: {tail.strip()}")
        seconds = time.monotonic() - began
        how = "done" if status == 0 else f"failed, exit status {status},"
        sys.stderr.write(f"[{step}] {how} after {seconds:.0f} s\n")
        return status

    def _fail(self, message: str) -> None:
        with self._lock:
            self.failures.append(message)

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop the containers; the steps leave their resume points."""

        def stop(signum: int, frame: object) -> None:
            del signum, frame
            self.interrupted = True  # without the lock, which this very thread may hold
            threading.Thread(target=self._stop_all, daemon=True).start()

        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop_all(self) -> None:
        sys.stderr.write("Stopping the containers …\n")
        with contextlib.closing(docker.from_env()) as client:
            found = client.containers.list(filters={"label": f"{LABEL}={self.run_id}"})
            threads = [
                threading.Thread(target=c.stop, kwargs={"timeout": STOP_SECONDS}) for c in found
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()


def _lines(chunks: tp.Iterable[bytes]) -> Iterator[str]:
    """Whole lines of a stream whose chunks end anywhere."""
    rest = io.BytesIO()
    for chunk in chunks:
        rest.write(chunk)
        if b"\n" in chunk:
            *whole, last = rest.getvalue().split(b"\n")
            yield from (line.decode("utf-8", "replace").rstrip("\r") for line in whole)
            rest = io.BytesIO()
            rest.write(last)
    if rest.getvalue():
        yield rest.getvalue().decode("utf-8", "replace")


def _describe(command: list[str]) -> str:
    """The step's name, and its item's where it has one."""
    step = command[command.index("step") + 1] if "step" in command[:-1] else " ".join(command[:3])
    if "--run" in command[:-1]:
        return f"{step}: SAE {storage.name(command[command.index('--run') + 1])}"
    if "--item" in command[:-1]:
        with contextlib.suppress(json.JSONDecodeError, AttributeError):
            item = json.loads(command[command.index("--item") + 1])
            return f"{step}: {item['name']}"
    return step


# --- Loops ---------------------------------------------------------------------------------------

_kfp_run_loop = enhanced_dag_orchestrator._run_parallel_for_task


def _run_loop(*, task_spec: tp.Any, io_store: tp.Any, **more: tp.Any) -> bool:
    """kfp's own, with what other steps wrote put in as constants.

    By itself it looks for the list of a loop among the inputs of the graph only, and takes every
    other output of a step for the loop's item.
    """
    resolved = type(task_spec)()
    resolved.CopyFrom(task_spec)
    for name, spec in resolved.inputs.parameters.items():
        if spec.HasField("task_output_parameter"):
            output = spec.task_output_parameter
            value = io_store.get_task_output(output.producer_task, output.output_parameter_key)
            spec.runtime_value.constant.CopyFrom(pipeline_spec_builder.to_protobuf_value(value))
            if name == resolved.parameter_iterator.items.input_parameter:
                io_store.put_parent_input(name, value)
    return bool(_kfp_run_loop(task_spec=resolved, io_store=io_store, **more))
