"""Runs the steps of a pipeline on this machine, in containers or in plain processes."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import typing as tp
from collections.abc import Iterator
from pathlib import Path

import docker
import docker.errors
import docker.models.containers
import docker.types

from saev import distributions
from saev.config.environment import CONFIG_ENV, SECRET_ENV
from saev.errors import ConfigError

LABEL = "saev.run-local"
"""Label of the containers. Its value is the run's id."""
STOP_SECONDS = 30
"""How long a step may take to stop before it is killed, as on Kubernetes."""

_ENV = (*SECRET_ENV, *CONFIG_ENV)


class Runner:
    """Runs steps. Several threads may use it. Subclasses implement containers and processes."""

    def __init__(self) -> None:
        self.interrupted = False
        self.failures: list[str] = []
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise ConfigError if steps cannot be run on this machine."""

    def run(self, image: str, command: list[str], outputs: str) -> int:
        """Run one step. Its output goes to standard error.

        Args:
            image: the step's image.
            command: its complete command.
            outputs: folder for its KFP outputs.

        Returns:
            Its exit status.
        """
        raise NotImplementedError

    def stop(self) -> None:
        """Ask all running steps to stop, and kill those that take longer than STOP_SECONDS."""
        raise NotImplementedError

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """While the block runs, Ctrl-C and SIGTERM stop the steps, which write resume points."""

        def stop(signum: int, frame: object) -> None:
            del signum, frame
            if not self.interrupted:
                self.interrupted = True  # without the lock, because this thread may hold it
                sys.stderr.write("Stopping the steps …\n")
                threading.Thread(target=self.stop, daemon=True).start()

        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _report(self, lines: tp.Iterable[str], step: str, wait: tp.Callable[[], int]) -> int:
        """Pass on a step's output, and print how it ended. Returns its exit status."""
        began, tail = time.monotonic(), ""
        for line in lines:
            sys.stderr.write(f"[{step}] {line}\n")
            tail = line or tail
        status = wait()
        if status:
            self._fail(f"The step {step} ended with exit status {status}: {tail.strip()}")
        how = "done" if status == 0 else f"failed, exit status {status},"
        sys.stderr.write(f"[{step}] {how} after {time.monotonic() - began:.0f} s\n")
        return status

    def _fail(self, message: str) -> None:
        with self._lock:
            self.failures.append(message)


class Processes(Runner):
    """Runs steps as processes of this Python, without isolation and without an image."""

    def __init__(self) -> None:
        super().__init__()
        self._running: set[subprocess.Popen[bytes]] = set()

    def check(self) -> None:
        """See :meth:`Runner.check`."""
        if not distributions.is_installed(distributions.LIBRARY):
            raise ConfigError(
                f"Steps as processes need {distributions.LIBRARY} (with torch) in this environment "
                f"({sys.prefix}); it has the client only. Install it (in a checkout: `make "
                "setup`), or leave out --runner process and use Docker."
            )

    def run(self, image: str, command: list[str], outputs: str) -> int:
        """See :meth:`Runner.run`. The image is not used."""
        del image, outputs
        with self._lock:
            if self.interrupted:
                return 130
            # The step gets its own session, so Ctrl-C reaches it only as our SIGTERM.
            process = subprocess.Popen(
                [sys.executable, *command[1:]],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process)
        assert process.stdout is not None
        try:
            lines = (line.decode("utf-8", "replace").rstrip() for line in process.stdout)
            return self._report(lines, describe(command), process.wait)
        finally:
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        """See :meth:`Runner.stop`."""
        with self._lock:
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


class Containers(Runner):
    """Runs steps as Docker containers, with the restrictions of a restricted pod.

    Args:
        run_id: value of the containers' label.
        images: the images that must exist on this machine.
        mounts: the folders of this machine that the containers see.
        network: Docker network.
        user: UID:GID.
        gpus: whether the containers get the GPUs.
    """

    def __init__(
        self,
        run_id: str,
        images: tuple[str, ...],
        mounts: list[docker.types.Mount],
        *,
        network: str,
        user: str,
        gpus: bool,
    ):
        super().__init__()
        self._run_id, self._images = run_id, images
        self._settings: dict[str, tp.Any] = {
            "mounts": mounts,
            "environment": {key: os.environ[key] for key in _ENV if os.environ.get(key)},
            "network_mode": network,
            "user": user or f"{os.getuid()}:0",
            "labels": {LABEL: run_id},
            "read_only": True,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "shm_size": "1g",
        }
        if gpus:
            request = docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])
            self._settings["device_requests"] = [request]

    def check(self) -> None:
        """Raise ConfigError if Docker cannot be used, or an image is missing."""
        try:
            client = docker.from_env()
        except docker.errors.DockerException as err:
            raise ConfigError(
                f"Docker cannot be used ({err}). Install it, start it, and check that you may use "
                "it; or run the steps without it: --runner process."
            ) from err
        with contextlib.closing(client):
            for image in self._images:
                try:
                    client.images.get(image)
                except docker.errors.ImageNotFound as err:
                    raise ConfigError(
                        f"There is no image {image} on this machine. Build it: make image "
                        f"IMAGE={self._images[0]} CPU_IMAGE={self._images[-1]}"
                    ) from err

    def run(self, image: str, command: list[str], outputs: str) -> int:
        """See :meth:`Runner.run`.

        The container is removed after its exit status is read. kfp lets Docker remove it at its
        end. If Docker is faster than kfp's question, kfp reports a failed container as a success.
        """
        step = describe(command)
        scratch = tempfile.mkdtemp(prefix="saev-step-")
        Path(scratch).chmod(0o1777)
        try:
            with contextlib.closing(docker.from_env()) as client:
                container = client.containers.create(
                    image=image,
                    entrypoint=command[:1],
                    command=command[1:],
                    volumes={
                        outputs: {"bind": outputs, "mode": "rw"},
                        scratch: {"bind": "/tmp", "mode": "rw"},
                    },
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
        lines = _lines(container.logs(stream=True, follow=True))
        return self._report(lines, step, lambda: int(container.wait()["StatusCode"]))

    def stop(self) -> None:
        """See :meth:`Runner.stop`."""
        with contextlib.closing(docker.from_env()) as client:
            found = client.containers.list(filters={"label": f"{LABEL}={self._run_id}"})
            threads = [
                threading.Thread(target=c.stop, kwargs={"timeout": STOP_SECONDS}) for c in found
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()


def _lines(chunks: tp.Iterable[bytes]) -> Iterator[str]:
    """The complete lines of a stream of chunks."""
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


def describe(command: list[str]) -> str:
    """A step's name in the output, with the name of its slot if it has one."""
    step = command[command.index("step") + 1] if "step" in command[:-1] else " ".join(command[:3])
    name = (
        command[command.index("--slot") + 1].partition(":")[2] if "--slot" in command[:-1] else ""
    )
    return f"{step}:{name}" if name else step
