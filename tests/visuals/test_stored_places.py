"""What shards and reports name is opened only where it must lie; all else only on a user's word."""

import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from described import list_files

from saev import storage
from saev.errors import ConfigError, SaevError
from saev.shards import Shards
from saev.visuals.source import Source
from visuals.chain import Chain


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A URL of this machine, and what was asked of it."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()


def naming(chain: Chain, tmp_path: Path, data: dict[str, object]) -> Shards:
    """Shards whose metadata was written by somebody else."""
    folder = tmp_path / "shards"
    shutil.copytree(chain.shards, folder)
    metadata = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({**metadata, "data": data}))
    list_files(str(folder))
    return Shards.open(str(folder))


HOSTILE = [
    {"kind": "img-folder", "root": "URL/photos"},
    {"kind": "img-seg-folder", "root": "URL/photos"},
    {"kind": "img-folder", "root": "zip://::URL/photos.zip"},
    {"kind": "img-folder", "root": "simplecache::URL/photos"},
    {"kind": "img-folder", "root": "URL/*/photos"},
    {"kind": "imagenet", "name": "URL/saved"},
    {"kind": "cifar10", "name": "somebody/cifar10"},
    {"kind": "imagenet", "name": "/proc/self"},
    {"kind": "img-folder", "root": "s3://somebodys-bucket/photos"},
    {"kind": "img-folder", "root": "/"},
    {"kind": "img-folder", "root": "/proc/self/cwd"},
    {"kind": "img-folder", "root": "photos"},
    {"kind": "img-seg-folder", "root": "/data", "split": "../../../etc"},
    {"kind": "img-seg-folder", "root": "/data", "mask_map": "../../../etc/passwd"},
    {"kind": "img-seg-folder", "root": "/data", "mask_map": "URL/map.csv"},
    {"kind": "img-seg-folder", "root": "/data", "mask_map": "/proc/self/environ"},
]


@pytest.mark.parametrize("data", HOSTILE, ids=lambda d: "-".join(d.values()))
def test_places_that_are_not_opened(
    chain: Chain, tmp_path: Path, server: tuple[str, list[str]], data: dict[str, str]
) -> None:
    url, asked = server
    raw: dict[str, object] = {k: v.replace("URL", url) for k, v in data.items()}
    with pytest.raises(ConfigError, match=r"metadata\.json names"):
        Source(naming(chain, tmp_path, raw))
    assert asked == []


def test_a_user_may_name_them(chain: Chain, tmp_path: Path, server: tuple[str, list[str]]) -> None:
    url, asked = server
    data = {"kind": "img-seg-folder", "root": f"{url}/photos"}
    shards = naming(chain, tmp_path, data)
    with pytest.raises(ConfigError, match=rf"data:img-seg-folder --data\.root {url}/photos"):
        Source(shards)
    with pytest.raises(SaevError):
        Source(shards, chain.config(data=data).data)
    assert asked


def test_links_out_of_the_images(chain: Chain, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(chain.photos, photos)
    (photos / "classes.csv").unlink()
    (photos / "classes.csv").symlink_to(Path(chain.photos) / "classes.csv")
    data = json.loads((Path(chain.shards) / "metadata.json").read_text())["data"]
    shards = naming(chain, tmp_path, {**data, "root": str(photos)})
    with pytest.raises(ConfigError, match=r"photos/classes\.csv is a link to .*only if you name"):
        Source(shards)
    named = Source(shards, chain.config(data={**data, "root": str(photos)}).data)
    assert named.class_names[2] == "ramp"


# --- Results ---------------------------------------------------------------------------------


def test_the_name_of_shards_in_a_result(chain: Chain, tmp_path: Path) -> None:
    """The page of a root looks up their dataset by it."""
    from saev.visuals import overview

    root = tmp_path / "root"
    shutil.copytree(chain.run, root / "runs/r0")
    storage.write_json(str(root / "runs/r0/run.json"), {})
    (tmp_path / "metadata.json").write_text('{"dataset": "what is outside"}')
    (place,) = (root / "runs/r0/inference").glob("*/metrics.json")
    metrics = storage.read_sealed(place).record
    place.write_text(json.dumps(storage.seal({**metrics, "shards_hash": "../.."})))
    (section,) = overview.collect(str(root))
    assert section.dataset == ""


def test_results_of_an_earlier_version_are_replaced_on_pages(chain: Chain, tmp_path: Path) -> None:
    """One measures again after an upgrade, and the SAE is not there twice."""
    from saev.visuals import overview

    root = tmp_path / "root"
    shutil.copytree(chain.run, root / "runs/r0")
    storage.write_json(str(root / "runs/r0/run.json"), {})
    (new,) = (root / "runs/r0/inference").iterdir()
    old = shutil.copytree(new, new.with_name("0" * 16))
    metrics = json.loads((old / "metrics.json").read_text())
    del metrics["files"]["tables.json"], metrics["checksum"]
    (old / "tables.json").unlink()
    (old / "metrics.json").write_text(json.dumps(storage.seal(metrics)))
    (section,) = overview.collect(str(root))
    assert [Path(row.results) for row in section.rows] == [new]
    shutil.rmtree(new)
    (section,) = overview.collect(str(root))
    assert [Path(row.results) for row in section.rows] == [old]


def test_the_page_of_a_root_needs_no_pyarrow(chain: Chain, tmp_path: Path) -> None:
    """The step `report` runs in the image saev-cpu, which has none."""
    root = tmp_path / "root"
    shutil.copytree(chain.run, root / "runs/r0")
    storage.write_json(str(root / "runs/r0/run.json"), {})
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from saev.visuals import overview\n"
        f"(section,) = overview.collect({str(root)!r})\n"
        "print(section.rows[0].results)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "/inference/" in done.stdout, done.stderr
