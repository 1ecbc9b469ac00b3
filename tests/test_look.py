"""`saev look`: what it prints of images, from a run that was measured or not."""

import json

import numpy as np
import pytest
from own_images import PHOTO, Recorded, dense_of, make_recorded, make_run

from saev import cli, inference
from saev.config import DataConfig, InferenceConfig
from saev.inference.image import ImageReader
from saev.inference.results import Results


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return make_recorded(tmp_path_factory.mktemp("own"))


def look(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    cli.main(["look", *argv])
    return capsys.readouterr().out


def dense(run: str, *photos: str) -> np.ndarray:
    """Largest value of each latent on each photo, [d_sae, n_photos]."""
    reader = ImageReader.open(run)
    return np.stack([dense_of(reader.read(photo)).max(0) for photo in photos], axis=1)


def test_latents_are_shared_or_of_one_image(
    recorded: Recorded,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(str(tmp_path_factory.mktemp("look") / "run"), recorded.shards, 1)
    photos = [f"{recorded.photos}/{name}" for name in (PHOTO, "wide.webp")]
    values = dense(run, *photos)
    fires = values > 0
    plain = look(capsys, *photos, "--run", run)
    assert f"on all: {fires.all(1).sum()} latents" in plain
    assert f"only on {PHOTO}: {(fires[:, 0] & ~fires[:, 1]).sum()} latents" in plain
    assert f"only on wide.webp: {(fires[:, 1] & ~fires[:, 0]).sum()} latents" in plain
    assert "layer 1, 4 x 4 patches" in plain
    assert "best class" not in plain

    data = DataConfig(shards=recorded.shards.url)
    largest = Results.open(
        inference.run(InferenceConfig(run=run, data=data, device="cpu"))
    ).max_values
    record = json.loads(look(capsys, *photos, "--run", run, "--json"))
    assert [image["shape"] for image in record["images"]] == [[4, 4], [4, 4]]
    assert {row["latent"] for row in record["latents"]} == set(np.flatnonzero(fires.any(1)))
    strengths = [row["strength"] for row in record["latents"]]
    assert strengths == sorted(strengths, reverse=True)
    for row in record["latents"]:
        here = values[row["latent"]]
        np.testing.assert_allclose(row["values"], here, rtol=1e-6)
        share = here[here > 0].min() / largest[row["latent"]]
        assert row["strength"] == pytest.approx(share, rel=1e-3)
    one = look(capsys, photos[0], "--run", run, "--n", "3")
    assert f"{PHOTO}: {fires[:, 0].sum()} latents, the strongest 3" in one
    assert "best class" in one


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "Name an image file"),
        (("a.jpg",), "--run URL"),
        (("{photos}/wide.webp", "--run", "{run}", "--max-pixels", "9"), "--max-pixels 128000 lets"),
        (("{photos}/wide.webp", "--run", "{run}", "--ckpt", "x"), "no checkpoint 'x'"),
    ],
)
def test_what_is_wrong_is_said(
    recorded: Recorded,
    argv: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        look(capsys, *(word.format(photos=recorded.photos, run=recorded.run) for word in argv))
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
