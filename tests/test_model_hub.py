"""A model hub that does not answer: one line, and its cache is used."""

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from saev import hub, load_sae, vit
from saev.errors import CheckpointError, ModelError
from saev.storage import is_passing


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A client that has asked nothing yet, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.problem.cache_clear()
    yield
    hub.problem.cache_clear()


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("name", ["no host", "no server", "silent"])
def test_it_is_asked_once(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub, "_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        places = {
            "no host": "http://no-such-host.invalid",
            "no server": closed_port(),
            "silent": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        monkeypatch.setattr(constants, "ENDPOINT", places[name])
        for _ in range(2):
            with pytest.raises(ModelError, match=r"from the model hub \(\w+: .*name a weights fil"):
                vit.load("timm", "vit_small_patch14_dinov2.lvd142m")
        with pytest.raises(ModelError, match="Without internet access"):
            vit.load("clip", "ViT-B-16/openai")
        with pytest.raises(CheckpointError, match="Cannot download hf-hub:org/sae"):
            load_sae("hf-hub:org/sae")
    told = [r for r in caplog.records if r.levelname == "WARNING" and "hub" in r.getMessage()]
    assert len(told) == 1
    assert f"The model hub {places[name]} cannot be reached" in told[0].getMessage()


def test_a_network_that_is_away_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a pod tries again."""
    monkeypatch.setattr(constants, "ENDPOINT", closed_port())
    with pytest.raises(ModelError) as caught:
        vit.load("timm", "vit_small_patch14_dinov2.lvd142m")
    assert is_passing(caught.value)


def test_one_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it answers to a question without a name."""

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.problem() is None
        server.shutdown()
    assert not constants.HF_HUB_OFFLINE


def test_who_is_offline_on_purpose_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://no-such-host.invalid")
    assert hub.problem() is None
