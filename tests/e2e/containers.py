"""Docker for end-to-end tests: containers as restricted as on a cluster, and saev's images."""

import os
import shutil
import subprocess
import typing as tp
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
USER = "12345:0"
"""Any user that no image knows, in group 0: what OpenShift gives, and what the images promise."""

RESTRICTED = (
    "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges",
    "--network=none", f"--user={USER}",
)  # fmt: skip
"""The restricted Pod Security Standard, a read-only root file system, and nobody to talk to."""


class Unavailable(Exception):
    """Docker cannot be used here; the message says why and what would help."""


class Images(tp.NamedTuple):
    """Names of the project's images."""

    gpu: str
    """The runtime image, with torch."""
    cpu: str
    """The small one."""


def find_client() -> str:
    """Path of a docker client that can build with BuildKit and has a daemon.

    Raises:
        Unavailable: there is none.
    """
    names = [os.environ["DOCKER"]] if os.environ.get("DOCKER") else ["docker"]
    folders = os.environ.get("PATH", "").split(os.pathsep)
    found = [path for folder in folders if (path := shutil.which(names[0], path=folder))]
    if not found:
        raise Unavailable("There is no docker command (apt-get install docker.io).")
    problem = ""
    for path in found:
        daemon = subprocess.run([path, "version"], capture_output=True, text=True)
        if daemon.returncode:
            problem = f"No Docker daemon answers: {(daemon.stderr.splitlines() or ['?'])[-1]}"
            continue
        buildkit = subprocess.run(
            [path, "build", "--help"],
            capture_output=True,
            env=os.environ | {"DOCKER_BUILDKIT": "1"},
        )
        if buildkit.returncode == 0:
            return path
        problem = f"{path} cannot build with BuildKit (its plugin docker-buildx is missing)."
    raise Unavailable(problem)


class Container(tp.NamedTuple):
    """A container that was started."""

    client: str
    id: str

    def kill(self, signal: str) -> None:
        """Send a signal to its first process."""
        _docker(self.client, "kill", f"--signal={signal}", self.id)

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        return int(_docker(self.client, "wait", self.id))

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return _docker(self.client, "inspect", "--format={{.State.Running}}", self.id) == "true"

    def logs(self) -> str:
        """What it has printed so far."""
        both = subprocess.run(
            [self.client, "logs", self.id], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return both.stdout.decode(errors="replace")

    def remove(self) -> None:
        """Stop and delete it."""
        _docker(self.client, "rm", "--force", "--volumes", self.id)


class Docker:
    """A docker client whose containers are restricted.

    Args:
        client: path of the command.
    """

    def __init__(self, client: str):
        self.client = client
        self._started: list[Container] = []

    def run(
        self, image: str, *args: object, **options: tp.Any
    ) -> "subprocess.CompletedProcess[str]":
        """Run a container to its end, with `start`'s options; the status is not checked."""
        command = [self.client, "run", "--rm", *_flags(**options), image, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True)

    def start(self, image: str, *args: object, **options: tp.Any) -> Container:
        """Start a container; it is removed when the session ends, if not before.

        Keyword Args:
            mounts: folder of this machine → where it is in the container.
            env: variables.
            entrypoint: a command in place of the image's.
            flags: further flags of `docker run`; the last of two that contradict each other holds.
        """
        words = ["run", "--detach", *_flags(**options), image, *map(str, args)]
        container = Container(self.client, _docker(self.client, *words))
        self._started.append(container)
        return container

    def inspect(self, image: str, template: str) -> str:
        """A Go template filled in with what is known of an image."""
        return _inspect(self.client, image, template)

    def close(self) -> None:
        """Remove the containers that are left."""
        for container in self._started:
            subprocess.run(
                [self.client, "rm", "--force", "--volumes", container.id], capture_output=True
            )


def build(client: str, base: str, tag: str = "e2e") -> Images:
    """Both images, by the script that `make image` calls.

    Args:
        client: path of the docker command.
        base: name of the image that both stand on.
        tag: tag of the results; images that it named before are deleted.
    """
    images = Images(f"saev:{tag}", f"saev-cpu:{tag}")
    before = [_id(client, name) for name in images]
    subprocess.run(
        [ROOT / "images/build.sh"],
        check=True,
        env=os.environ
        | {"DOCKER": client, "IMAGE": images.gpu, "CPU_IMAGE": images.cpu, "PUSH": "0"}
        | {"BASE_IMAGE": base, "CPU_BASE_IMAGE": base, "BUILD_ARGS": "--quiet --network host"},
    )
    for old in before:
        if _inspect(client, old, "{{len .RepoTags}}") == "0":
            subprocess.run([client, "image", "rm", old], capture_output=True)
    return images


def _id(client: str, name: str) -> str:
    return _inspect(client, name, "{{.Id}}")


def _inspect(client: str, image: str, template: str) -> str:
    """What is known of an image; empty if there is none."""
    found = subprocess.run(
        [client, "image", "inspect", f"--format={template}", image], capture_output=True, text=True
    )
    return found.stdout.strip() if found.returncode == 0 else ""


def _flags(
    mounts: Mapping[Path, str] | None = None,
    env: Mapping[str, str] | None = None,
    entrypoint: str = "",
    flags: tp.Sequence[str] = (),
) -> list[str]:
    volumes = [f"--volume={folder}:{place}" for folder, place in (mounts or {}).items()]
    variables = [f"--env={key}={value}" for key, value in (env or {}).items()]
    command = [f"--entrypoint={entrypoint}"] if entrypoint else []
    return [*RESTRICTED, *volumes, *variables, *command, *flags]


def _docker(client: str, *args: str) -> str:
    done = subprocess.run([client, *args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"docker {args[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()
