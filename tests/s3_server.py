"""A real S3 server for tests: moto in a process of its own, spoken to over HTTP."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

BUCKET = "saev-tests"

SERVE = """
import threading
from moto import server
from moto.s3.responses import S3Response

lock, put_object = threading.Lock(), S3Response.put_object

def put_object_in_one_step(self):  # as S3 does; moto looks (If-None-Match) and then stores
    with lock:
        return put_object(self)

S3Response.put_object = put_object_in_one_step
server.main()
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Environment variables point to the server inside; yields the URL of an empty bucket."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", SERVE, "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        wait_for(endpoint, server)
        request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        yield f"s3://{BUCKET}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=20)
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def wait_for(endpoint: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the S3 server ended with status {server.returncode}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(endpoint, timeout=5).close()
            return
        time.sleep(0.1)
    raise RuntimeError("the S3 server did not start within a minute")
