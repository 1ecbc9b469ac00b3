"""The stage as a whole, on real activations of a tiny model."""

import html.parser
import io
import json
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
from saev.visuals import overview, render
from saev.visuals.records import LatentRecord, folder_name
from saev.visuals.source import image_spec
from visuals.chain import DEAD, HOSTILE_CLASS, HOSTILE_LABEL, Chain


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


def snapshot(url: str) -> dict[str, bytes]:
    base = storage.normalize(url)
    return {u.removeprefix(base): storage.read_bytes(u) for u in files_below(base)}


@pytest.fixture(scope="module")
def report(chain: Chain) -> str:
    """URL of a report's folder."""
    index = visuals.run(chain.config(latents=(DEAD, 1)))
    return storage.parent(index)


@pytest.fixture(scope="module")
def page(report: str) -> Reader:
    return Reader(storage.read_text(storage.join(report, "index.html")))


def record(report: str, latent: int) -> LatentRecord:
    place = storage.join(report, folder_name(latent), "latent.json")
    return LatentRecord.from_dict(storage.read_sealed(place).record)


# --- What is written -------------------------------------------------------------------------


def test_report_is_below_the_inference_folder(chain: Chain, report: str) -> None:
    assert report == storage.join(chain.inference, "report")
    done = storage.read_json(storage.join(report, "visuals.json"))
    assert done["latents"][:2] == [DEAD, 1]
    assert len(done["latents"]) == 6


def test_pictures_are_the_models_view(chain: Chain, report: str) -> None:
    shards, results = Shards.open(chain.shards), Results.open(chain.inference)
    spec, top = image_spec(shards), results.top(1)
    urls = shards.examples()["url"].to_pylist()
    assert spec.image_size == (64, 64)
    for rank, example in enumerate(record(report, 1).examples):
        assert example.example == top.example_idx[rank]
        assert example.value == top.value[rank]
        assert example.n_firing == np.count_nonzero(top.token_acts[rank])
        original = Image.open(urls[example.example]).convert("RGB")
        plain = render.picture(spec.crop(original), 96)
        lit = render.highlight(plain, top.token_acts[rank].reshape(4, 4), results.max_values[1])
        for name, expected in ((example.plain, plain), (example.highlight, lit)):
            stored = storage.read_bytes(storage.join(report, folder_name(1), name))
            assert stored == render.encode(expected)
            assert Image.open(io.BytesIO(stored)).size == (96, 96)


def test_segmentation_has_the_classes_of_the_crop(report: str) -> None:
    for example in record(report, 1).examples:
        assert example.segmentation is not None
        assert [c.label for c in example.classes] == sorted(c.label for c in example.classes)
        assert {c.label for c in example.classes} == {0, 1 + example.example % 3}
        # 80 x 64 pixels are cut to the middle 64 x 64 (after a resize to 72 x 90).
        assert [c.share for c in example.classes] == pytest.approx([0.5, 0.5], abs=0.02)
        names = {0: "noise", 1: HOSTILE_CLASS, 2: "ramp", 3: "class 3"}
        assert all(c.name == names[c.label] for c in example.classes)


def test_values_are_those_of_all_tokens(chain: Chain, report: str) -> None:
    values = record(report, 1).values
    column = Results.open(chain.inference).codes()[:, 1]
    assert values is not None
    assert values.source == "all tokens"
    assert sum(values.counts) == column.nnz
    assert values.high == pytest.approx(column.max())


def test_values_come_from_the_top_images_where_codes_were_not_saved(
    chain: Chain, tmp_path: Path
) -> None:
    measured = inference.run(
        InferenceConfig.from_dict(
            {
                "run": chain.run,
                "data": DataConfig(shards=chain.shards).to_dict(),
                "out": str(tmp_path / "inference"),
                "n_dists": 0,
                "save": False,
                "device": "cpu",
            }
        )
    )
    cfg = chain.config(inference=measured, latents=(1,), n_latents=0)
    values = record(storage.parent(visuals.run(cfg)), 1).values
    assert values is not None
    assert "top" in values.source
    assert sum(values.counts) == np.count_nonzero(Results.open(measured).top(1).token_acts)


def test_dead_latents_are_shown_as_such(report: str, page: Reader) -> None:
    dead = record(report, DEAD)
    assert dead.dead
    assert dead.examples == ()
    assert dead.mean_value is None
    articles = {a.get("id"): a.get("class") for tag, a in page.tags if tag == "article"}
    assert articles[f"latent-{DEAD}"] == "latent dead"
    assert articles["latent-1"] == "latent"
    assert "never fires" in page.text


# --- The page --------------------------------------------------------------------------------


def test_all_links_resolve(chain: Chain, report: str, page: Reader) -> None:
    overview.update(chain.run)  # as `saev visuals` does in the end
    ids = set(page.attributes("id"))
    targets = page.attributes("src") + page.attributes("href")
    latents = storage.read_json(storage.join(report, "visuals.json"))["latents"]
    n_pictures = sum(len(record(report, latent).examples) for latent in latents)
    assert len(page.attributes("src")) == 3 * n_pictures > 30  # plain, highlighted, by class
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in ids
        elif target != "data:,":
            assert storage.exists(storage.join(report, target)), target


def test_page_fetches_nothing_from_elsewhere(report: str, page: Reader) -> None:
    text = storage.read_text(storage.join(report, "index.html"))
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert all(not t.startswith("//") for t in page.attributes("src") + page.attributes("href"))


def test_hostile_labels_are_text(report: str, page: Reader) -> None:
    assert HOSTILE_LABEL in storage.read_text(storage.join(report, folder_name(1), "latent.json"))
    assert page.text.count("alert('label')") > 0  # shown, as text
    assert [tag for tag, _ in page.tags].count("script") == 1  # ours
    assert not page.attributes("onerror")
    assert "x" not in page.attributes("src")


def test_images_are_lazy_and_described(page: Reader) -> None:
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert images
    for attrs in images:
        assert attrs["loading"] == "lazy"
        assert len(attrs["alt"] or "") > 10
        assert attrs["width"] == attrs["height"] == "96"


def test_header_has_the_metrics(chain: Chain, page: Reader) -> None:
    measured = Results.open(chain.inference).metrics
    for text in (
        "NMSE, all images", f"{measured['normalized_mse']:.4f}", "L0, all images", "4.0",
        "Dead, all images", "Tokens", "128",
    ):  # fmt: skip
        assert text in page.text
    assert f"example {Results.open(chain.inference).top(1).example_idx[0]}" in page.text


# --- Again, elsewhere, in pieces -------------------------------------------------------------


def test_second_run_does_nothing(chain: Chain, report: str) -> None:
    times = {p: p.stat().st_mtime_ns for p in Path(report).rglob("*")}
    visuals.run(chain.config(latents=(DEAD, 1)))
    assert {p: p.stat().st_mtime_ns for p in Path(report).rglob("*")} == times


def test_pieces_make_the_same_report_in_any_order(chain: Chain, report: str) -> None:
    out = f"memory://visuals-{uuid.uuid4().hex}/report"
    cfg = chain.config(latents=(DEAD, 1), out=out)
    items = visuals.plan(cfg)
    assert json.loads(json.dumps(items)) == items
    for item in reversed(items):
        visuals.work(cfg, item)
    assert visuals.finish(cfg) == f"{out}/index.html"
    made, expected = snapshot(out), snapshot(report)
    for name in ("/visuals.json", "/index.html"):  # the config names the place, the page links home
        del made[name], expected[name]
    assert made == expected


def test_finish_names_what_is_missing(chain: Chain, tmp_path: Path) -> None:
    cfg = chain.config(latents=(1, 2), n_latents=0, out=str(tmp_path))
    visuals.work(cfg, {"latent": 1})
    with pytest.raises(IncompleteError, match="latent 2 was not drawn"):
        visuals.finish(cfg)
    assert not (tmp_path / "index.html").exists()
    assert not (tmp_path / "visuals.json").exists()


def test_interrupted_run_keeps_what_is_drawn(chain: Chain, tmp_path: Path) -> None:
    cfg = chain.config(latents=(1, 2), n_latents=0, out=str(tmp_path))
    visuals.work(cfg, {"latent": 1})
    done = tmp_path / folder_name(1) / "latent.json"
    before = done.stat().st_mtime_ns
    (tmp_path / folder_name(2)).mkdir()
    (tmp_path / folder_name(2) / "00-plain.webp").write_bytes(b"half")  # no record: not done
    visuals.run(cfg)
    assert done.stat().st_mtime_ns == before
    assert (tmp_path / folder_name(2) / "00-plain.webp").read_bytes() != b"half"


def test_what_a_killed_process_left_is_deleted(chain: Chain, tmp_path: Path) -> None:
    config = chain.config(latents=(1,), out=str(tmp_path / "report"))
    index = Path(visuals.run(config))
    latent = index.parent / folder_name(1)
    (latent / "latent.json").unlink()
    (index.parent / "visuals.json").unlink()
    for folder in (latent, index.parent):
        (folder / ".tmp-0123456789ab-00-highlight.webp").write_bytes(b"half")
    visuals.run(config)
    assert not [file.name for file in index.parent.rglob(".tmp-*")]


def test_other_pictures_replace_stale_ones(chain: Chain, tmp_path: Path) -> None:
    small = chain.config(latents=(1,), n_latents=0, out=str(tmp_path))
    visuals.run(small)
    visuals.run(small.model_copy(update={"image_size": 128}))
    picture = Image.open(tmp_path / folder_name(1) / "00-plain.webp")
    assert picture.size == (128, 128)


def test_no_latent_in_range_is_a_page_that_says_so(chain: Chain, tmp_path: Path) -> None:
    index = visuals.run(chain.config(log_freq_range=(-9, -8), out=str(tmp_path)))
    assert "No latent has a log10 frequency between -9 and -8" in storage.read_text(index)


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
    name = f"/{folder_name(1)}/00-highlight.webp"
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
    text = Reader(page).text
    assert "Another model. The SAE was not trained on such activations: model visuals-test" in text
    assert "<img src=x" not in page
    assert "<b>2</b>" not in page
    assert "recorded with torch <b>2</b>" in text


def test_the_page_says_what_the_activations_are(chain: Chain, page: Reader) -> None:
    assert "Another model" not in page.text
    weights = Shards.open(chain.shards).metadata.weights
    assert weights is not None
    assert f"visuals-test tiny (weights {weights[:23]}…), images of 64 x 64 pixels" in page.text
