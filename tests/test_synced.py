"""Pages that were copied from object storage into a folder, as `aws s3 sync` does."""

import json
from pathlib import Path

import fsspec
import pytest
from visuals import chromium

from saev import run
from saev.config import FakeImg
from saev.config.run import RunConfig

FILE = """
[shards]
family = "timm"
ckpt = "test_vit/random"
image_size = 64
layers = [-1]

[train]
n_train = 400
sweep = "sweep.toml"

[train.sae]
d_sae = 32

[visuals]
n_latents = 2
"""


def links(tab: chromium.Page) -> list[str]:
    """Where the page links to, other pages only."""
    found = tab.js("JSON.stringify([...document.links].map(a => a.href.split('#')[0]))")
    here = tab.js("location.href").split("#")[0]
    return sorted(set(json.loads(found)) - {here})


@pytest.mark.slow
@pytest.mark.skipif(chromium.BINARY is None, reason=chromium.MISSING)
def test_a_copy_of_a_root_works_without_a_server(s3: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text("[sae.activation]\ntop_k = [2, 4]\n")
    (tmp_path / "job.toml").write_text(FILE)
    run.run(
        RunConfig(
            config=str(tmp_path / "job.toml"), root=f"{s3}/synced", data=FakeImg(n_examples=24)
        )
    )
    copy = tmp_path / "a copy"
    fs, path = fsspec.core.url_to_fs(f"{s3}/synced")
    fs.get(path, str(copy), recursive=True)
    root = (copy / "index.html").as_uri()
    with chromium.browser() as tab:
        tab.open(root)
        books = links(tab)
        assert len(books) == 2
        for book in books:
            tab.open(book)
            tab.wait("document.querySelectorAll('canvas[data-drawn]').length > 3")  # pictures
            assert root in links(tab), "there is no way back"
        assert tab.problems() == []
        assert all(
            url.startswith(("file://", "data:", "about:", "blob:")) for url in tab.requested()
        )
