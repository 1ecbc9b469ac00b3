"""The notebooks run on real data, and what they return is what `saev visuals` then draws."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pasted
import pytest
import small_root
import test_site
import torch
from PIL import Image
from visuals import chromium

from saev import cli, tables

NOTEBOOKS = Path(__file__).parents[1] / "saev" / "notebooks"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_root.make(tmp_path_factory.mktemp("a root"), (4, 8), not_measured=(16,))


CHARTS = """(() => {
  const all = [];
  const walk = node => { for (const e of node.querySelectorAll('*')) {
    if (e.tagName == 'CANVAS') all.push(e.getBoundingClientRect());
    if (e.shadowRoot) walk(e.shadowRoot);
  } };
  walk(document);
  return all;
})()"""
"""JavaScript for the places of all charts."""


def notebook(name: str) -> ModuleType:
    return load(NOTEBOOKS / f"{name}.py")


def load(path: Path) -> ModuleType:
    """A file as a module, whatever its folder."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(command: str, capsys: pytest.CaptureFixture) -> list[int]:
    """Run a pasted command; returns the latents in the report that it makes."""
    page = Path(pasted.run(command, capsys)[0].strip())
    return json.loads((page.parent / "visuals.json").read_text())["latents"]


@pytest.mark.slow
def test_what_is_between_the_thresholds(root: Path, capsys: pytest.CaptureFixture) -> None:
    _, found = notebook("metrics").app.run(defs={"root": str(root)})
    assert len(found["saes"]) == 3
    assert len(found["curves"]) == 3
    latents = tables.latents(found["sae"].inference).to_pandas()
    (f_low, f_high), (v_low, v_high) = found["frequency_range"].value, found["value_range"].value
    expected = latents[
        (latents.frequency >= 10**f_low) & (latents.frequency <= 10**f_high)
        & (latents.mean_value >= 10**v_low) & (latents.mean_value <= 10**v_high)
    ]  # fmt: skip
    assert 0 < len(expected) < len(latents)
    pd.testing.assert_frame_equal(found["within"], expected[found["within"].columns])
    assert drawn(found["threshold_command"], capsys) == list(expected.latent)


def test_what_is_in_the_rectangle(root: Path) -> None:
    """The browser sends the rectangle's edges in units of the axes."""
    _, found = notebook("metrics").app.run(defs={"root": str(root)})
    assert found["brush_command"] == ""
    latents = tables.latents(found["sae"].inference).to_pandas()
    alive = latents[latents.frequency > 0]
    edges = {key: alive[key].quantile([0.25, 0.75]).tolist() for key in ("frequency", "mean_value")}
    found["brush"]._update({"select_interval": edges})
    inside = latents.frequency.between(*edges["frequency"])
    inside &= latents.mean_value.between(*edges["mean_value"])
    assert 0 < inside.sum() < len(alive)
    assert list(found["brush"].value.latent) == list(latents[inside].latent)


def test_a_root_without_saes_is_one_sentence(tmp_path: Path) -> None:
    outputs, found = notebook("metrics").app.run(defs={"root": str(tmp_path)})
    assert "saes" not in found
    assert "There is no complete SAE" in str([getattr(o, "text", o) for o in outputs])


def test_a_damaged_run_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs" / "0").mkdir(parents=True)
    (tmp_path / "runs" / "0" / "run.json").write_text("{")
    outputs, found = notebook("metrics").app.run(defs={"root": str(tmp_path)})
    assert "saes" not in found
    assert "runs/0/run.json" in str([getattr(o, "text", o) for o in outputs])


@contextlib.contextmanager
def served(name: str, *argv: str) -> Iterator[str]:
    """A notebook as an app, as `marimo run` serves it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "marimo", "run", "--headless", "--no-token"]
    process = subprocess.Popen(
        [*command, "--port", str(port), str(NOTEBOOKS / f"{name}.py"), "--", *argv],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(chromium.BINARY is None, reason=chromium.MISSING)
def test_a_rectangle_drawn_with_the_mouse(root: Path, capsys: pytest.CaptureFixture) -> None:
    with served("metrics", "--root", str(root)) as app, chromium.browser() as page:
        page.open(app, width=1200, height=3000)
        page.wait("document.body.innerText.includes('This draws them')", timeout=120)
        page.wait("document.querySelectorAll('h3').length == 2")
        page.wait(f"{CHARTS}.length == 6", timeout=60)
        # The chart is between the two headings; its axes take less than a tenth of each side.
        where = f"""(() => {{
          const [above, below] = [...document.querySelectorAll('h3')]
            .map(e => e.getBoundingClientRect().y);
          const box = {CHARTS}.find(b => b.y > above && b.y < below);
          return [box.left, box.top, box.right, box.bottom];
        }})()"""
        before = None
        while (now := page.js(where)) != before:  # charts above it may still grow
            before = now
            time.sleep(0.5)
        left, top, right, bottom = now
        width, height = right - left, bottom - top
        start = left + 0.3 * width, top + 0.15 * height
        end = left + 0.75 * width, top + 0.85 * height
        page.drag(start, end)
        page.wait("/\\d+ latents\\. This draws them/.test(document.body.innerText)", timeout=60)
        command = page.js("document.body.innerText.match(/saev visuals.*--n-latents 0/)[0]")
        own = (app, app.replace("http", "ws"), "data:", "about:")
        assert [url for url in page.requested() if not url.startswith(own)] == []
    latents = drawn(command, capsys)
    measured = re.search(r"--inference '?([^']*?/inference/\w+)", command)
    assert measured
    every = tables.latents(measured[1]).to_pandas()
    inside = every[every.latent.isin(latents)]
    edges = inside[["frequency", "mean_value"]].agg(["min", "max"])
    expected = every[
        every.frequency.between(*edges.frequency) & every.mean_value.between(*edges.mean_value)
    ]
    assert 0 < len(inside) < (every.frequency > 0).sum()
    assert latents == list(expected.latent)


@pytest.mark.slow
def test_a_model_of_ones_own(tmp_path: Path) -> None:
    """With few pictures, which is too little to learn from."""
    defs = {"root": str(tmp_path), "n_images": 45, "n_epochs": 1}
    _, found = notebook("own_model").app.run(defs=defs)
    saes = tables.saes(str(tmp_path)).to_pandas()
    assert sorted(saes.l0) == [3, 6, 12]
    assert sorted(saes.run) == sorted(found["runs"])
    assert len(found["examples"]) == 45
    # Recorded was the network with the weights that were trained, through hooks of saev.
    network, shards = found["ShapeViT"](), found["shards"]
    network.load_state_dict(found["safetensors"].torch.load_file(found["weights"]))
    with Image.open(found["examples"].url[7]) as image, torch.no_grad():
        stream = network.patches(found["spec"].apply(image)[None]).flatten(2).transpose(1, 2)
        special = torch.cat([network.cls, network.registers], dim=1)
        stream = torch.cat([special, stream + network.place], dim=1)
        for block in network.eval().blocks[:2]:
            stream = block(stream)
    recorded = shards.read(shard=0, layer=1, start=7, stop=8)
    torch.testing.assert_close(recorded[0], torch.cat([stream[0, :1], stream[0, 3:]]))
    record = json.loads((Path(found["page"]).parent / "visuals.json").read_text())
    assert set(found["best_of"].values()) <= set(record["latents"])


@pytest.mark.slow
@pytest.mark.skipif(chromium.BINARY is None, reason=chromium.MISSING)
def test_the_pages_of_the_site_need_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer pictures than a person would take."""
    site = load(NOTEBOOKS.parents[1] / "docs" / "notebooks.py")
    smaller = tmp_path / "notebooks"
    smaller.mkdir()
    for path in NOTEBOOKS.glob("*.py"):
        code = path.read_text().replace("n_images = 900", "n_images = 90")
        (smaller / path.name).write_text(code.replace("n_epochs = 18", "n_epochs = 1"))
    assert "n_images = 90\n" in (smaller / "own_model.py").read_text()
    monkeypatch.setattr(site, "SOURCE", smaller)
    site.export(tmp_path / "site")
    with test_site.served(tmp_path / "site") as url, chromium.browser() as page:
        # Three SAEs: three charts of them, two of latents.
        page.open(f"{url}/notebooks/metrics.html", height=6000)
        page.wait(f"{CHARTS}.length >= 5", timeout=60)
        page.wait("document.querySelector('h1')?.innerText == '3 SAEs of own-model'")
        page.open(f"{url}/notebooks/own_model.html", height=9000)
        page.wait(
            "document.querySelectorAll('img[src^=\"data:image/png\"]').length == 2", timeout=60
        )
        page.wait("document.body.innerText.includes('register_family')")
        outside = [u for u in page.requested() if not u.startswith((url, "data:", "about:"))]
        assert outside == []


# --- `saev notebook` -----------------------------------------------------------------------------


def saev(*argv: str, capsys: pytest.CaptureFixture) -> tuple[int | str | None, str, str]:
    """Run a command; returns its status, standard output and standard error."""
    capsys.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    status: int | str | None = 0
    try:
        cli.main(argv)
    except SystemExit as err:
        status = err.code
    finally:
        signal.signal(signal.SIGTERM, handler)
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.py")))
def test_a_notebook_is_written_and_never_over_a_changed_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = saev("notebook", name, capsys=capsys)
    place = tmp_path / f"{name}.py"
    assert (status, out.strip()) == (0, str(place))
    assert place.read_text() == (NOTEBOOKS / f"{name}.py").read_text()
    assert re.search(rf"^Next: (marimo edit|python) {name}\.py", err, re.MULTILINE)
    assert saev("notebook", name, capsys=capsys)[0] == 0  # it is there, unchanged
    place.write_text("mine")
    status, _, err = saev("notebook", name, capsys=capsys)
    assert status == 1
    assert f"{place} is there already" in err
    assert place.read_text() == "mine"


def test_it_says_how_to_get_marimo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "marimo", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, _, err = saev("notebook", "metrics", "--out", str(tmp_path), capsys=capsys)
    assert "Next: pip install 'saevit[notebooks]' && marimo edit" in err
