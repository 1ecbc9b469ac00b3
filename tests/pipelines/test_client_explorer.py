"""`make explorer`: a port that is forwarded to the explorer's pod, or the URL of the settings."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from client import Client
from kube_server import KubeServer

ROOT = Path(__file__).parents[2]


class _Explorer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"for {self.headers['Host'].partition(':')[0]}".encode())

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def installed(kube: KubeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeServer]:
    """A pod of the explorer in a profile's namespace."""
    labels = {"app.kubernetes.io/component": "explorer"}
    kube.add("services", "saev-explorer", "team-a", spec={"selector": labels})
    status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
    spec = {"containers": [{"name": "explorer", "image": "i"}]}
    kube.add("pods", "saev-explorer-0", "team-a", labels=labels, spec=spec, status=status)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Explorer)
    Thread(target=server.serve_forever, daemon=True).start()
    kube.forwards["saev-explorer-0"] = server.server_port
    monkeypatch.setenv("KFP_NAMESPACE", "team-a")
    yield kube
    server.shutdown()
    server.server_close()


def test_a_port_is_forwarded_until_ctrl_c(installed: KubeServer) -> None:
    command = [sys.executable, "-m", "pipelines", "explorer", "--no-browser"]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://localhost:\d+/", address), process.communicate()[1]
        answer = urllib.request.urlopen(address.replace("localhost", "127.0.0.1"), timeout=60)
        assert answer.read().decode() == "for 127.0.0.1"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Ctrl-C ends it." in err
    finally:
        process.kill()


def test_a_url_of_the_settings_needs_no_cluster(client: Client, home: Path) -> None:
    url = "https://kubeflow.test/saev-explorer"
    home.joinpath("cluster.toml").write_text(f'explorer = "{url}/"\n')
    assert client.ok("explorer", "--no-browser").out == f"{url}/\n"


def test_without_it_the_component_is_named(
    client: Client, kube: KubeServer, installed: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_NAMESPACE", "team-b")
    said = client.fails("explorer", "--no-browser")
    assert said.startswith("There is no service saev-explorer in namespace team-b")
    assert "COMPONENTS=explorer" in said
