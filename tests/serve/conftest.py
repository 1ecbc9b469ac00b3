"""A root with small SAEs that were really trained; two were measured."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from visuals.chain import write_photos

from saev import inference, storage, train, visuals
from saev.config import (
    DataConfig,
    ImgSegFolder,
    InferenceConfig,
    LoaderConfig,
    SaeConfig,
    ShardsConfig,
    TopK,
    TrainConfig,
    VisualsConfig,
)
from saev.serve import access, app
from saev.serve.cache import ByteCache
from saev.serve.catalogue import Catalogue
from saev.serve.explorer import Explorer
from saev.serve.measured import Measured
from saev.shards import extract


def make_root(root: Path) -> str:
    """Labelled images, an untrained ViT of 4 × 4 patches, SAEs of 48 latents. One has a report."""
    write_photos(str(root / "photos"), n=12)
    shards = extract.run(
        ShardsConfig(
            shards_root=str(root / "shards"), family="visuals-test", ckpt="tiny", layers=(1,),
            batch_size=8, device="cpu", data=ImgSegFolder(root=str(root / "photos")),
        )
    )  # fmt: skip
    for k in (2, 4, 6):
        cfg = TrainConfig(
            runs_root=str(root / "runs"), n_train=600, batch_size=16, device="cpu",
            sae=SaeConfig(d_sae=48, activation=TopK(top_k=k)),
            train_data=LoaderConfig(shards=shards, val_fraction=0.25),
        )  # fmt: skip
        (run,) = train.run(cfg)
        if k < 6:
            inference.run(InferenceConfig(run=run, data=DataConfig(shards=shards), device="cpu"))
        if k == 4:
            visuals.run(VisualsConfig(run=run, shards=shards))
    return storage.normalize(str(root))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_root(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="session")
def measured(root: str) -> Measured:
    """The tables of an SAE, read as the server reads them."""
    entry = next(e for e in Catalogue.of(root).entries() if e.figures["top_k"] == 2)
    return Measured(entry, ByteCache(64 << 20))


class Client:
    """Asks a server of its own, through a socket."""

    def __init__(self, port: int):
        self.port = port

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> tuple[int, Message, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body=body, headers=named)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.headers, data

    def get(self, path: str) -> Any:
        """JSON of an address that answers."""
        status, _, data = self.ask(path)
        assert status == 200, (path, status, data)
        return json.loads(data)


@contextlib.contextmanager
def serving(application: Any) -> Iterator[Client]:
    """The application on a port of its own, until the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(application, log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Client(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def client(root: str) -> Iterator[Client]:
    """A server as `saev serve` starts it."""
    explorer = Explorer(Catalogue.of(root), memory_mb=1024)
    with serving(app.make(explorer, access.Rules.of("127.0.0.1", (), ""))) as found:
        yield found
