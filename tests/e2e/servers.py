"""Real servers for end-to-end tests: an S3 server and a Kubernetes API, each a child of the test.

Both are context managers, so that any test, script or shell can hold one; the fixtures of the same
kind skip with the reason where a program is missing.
"""

import contextlib
import secrets
import signal
import socket
import subprocess
import tempfile
import time
import typing as tp
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import compiled
import pytest
from botocore.config import Config

_START_SECONDS = 120


class S3Server(tp.NamedTuple):
    """A running S3 server with one empty bucket."""

    endpoint: str
    """Reachable from this machine, and from containers if the server listens on their address."""
    bucket: str
    """URL of the bucket."""
    env: dict[str, str]
    """What a client needs in its environment: endpoint, credentials, region."""


@contextlib.contextmanager
def s3_server(host: str = "127.0.0.1", bucket: str = "saev-e2e") -> Iterator[S3Server]:
    """An S3 server (versitygw over a temporary folder) that ends with the block.

    Args:
        host: address to listen on: the loopback one, which containers with host networking
            share, or that of a container network's bridge.
        bucket: name of the bucket to create.

    Raises:
        compiled.Unavailable: there is no program and it cannot be built.
    """
    program = compiled.find(compiled.VERSITYGW)
    with tempfile.TemporaryDirectory(prefix="saev-s3-") as folder:
        (Path(folder) / "objects").mkdir()
        (Path(folder) / "metadata").mkdir()
        port = free_port(host)
        env = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": f"saev{secrets.token_hex(8)}",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        # The sidecar folder: not every file system that /tmp may be on has extended attributes.
        command = [program, "--quiet", "--keep-alive", "--port", f"{host}:{port}"]
        command += ["--region", env["AWS_DEFAULT_REGION"], "posix"]
        command += ["--sidecar", f"{folder}/metadata", f"{folder}/objects"]
        root = {
            "ROOT_ACCESS_KEY": env["AWS_ACCESS_KEY_ID"],
            "ROOT_SECRET_KEY": env["AWS_SECRET_ACCESS_KEY"],
        }
        with child(command, root, Path(folder) / "server.log") as process:
            wait_until(lambda: _answers(env["AWS_ENDPOINT_URL"]), process, "the S3 server")
            client(env).create_bucket(Bucket=bucket)
            yield S3Server(env["AWS_ENDPOINT_URL"], f"s3://{bucket}", env)


def client(env: dict[str, str]) -> tp.Any:
    """A boto3 client for the server that ``env`` names."""
    return boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region_name=env["AWS_DEFAULT_REGION"],
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 3}),
    )


@pytest.fixture(scope="session")
def compiled_s3() -> Iterator[S3Server]:
    """A compiled S3 server on the loopback address."""
    with _or_skip(), s3_server() as server:
        yield server


# --- Processes -----------------------------------------------------------------------------


@contextlib.contextmanager
def _or_skip() -> Iterator[None]:
    try:
        yield
    except compiled.Unavailable as err:
        pytest.skip(str(err))


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on at ``host``."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def child(
    command: list[tp.Any], env: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that gets SIGTERM when the block ends; what it prints goes to ``log``."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(word) for word in command], env={**_base_env(), **env}, stdout=out, stderr=out
        )
    process.log = log  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _base_env() -> dict[str, str]:
    """No proxies, credentials or settings of the caller reach a server."""
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    """Return once ``ready`` holds. Raises RuntimeError if the process ends or takes too long."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{what} ended with status {process.returncode}")
        if ready():
            return
        time.sleep(0.1)
    raise RuntimeError(f"{what} did not answer within {_START_SECONDS} s")


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
