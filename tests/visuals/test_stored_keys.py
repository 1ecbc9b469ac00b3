"""Keys in URLs that an earlier version, or another program, stored are on no page."""

import json
import logging
from pathlib import Path

import pytest
from described import list_files

from saev import inference, storage, visuals
from saev.config import DataConfig, ImgSegFolder, InferenceConfig, VisualsConfig
from saev.config.steps import ReportStep
from saev.steps import jobs, step
from saev.steps.discover import Dataset
from saev.visuals import overview
from visuals.chain import D_MODEL, make_run, write_photos
from visuals.test_same_images import record

KEYS = ("SHHpassword", "SHHsignature", "SHHtoken")
PLACES = (
    "s3://AKIAEXAMPLE:SHHpassword@bucket/photos",
    "https://host/photos?X-Amz-Signature=SHHsignature&X-Amz-Date=20261127",
    "https://SHHtoken@host/photos",
)


def told(text: str | bytes) -> list[str]:
    text = text if isinstance(text, str) else text.decode("latin-1")
    return [key for key in KEYS if key in text]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All texts that a page may show, with a key in each."""
    root = tmp_path_factory.mktemp("keys")
    password, signature, token = PLACES
    photos = root / "photos"
    write_photos(str(photos))
    stems = [line.split(",")[0] for line in (photos / "labels.csv").read_text().splitlines()[1:]]
    labels = [f"{stem},from {PLACES[i % 3]}" for i, stem in enumerate(stems)]
    (photos / "labels.csv").write_text("\n".join(["stem,label", *labels]))
    (photos / "classes.csv").write_text(f"label,name\n0,{password}\n1,{signature}\n2,{token}\n")
    shards = Path(record(root, ImgSegFolder(root=str(photos))))
    raw = json.loads((shards / "metadata.json").read_text())
    raw |= {"dataset": password, "ckpt": f"tiny@{signature}", "versions": {"torch": token}}
    raw["data"]["root"] = password
    (shards / "metadata.json").write_text(json.dumps(raw))
    list_files(str(shards))
    run = str(root / "runs" / "r0")
    make_run(run, str(shards), d_model=D_MODEL)
    storage.write_json(f"{run}/run.json", {})
    inference.run(InferenceConfig(run=run, data=DataConfig(shards=str(shards)), device="cpu"))
    return root


def test_no_page_has_a_key(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = str(root / "runs" / "r0")
    (shards,) = (root / "shards").iterdir()
    cfg = VisualsConfig(
        run=run, shards=str(shards), latents=(1, 2), n_latents=0, n_top=8, image_size=32,
        data=ImgSegFolder(root=str(root / "photos")),
    )  # fmt: skip
    visuals.run(cfg)
    overview.write(str(root))
    url = jobs.make(str(root), "", {}, Dataset(*["x"] * 6))
    jobs.write_plan(jobs.read(url), "publish", jobs.Plan(shards.name, ["r0"], {}))
    step.do(ReportStep(job=url, to_page=str(root / "step.html")))
    pages = [(root / name).read_text() for name in ("index.html", "step.html")]
    pages += [page.read_text() for page in root.rglob("report/index.html")]
    assert len(pages) == 3
    for page in (*pages, visuals.book(cfg)):
        assert not told(page)
        assert "***" in page  # the place itself is shown
    assert not told(caplog.text)


def test_no_result_repeats_a_key(root: Path) -> None:
    """What was stored stays as it is, but what an SAE and a result record of it is without keys."""
    found = [place for place in (root / "runs").rglob("*.json") if told(place.read_bytes())]
    assert found == []
