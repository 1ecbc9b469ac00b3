"""The stage as a whole, on real activations of a tiny model."""

import base64
import gzip
import io
import json
import re
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest
from described import described, files_below
from PIL import Image

from saev import inference, storage, visuals
from saev.config import DataConfig, InferenceConfig
from saev.errors import ConfigError, ImageError, IncompleteError, StorageError
from saev.inference.results import Results
from saev.shards import Shards
from saev.visuals import sheet
from saev.visuals.choose import images
from saev.visuals.source import image_spec
from saev.visuals.stored import Pictures
from visuals.chain import DEAD, HOSTILE_CLASS, HOSTILE_LABEL, Chain


def snapshot(url: str) -> dict[str, bytes]:
    base = storage.normalize(url)
    return {u.removeprefix(base): storage.read_bytes(u) for u in files_below(base)}


def facts_of(text: str) -> dict:
    """The plain numbers and texts of a page."""
    (found,) = re.findall(r'<script type="application/json" id="runs">(.*?)</script>', text)
    return json.loads(found)[0]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images in each part: the eight images have three."""
    monkeypatch.setattr(sheet, "_PART_IMAGES", 3)


@pytest.fixture(scope="module")
def report(chain: Chain) -> str:
    """URL of a report's folder."""
    index = visuals.run(chain.config(latents=(DEAD, 1)))
    return storage.parent(index)


@pytest.fixture(scope="module")
def text(report: str) -> str:
    return storage.read_text(storage.join(report, "index.html"))


# --- What is written -------------------------------------------------------------------------


def test_report_is_below_the_inference_folder(chain: Chain, report: str) -> None:
    assert report == storage.join(chain.inference, "report")
    done = storage.read_json(storage.join(report, "visuals.json"))
    assert done["latents"][:2] == [DEAD, 1]
    assert len(done["latents"]) == 6
    assert done["n_pictures"] == len(Pictures.open(report).examples)
    assert sorted(name.strip("/") for name in snapshot(report)) == sorted(
        [*done["files"], "visuals.json"]
    )


def test_pictures_are_the_models_view(chain: Chain, report: str) -> None:
    shards, stored = Shards.open(chain.shards), Pictures.open(report)
    spec = image_spec(shards)
    urls = shards.examples()["url"].to_pylist()
    for example in stored.examples.tolist():
        crop = spec.crop(Image.open(urls[example]).convert("RGB"))
        for data, side, quality in (
            (stored.get(example), 56, 80), (stored.thumb(example), 48, 70)
        ):  # fmt: skip
            large = crop.resize((56, 56), Image.Resampling.BICUBIC)
            expected = io.BytesIO()
            large.resize((side, side), Image.Resampling.BICUBIC).save(
                expected, "WEBP", quality=quality, method=4
            )
            assert data == expected.getvalue()


def test_every_named_image_is_stored_once(chain: Chain, report: str) -> None:
    rows = Results.open(chain.inference).tables.read("examples").to_pylist()
    named = {row["example"] for row in rows if row["kind"] == "spread" or row["rank"] < 3}
    stored = Pictures.open(report)
    assert sorted(stored.examples.tolist()) == sorted(named)
    assert stored.n_named == len(named)


def test_strong_and_rare_latents_come_first(chain: Chain) -> None:
    """The order and the limit, as plain loops have them."""
    results = Results.open(chain.inference)
    latents, rows = results.latents().to_pylist(), results.tables.read("examples").to_pylist()
    most = max(one["n_images"] for one in latents)

    def place(one: dict) -> tuple:
        frequency = one["frequency"]
        score = one["mean"] * -np.log(frequency) if frequency else 0
        return frequency == 0, one["n_images"] < min(8, most), -score

    order = [one["latent"] for one in sorted(latents, key=place)]
    of: dict[int, list[int]] = {latent: [] for latent in order}
    for row in sorted(rows, key=lambda row: (row["kind"] == "spread", row["rank"])):
        if row["kind"] == "spread" or row["rank"] < 3:
            of[row["latent"]].append(row["example"])
    firsts = [of[latent][0] for latent in order if of[latent]]
    expected = list(dict.fromkeys([*firsts, *(e for latent in order for e in of[latent])]))
    cfg = chain.config(n_top=3)
    assert list(images(cfg, results, ()).examples) == expected
    few = cfg.model_copy(update={"max_pictures": 2})
    assert images(few, results, ()) == (tuple(expected[:2]), len(expected))
    last = next(latent for latent in order if expected[-1] in of[latent])
    kept = expected[:2] + [e for e in expected[2:] if e in of[last]]
    assert images(few, results, [last, DEAD]) == (tuple(kept), len(expected))


# --- The page --------------------------------------------------------------------------------


def test_page_fetches_nothing_from_elsewhere(text: str) -> None:
    assert "://" not in re.sub(r"http://www.w3.org/[a-zA-Z0-9/]*", "", text)  # names of XML
    assert "url(" not in text
    assert "@import" not in text


def test_hostile_labels_are_text(text: str) -> None:
    assert HOSTILE_LABEL not in text
    said = json.dumps(facts_of(text), ensure_ascii=False)
    assert HOSTILE_LABEL in said
    assert json.dumps(HOSTILE_CLASS)[1:-1] in said


def test_header_has_the_metrics(chain: Chain, text: str) -> None:
    measured = Results.open(chain.inference).metrics
    found = {label: value for label, value, _ in facts_of(text)["metrics"]}
    assert found["NMSE, all images"] == f"{measured['normalized_mse']:.4f}"
    assert found["L0, all images"] == "4.0"
    assert found["Tokens"] == "128"


def block(text: str, name: str, kind: str) -> np.ndarray:
    """Numbers of latents in a page."""
    (found,) = re.findall(rf'<script type="[^"]*" id="b0-{name}">([^<]*)</script>', text)
    return np.frombuffer(gzip.decompress(base64.b64decode(found)), kind)


def test_chosen_latents_are_marked(report: str, text: str) -> None:
    done = storage.read_json(storage.join(report, "visuals.json"))
    assert np.flatnonzero(block(text, "chosen", "u1")).tolist() == sorted(done["latents"])


def test_a_smaller_page_of_the_same_report(chain: Chain, text: str) -> None:
    """Chosen latents have pictures before all others."""
    cfg = chain.config(latents=(DEAD, 1))
    whole = visuals.book(cfg, 15_000_000)
    assert facts_of(whole) == {k: v for k, v in facts_of(text).items() if k != "home"}
    small = visuals.book(cfg, len(whole) - 4_000)
    assert len(small) <= len(whole) - 4_000
    assert 0 < facts_of(small)["nDetailed"] < facts_of(whole)["nDetailed"]
    chosen = block(small, "chosen", "u1").astype(bool)
    n_examples = block(small, "examples", "u1")
    assert n_examples[1] > 0
    assert (n_examples[chosen] > 0).sum() >= (n_examples[~chosen] > 0).sum()


def test_numbers_that_fit_nowhere(chain: Chain, report: str, tmp_path: Path) -> None:
    cfg = chain.config(latents=(DEAD, 1))
    told = visuals.book(cfg, 20_000)
    assert len(told) < 1000
    assert "the numbers of its 24 latents take more than the 0.0 MB" in told
    assert f"{report}/index.html" in told
    small = cfg.model_copy(update={"max_mb": 0.02, "out": str(tmp_path)})
    assert facts_of(storage.read_text(visuals.run(small)))["nPictured"] == 0


# --- Again, elsewhere, in pieces -------------------------------------------------------------


def test_second_run_does_nothing(chain: Chain, report: str) -> None:
    times = {p: p.stat().st_mtime_ns for p in Path(report).rglob("*")}
    visuals.run(chain.config(latents=(DEAD, 1)))
    assert {p: p.stat().st_mtime_ns for p in Path(report).rglob("*")} == times


def test_pieces_make_the_same_report_in_any_order(
    parts: None, chain: Chain, tmp_path: Path
) -> None:
    whole = storage.parent(visuals.run(chain.config(out=str(tmp_path))))
    out = f"memory://visuals-{uuid.uuid4().hex}/report"
    cfg = chain.config(out=out)
    items = visuals.plan(cfg)
    assert json.loads(json.dumps(items)) == items
    assert len(items) == 3
    for item in reversed(items):
        visuals.work(cfg, item)
    assert visuals.finish(cfg) == f"{out}/index.html"
    made, expected = snapshot(out), snapshot(whole)
    for found in (made, expected):  # the config in it names the place
        del found["/visuals.json"]
    assert made == expected


def test_finish_names_what_is_missing(parts: None, chain: Chain, tmp_path: Path) -> None:
    cfg = chain.config(out=str(tmp_path))
    visuals.work(cfg, {"part": 0})
    with pytest.raises(IncompleteError, match="part 2 of 3 of the pictures was not drawn"):
        visuals.finish(cfg)
    assert not (tmp_path / "index.html").exists()
    assert not (tmp_path / "visuals.json").exists()


def test_interrupted_run_keeps_what_is_drawn(parts: None, chain: Chain, tmp_path: Path) -> None:
    cfg = chain.config(out=str(tmp_path))
    visuals.work(cfg, {"part": 0})
    done = tmp_path / "pictures.json"
    before = done.stat().st_mtime_ns
    (tmp_path / "pictures-001.parquet").write_bytes(b"half")  # no record: not done
    visuals.run(cfg)
    assert done.stat().st_mtime_ns == before
    assert len(Pictures.open(str(tmp_path)).examples) == 8


def test_what_a_killed_process_left_is_deleted(chain: Chain, tmp_path: Path) -> None:
    config = chain.config(latents=(1,), out=str(tmp_path / "report"))
    index = Path(visuals.run(config))
    for name in ("pictures.json", "visuals.json"):
        (index.parent / name).unlink()
    (index.parent / ".tmp-0123456789ab-pictures.parquet").write_bytes(b"half")
    visuals.run(config)
    assert not [file.name for file in index.parent.rglob(".tmp-*")]


def test_other_pictures_replace_stale_ones(parts: None, chain: Chain, tmp_path: Path) -> None:
    cfg = chain.config(n_latents=0, out=str(tmp_path))
    visuals.run(cfg)
    visuals.run(cfg.model_copy(update={"image_size": 128, "max_pictures": 4}))
    stored = Pictures.open(str(tmp_path))
    sizes = {Image.open(io.BytesIO(stored.get(e) or b"")).size for e in stored.examples}
    assert sizes == {(64, 64)}, "no larger than the model saw them"
    assert len(stored.examples) == 4
    assert not list(tmp_path.glob("*-002.*"))


def test_another_choice_draws_no_picture_again(chain: Chain, tmp_path: Path) -> None:
    cfg = chain.config(latents=(1,), out=str(tmp_path))
    visuals.run(cfg)
    before = (tmp_path / "pictures.parquet").stat().st_mtime_ns
    visuals.run(cfg.model_copy(update={"latents": (2,)}))
    assert (tmp_path / "pictures.parquet").stat().st_mtime_ns == before
    assert storage.read_json(str(tmp_path / "visuals.json"))["latents"][0] == 2


# --- Reports of earlier versions -----------------------------------------------------------------


def earlier(folder: Path) -> None:
    """A report as version 0.2.0.dev and before left it."""
    latent = folder / "latents/000001"
    latent.mkdir(parents=True)
    storage.write_bytes(str(latent / "00-plain.webp"), b"RIFF....WEBP")
    storage.write_json(str(latent / "latent.json"), storage.seal({"latent": 1}))
    storage.write_text(str(folder / "index.html"), "an earlier page")
    row = storage.Listed.of(b"an earlier page")
    latent_row = storage.read_sealed(str(latent / "latent.json")).listed
    files = {"index.html": row, "latents/000001/latent.json": latent_row}
    done = storage.seal({"key": "old", "latents": [1]}, files)
    storage.write_json(str(folder / "visuals.json"), done)


def test_a_new_report_replaces_an_earlier_one(chain: Chain, tmp_path: Path) -> None:
    earlier(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    visuals.run(chain.config(out=str(tmp_path)))
    assert Pictures.find(str(tmp_path))
    assert not (tmp_path / "latents").exists()
    assert (tmp_path / "notes.txt").exists()


def test_an_earlier_report_of_earlier_results_stays(
    chain: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such results have no tables."""
    measured = tmp_path / "inference"
    shutil.copytree(chain.inference, measured)
    shutil.rmtree(measured / "report", ignore_errors=True)
    (measured / "tables.json").unlink()
    sealed = storage.read_sealed(str(measured / "metrics.json"))
    files = {name: row for name, row in (sealed.files or {}).items() if name != "tables.json"}
    storage.write_json(str(measured / "metrics.json"), storage.seal(sealed.record, files))
    cfg = chain.config(inference=str(measured))
    with pytest.raises(StorageError, match=r"has no tables, because an earlier version"):
        visuals.run(cfg)
    earlier(measured / "report")
    before = snapshot(str(measured / "report"))
    assert visuals.run(cfg) == storage.join(str(measured), "report/index.html")
    assert snapshot(str(measured / "report")) == before
    assert "stays as an earlier version of saev drew it" in caplog.text


# --- What may be wrong -----------------------------------------------------------------------


def test_latent_that_does_not_exist(chain: Chain) -> None:
    with pytest.raises(ConfigError, match=r"Latent 24 does not exist.*d_sae = 24"):
        visuals.run(chain.config(latents=(24,)))


def test_shards_of_another_run(chain: Chain, tmp_path: Path) -> None:
    other = described(chain.shards, tmp_path / "shards", amp=True)
    with pytest.raises(ConfigError, match="no inference results on shards"):
        visuals.run(chain.config(shards=other))
    with pytest.raises(ConfigError, match="Give the shards that inference ran on"):
        visuals.run(chain.config(shards=other, inference=chain.inference))


@pytest.fixture
def moved(chain: Chain, tmp_path: Path) -> Path:
    """A copy of the photos that a test may damage."""
    shutil.copytree(chain.photos, tmp_path / "photos")
    return tmp_path / "photos"


def with_photos(chain: Chain, photos: Path, out: Path) -> object:
    data = {"kind": "img-seg-folder", "root": str(photos)}
    return chain.config(out=str(out), data=data, n_latents=20)


def test_moved_images_are_found_by_the_override(
    chain: Chain, moved: Path, tmp_path: Path, report: str
) -> None:
    visuals.run(with_photos(chain, moved, tmp_path / "out"))
    name = "/pictures.parquet"
    assert snapshot(str(tmp_path / "out"))[name] == snapshot(report)[name]


def test_missing_folder_names_it_and_the_remedy(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone.*does not exist.*data:img-folder --data.root"):
        visuals.run(with_photos(chain, tmp_path / "gone", tmp_path / "out"))


def test_missing_image_is_named(chain: Chain, moved: Path, tmp_path: Path) -> None:
    (moved / "images/training/a&b 3.png").unlink()
    with pytest.raises(ConfigError, match=r"7 images, 8 were recorded.*a&b 3\.png.*put them back"):
        visuals.run(with_photos(chain, moved, tmp_path / "out"))


def test_renamed_image_is_named(chain: Chain, moved: Path, tmp_path: Path) -> None:
    for part in ("images", "annotations"):
        (moved / part / "training/a&b 0.png").rename(moved / part / "training/zzz.png")
    with pytest.raises(ImageError, match=r"was recorded from .*a&b \d\.png.*now has"):
        visuals.run(with_photos(chain, moved, tmp_path / "out"))


def test_replaced_image_is_named(chain: Chain, moved: Path, tmp_path: Path) -> None:
    for part, mode in (("images", "RGB"), ("annotations", "L")):
        for i in range(8):
            Image.new(mode, (10, 12)).save(moved / part / f"training/a&b {i}.png")
    with pytest.raises(ImageError, match=r"a&b 0\.png is not the image .* size in bytes"):
        visuals.run(with_photos(chain, moved, tmp_path / "out"))


def test_damaged_image_is_named(chain: Chain, moved: Path, tmp_path: Path) -> None:
    for i in range(8):
        (moved / f"images/training/a&b {i}.png").write_bytes(b"not a picture")
    with pytest.raises(ImageError, match=r"a&b 0\.png is not the image"):
        visuals.run(with_photos(chain, moved, tmp_path / "out"))


def test_drawn_report_needs_no_images(chain: Chain, moved: Path, tmp_path: Path) -> None:
    cfg = with_photos(chain, moved, tmp_path / "out")
    visuals.run(cfg)
    shutil.rmtree(moved)
    (tmp_path / "out" / "index.html").unlink()
    visuals.run(cfg)
    assert (tmp_path / "out" / "index.html").exists()


# --- The model -----------------------------------------------------------------------------


def test_another_model_is_refused_or_said_on_the_page(chain: Chain, tmp_path: Path) -> None:
    hostile = {"weights": "sha256:<img src=x>", "versions": {"torch": "<b>2</b>"}}
    other = described(chain.shards, tmp_path / "shards", **hostile)
    data = DataConfig(shards=other)
    measured = inference.run(
        InferenceConfig(
            run=chain.run, data=data, out=str(tmp_path / "inference"), device="cpu",
            allow_other_model=True,
        )
    )  # fmt: skip
    keys = {"shards": other, "inference": measured, "out": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=r"model visuals-test tiny .*--allow-other-model"):
        visuals.run(chain.config(**keys))
    page = storage.read_text(visuals.run(chain.config(**keys, allow_other_model=True)))
    facts = facts_of(page)
    assert any("model visuals-test" in text for text in facts["warnings"])
    assert "<img src=x" not in page
    assert "<b>2</b>" not in page
    assert "recorded with torch <b>2</b>" in facts["activations"]


def test_the_page_says_what_the_activations_are(chain: Chain, text: str) -> None:
    facts = facts_of(text)
    assert facts["warnings"] == []
    weights = Shards.open(chain.shards).metadata.weights
    assert weights is not None
    assert (
        f"visuals-test tiny (weights {weights[:23]}…), images of 64 x 64 pixels"
        in (facts["activations"])
    )
