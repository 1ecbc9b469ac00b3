"""Images that are sent to the server: encoded as ImageReader does it, or refused in a sentence."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_images import encoded, noise
from PIL import Image

from saev import storage
from saev.inference.image import ImageCodes, ImageReader
from saev.inference.results import Results
from saev.serve import access, app, own
from saev.serve.catalogue import Catalogue
from saev.serve.explorer import Explorer
from saev.serve.measured import Measured

from .conftest import Client, serving

# Smooth, so that WebP loses little.
JPEG = encoded(noise(320, 240).resize((8, 6)).resize((320, 240), Image.Resampling.BICUBIC))


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def send(client: Client, measured: Measured, data: bytes, name: str = "cat.jpg") -> dict[str, Any]:
    status, headers, body = client.ask(
        f"/api/runs/{measured.key}/own?name={name}", "POST", data,
        Origin=f"http://127.0.0.1:{client.port}",
    )  # fmt: skip
    assert (status, headers["content-type"]) == (200, own.MEDIA_TYPE), body
    return lines(body)[-1]["image"]


@pytest.fixture(scope="module")
def results(measured: Measured) -> Results:
    return Results.open(measured.results.url)


def assert_same(found: dict[str, Any], codes: ImageCodes) -> None:
    tokens = found["tokens"]
    assert tokens["patch"] == codes.patches.tolist()
    assert tokens["latent"] == codes.latents.tolist()
    np.testing.assert_allclose(tokens["value"], codes.values, rtol=1e-5)
    peaks = codes.peaks()
    assert found["latents"]["latent"] == peaks.latents.tolist()
    np.testing.assert_allclose(found["latents"]["max"], peaks.values, rtol=1e-5)
    assert found["grid"] == list(codes.shape)


def test_an_image_is_encoded_as_the_library_does(client: Client, measured: Measured) -> None:
    found = send(client, measured, JPEG)
    codes = ImageReader.open(measured.entry.figures["run"]).read(JPEG)
    assert_same(found, codes)
    assert (found["name"], found["width"], found["height"]) == ("cat.jpg", 320, 240)
    crop = Image.open(io.BytesIO(base64.b64decode(found["crop"])))
    assert (crop.format, crop.size) == ("WEBP", codes.crop.size)
    difference = np.asarray(crop.convert("RGB"), float) - np.asarray(codes.crop, float)
    assert np.abs(difference).mean() < 8  # WebP loses a little


def test_the_first_one_says_what_it_waits_for(root: str, measured: Measured) -> None:
    explorer = Explorer(Catalogue.of(root), memory_mb=1024)
    path = f"/api/runs/{measured.key}/own"
    with serving(app.make(explorer, access.Rules.of("127.0.0.1", (), ""))) as fresh:
        said = [list(line) for line in lines(fresh.ask(path)[2])]
        assert said == [["doing"], ["doing"], ["ready"]]
        assert lines(fresh.ask(path)[2]) == [{"ready": True}]
        again = lines(fresh.ask(path, "POST", JPEG)[2])
        assert again[0] == {"doing": "run the model"}
        assert len(again) == 2


def test_an_image_of_the_dataset_is_encoded_from_its_original(
    client: Client, measured: Measured, results: Results
) -> None:
    status, _, data = client.ask(f"/api/runs/{measured.key}/images/3/encoded")
    assert status == 200
    found = lines(data)[-1]["image"]
    table = results.image_tokens(3)
    assert found["tokens"]["patch"] == table["patch"].to_pylist()
    assert found["tokens"]["latent"] == table["latent"].to_pylist()
    np.testing.assert_allclose(found["tokens"]["value"], table["value"].to_numpy(), rtol=2e-3)


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (b"", 422, "the file is empty"),
        (b"GIF89a and then nothing", 422, "Cannot decode cat.jpg"),
        (JPEG[:-500], 422, "Take another file"),
        (bytes(own.MAX_BYTES + 1), 413, "33,554,432"),
        (encoded(Image.new("L", (8000, 7000)), "PNG"), 422, "at most 50000000 are decoded"),
    ],
    ids=["empty", "no image", "damaged", "too long", "too many pixels"],
)
def test_what_is_no_image_is_a_problem(
    client: Client, measured: Measured, data: bytes, status: int, says: str
) -> None:
    path = f"/api/runs/{measured.key}/own?name=cat.jpg"
    found, headers, body = client.ask(path, "POST", data)
    assert found == status
    assert headers["content-type"] == "application/problem+json"
    problem = json.loads(body)
    assert says in f"{problem['detail']} {problem['remedy']}"
    assert problem["remedy"]


def test_a_missing_model_is_a_problem_in_the_last_line(
    root: str, measured: Measured, tmp_path: Path
) -> None:
    """The model is of a family that is not installed here; the rest of the explorer is there."""
    copy = str(tmp_path / "root")
    for entry in storage.walk(root):
        data = storage.read_bytes(storage.join(root, entry.key))
        storage.write_bytes(storage.join(copy, entry.key), data)
    place = measured.results.url.replace(root, copy) + "/metrics.json"
    sealed = storage.read_sealed(place, remedy="")
    source = {**sealed.record["source"], "family": "nobody"}
    storage.write_json(place, storage.seal({**sealed.record, "source": source}, sealed.files))
    explorer = Explorer(Catalogue.of(copy), memory_mb=1024)
    with serving(app.make(explorer, access.Rules.of("127.0.0.1", (), ""))) as other:
        status, _, body = other.ask(f"/api/runs/{measured.key}/own", "POST", JPEG)
        assert status == 200
        problem = lines(body)[-1]["problem"]
        assert "needs its model" in problem["detail"]
        assert "Unknown model family 'nobody'" in problem["detail"]
        assert lines(other.ask(f"/api/runs/{measured.key}/own")[2])[-1]["problem"] == problem
        assert other.get(f"/api/runs/{measured.key}")["n_latents"] == measured.d_sae


def test_nearest_images_have_the_chosen_latents(
    client: Client, measured: Measured, results: Results
) -> None:
    chosen = [int(j) for j in np.argsort(-results.counts)[:3]]
    expected = {}
    for latent in chosen:
        table = results.latent_acts(latent)
        values = np.asarray(table["max"].to_pylist(), np.float32)
        for example, value in zip(table["example"].to_pylist(), values, strict=True):
            share = float(value / values.max()) / len(chosen)
            expected[example] = expected.get(example, 0.0) + share
    words = ",".join(map(str, chosen))
    found = client.get(f"/api/runs/{measured.key}/nearest?latents={words}&n=5")
    assert found["latents"] == chosen
    scores = [row["score"] for row in found["images"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == min(5, len(expected))
    np.testing.assert_allclose(scores, sorted(expected.values(), reverse=True)[:5], rtol=1e-6)
    for row in found["images"]:
        assert expected[row["example"]] == pytest.approx(row["score"])


@pytest.mark.parametrize(
    ("words", "status"), [("", 400), ("latents=99999", 404), ("latents=x", 400)]
)
def test_wrong_latents_are_a_problem(
    client: Client, measured: Measured, words: str, status: int
) -> None:
    assert client.ask(f"/api/runs/{measured.key}/nearest?{words}")[0] == status
