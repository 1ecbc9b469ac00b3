"""What the explorer says of latents, against slow computations from the codes."""

import json

import numpy as np
import pytest
import safetensors.numpy
import sklearn.metrics
from visuals.chain import D_SAE, DEAD, Chain

from saev import storage
from saev.explorer import columns, data, matches, summary
from saev.explorer.data import SIDES, SPREAD, TOP, Measured
from saev.inference import shown
from saev.inference.results import Results
from saev.shards import Shards
from saev.visuals.source import Source

N_PATCHES = 16


@pytest.fixture(scope="module")
def measured(chain: Chain) -> Measured:
    shards = Shards.open(chain.shards)
    return Measured(Results.open(chain.inference), shards, Source(shards).class_names)


@pytest.fixture(scope="module")
def dense(measured: Measured) -> np.ndarray:
    """Value of each latent on each patch of each image, [images, patches, d_sae]."""
    codes = measured.results.codes().toarray()
    example, token = measured.results.code_tokens()
    values = np.zeros((measured.shards.n_examples, N_PATCHES, D_SAE))
    values[example, token] = codes
    return values


@pytest.fixture(scope="module")
def labels(measured: Measured) -> np.ndarray:
    return np.array(measured.shards.examples()["label"].to_pylist())


@pytest.fixture(scope="module")
def held_out(measured: Measured) -> np.ndarray:
    side = measured.results.images()["side"].to_numpy()
    mask = side == "held-out"
    assert 0 < mask.sum() < len(mask)
    return mask


def column(measured: Measured, key: str, *, held_out: bool) -> np.ndarray:
    (found,) = (c for c in columns.COLUMNS if c.key == key)
    return measured.column(found, held_out=held_out)


def test_columns_of_both_sides(measured: Measured, dense: np.ndarray, held_out: np.ndarray) -> None:
    for mine, is_held_out in ((np.full(len(dense), True), False), (held_out, True)):
        values = dense[mine].reshape(-1, D_SAE)
        fires = values != 0
        with np.errstate(invalid="ignore"):
            expected = {
                "frequency": fires.mean(axis=0),
                "images": (dense[mine] != 0).any(axis=1).mean(axis=0),
                "mean": values.sum(axis=0) / fires.sum(axis=0),
                "max": np.where(fires.any(axis=0), values.max(axis=0), np.nan),
            }
        for key, right in expected.items():
            found = column(measured, key, held_out=is_held_out)
            np.testing.assert_allclose(found, right, rtol=1e-5, err_msg=key)
        median = column(measured, "median", held_out=is_held_out)
        for latent in np.flatnonzero(fires.any(axis=0)):
            right = np.median(values[fires[:, latent], latent])
            lowest = np.sort(values[fires[:, latent], latent])
            gap = lowest[len(lowest) // 2] - lowest[(len(lowest) - 1) // 2]
            assert abs(median[latent] - right) <= right / 8 + gap
    assert np.isnan(column(measured, "mean", held_out=False)[DEAD])


def test_best_class_is_judged_by_held_out_images(
    measured: Measured, dense: np.ndarray, labels: np.ndarray, held_out: np.ndarray
) -> None:
    peaks = dense.max(axis=1)
    best = measured.best("class")
    found = column(measured, "class_ap", held_out=True)
    assert best[DEAD] == data.NONE
    for latent in np.flatnonzero(best >= 0):
        is_class = labels == measured.classes[best[latent]].name
        others = [
            sklearn.metrics.average_precision_score(mine[~held_out], peaks[~held_out, latent])
            for mine in (labels == name for name in set(labels.tolist()))
        ]
        chosen = sklearn.metrics.average_precision_score(
            is_class[~held_out], peaks[~held_out, latent]
        )
        assert chosen == pytest.approx(max(others), abs=1e-6), "chosen on the training side"
        judged = sklearn.metrics.average_precision_score(
            is_class[held_out], peaks[held_out, latent]
        )
        assert found[latent] == pytest.approx(judged, abs=1e-6)


def test_findings(
    measured: Measured, dense: np.ndarray, labels: np.ndarray, held_out: np.ndarray
) -> None:
    fires = (dense != 0).any(axis=1)
    found = measured.findings
    assert (np.diff(found.latent) >= 0).all()
    kinds = np.array([one.kind for one in measured.classes])
    assert {"image", "mask"} == set(kinds.tolist())
    for i in np.flatnonzero(kinds[found.number] == "image"):
        one, latent = measured.classes[found.number[i]], found.latent[i]
        is_class = labels == one.name
        assert one.support == is_class.sum()
        assert found.inside[i] == pytest.approx(fires[is_class & held_out, latent].mean())
        assert found.outside[i] == pytest.approx(fires[~is_class & held_out, latent].mean())
    best = measured.best("class")
    for latent in np.flatnonzero(best >= 0):
        assert best[latent] in found.number[found.latent == latent]


def test_names_of_classes_of_patches(measured: Measured) -> None:
    names = {one.name for one in measured.classes if one.kind == "mask"}
    assert names <= set(Source(measured.shards).class_names.values()) | {"class 3"}
    assert "noise" in names


def test_histograms(measured: Measured, dense: np.ndarray) -> None:
    octaves = np.arange(-12, 20)
    starts = np.concatenate([2.0**o * (1 + np.arange(data.BINS) / data.BINS) for o in octaves])
    found = measured.histograms
    for latent in range(D_SAE):
        values = dense[..., latent][dense[..., latent] != 0].astype(np.float32)
        counts = found.counts[latent]
        assert counts.sum() == len(values)
        if len(values):
            right = np.bincount(np.searchsorted(starts, values, side="right") - 1)
            assert counts.tolist() == right[found.first[latent] :].tolist()


def test_examples(measured: Measured, dense: np.ndarray, held_out: np.ndarray) -> None:
    peaks = dense.max(axis=1)
    spread = 0
    for latent in range(D_SAE):
        fires = np.flatnonzero((dense[..., latent] != 0).any(axis=1))
        examples = measured.examples(latent)
        top = [e for e in examples if e.kind == TOP]
        assert [e.value for e in top] == pytest.approx(
            np.sort(peaks[fires, latent])[::-1][: shown.N_TOP], rel=1e-5
        )
        assert len({e.example for e in examples}) == len(examples) <= len(fires)
        rest = [e for e in examples if e.kind == SPREAD]
        assert [e.value for e in rest] == sorted((e.value for e in rest), reverse=True)
        spread += len(rest)
        for e in examples:
            acts = dense[e.example, :, latent]
            assert e.value == pytest.approx(acts.max(), rel=1e-5)
            assert e.patches.tolist() == np.flatnonzero(acts).tolist()
            assert e.values == pytest.approx(acts[acts != 0], rel=1e-3)  # stored as float16
            assert SIDES[e.side] == ("held-out" if held_out[e.example] else "training")
            below = (peaks[fires, latent] <= acts.max() * (1 + 1e-6)).mean()
            assert e.quantile == pytest.approx(below, abs=1e-6)
    assert spread > D_SAE


def test_order_and_purity(measured: Measured, labels: np.ndarray) -> None:
    assert sorted(measured.order.tolist()) == list(range(D_SAE))
    dead = np.flatnonzero(measured.n_tokens == 0)
    assert DEAD in dead
    assert set(measured.order[-len(dead) :].tolist()) == set(dead.tolist())
    for latent in range(D_SAE):
        top = [labels[e.example] for e in measured.examples(latent) if e.kind == TOP]
        if top:
            right = max(map(top.count, top)) / len(top)
            assert measured.purity[latent] == pytest.approx(right)
        else:
            assert np.isnan(measured.purity[latent])


def test_neighbours_are_those_of_the_table(measured: Measured) -> None:
    table = measured.table.to_pydict()
    for kind, name in (("neighbour", "neighbours"), ("coactive", "coactive")):
        which, cosines = measured.nearest(kind)
        for latent in range(D_SAE):
            n = min(data.N_NEIGHBOURS, len(table[name][latent]))
            assert which[latent][:n].tolist() == table[name][latent][:n]
            assert cosines[latent][:n] == pytest.approx(table[f"{kind}_cosines"][latent][:n])
            assert (which[latent][n:] == data.NONE).all()


def test_rates_of_classes(measured: Measured, dense: np.ndarray, labels: np.ndarray) -> None:
    peaks = dense.max(axis=1)
    fires = (peaks > 0) & (peaks >= 0.05 * peaks.max(axis=0))  # docs/formats.md: image_floor
    rates = measured.rates()
    assert rates is not None
    images = [one for one in measured.classes if one.kind == "image"]
    assert len(rates) == len(images) == 2
    for rate, one in zip(rates, images, strict=True):
        np.testing.assert_allclose(rate, fires[labels == one.name].mean(axis=0))


def test_matches_are_the_closest_decoder_rows(trained: list[str]) -> None:
    weights = [
        safetensors.numpy.load_file(f"{run}/checkpoint/sae.safetensors")["W_dec"] for run in trained
    ]
    unit = [w / np.linalg.norm(w, axis=1, keepdims=True) for w in weights]
    found = matches.find(trained)
    assert set(found) == {(0, 1), (1, 0)}
    for (one, two), (latents, closeness) in found.items():
        cosines = unit[one] @ unit[two].T
        assert latents.tolist() == cosines.argmax(axis=1).tolist()
        np.testing.assert_allclose(closeness, cosines.max(axis=1), atol=1e-6)


def test_summary_has_figures_config_and_curves(chain: Chain, trained: list[str]) -> None:
    found = summary.of(
        trained[1], Results.find(trained[1], Shards.open(chain.shards).metadata.hash)
    )
    published = storage.read_sealed(f"{trained[1]}/run.json", remedy="").record["metrics"]
    assert found["figures"]["nmse"] == published["normalized_mse"]
    assert found["figures"]["l0"] == published["l0"] != 0
    assert found["config"]["sae.d_sae"] == "48"
    lines = storage.read_text(f"{trained[1]}/metrics.jsonl").splitlines()
    logged = {row["step"]: row.get("train/normalized_mse") for row in map(json.loads, lines)}
    steps, values = found["curves"]["train/normalized_mse"]
    assert len(steps) > 2
    assert values == pytest.approx([logged[step] for step in steps], rel=1e-3)
