"""What the explorer says of latents, against slow computations from the codes."""

import numpy as np
import pytest
import safetensors.numpy
from visuals.chain import D_SAE, DEAD, Chain

from saev import inference
from saev.config import DataConfig, InferenceConfig
from saev.explorer import data
from saev.explorer.data import LOW, MIDDLE, Measured
from saev.inference.results import Results
from saev.shards import Shards
from saev.visuals.source import Source

N_PATCHES = 16


@pytest.fixture(scope="module")
def measured(chain: Chain) -> Measured:
    shards = Shards.open(chain.shards)
    names = Source(shards).class_names
    return Measured(Results.open(chain.inference), shards, chain.run, names)


@pytest.fixture(scope="module")
def dense(measured: Measured) -> np.ndarray:
    """Value of each latent on each patch of each image, [images, patches, d_sae]."""
    codes = measured.results.codes().toarray()
    example, token = measured.results.code_tokens()
    values = np.zeros((len(measured.files), N_PATCHES, D_SAE))
    values[example, token] = codes
    return values


def test_images_and_classes(measured: Measured, dense: np.ndarray) -> None:
    fires = (dense != 0).any(axis=1)
    assert measured.n_images is not None
    assert measured.n_images.tolist() == fires.sum(axis=0).tolist()
    labels = np.array(measured.shards.examples()["label"].to_pylist())
    assert measured.shares is not None
    for latent in range(D_SAE):
        rates = {name: fires[labels == name, latent].mean() for name in set(labels.tolist())}
        shown = {
            measured.classes[one]: n / (labels == measured.classes[one]).sum()
            for one, n in zip(
                measured.shares.classes[latent], measured.shares.n_images[latent], strict=True
            )
            if one >= 0
        }
        assert shown == pytest.approx({k: v for k, v in rates.items() if v > 0})
        assert list(shown.values()) == sorted(shown.values(), reverse=True)


def test_latents_that_find_a_class(measured: Measured, dense: np.ndarray) -> None:
    fires = (dense != 0).any(axis=1)
    labels = np.array(measured.shards.examples()["label"].to_pylist())
    assert {measured.classes[one] for one in measured.found} == set(labels.tolist())
    for one, found in measured.found.items():
        is_class = labels == measured.classes[one]
        inside, outside = fires[is_class].mean(axis=0), fires[~is_class].mean(axis=0)
        for latent, of_class, of_others in found:
            assert (of_class, of_others) == pytest.approx((inside[latent], outside[latent]))
        gains = [inside[f.latent] - outside[f.latent] for f in found]
        assert gains[0] == pytest.approx((inside - outside).max())
        assert gains == sorted(gains, reverse=True)


def test_histogram(measured: Measured, dense: np.ndarray) -> None:
    for latent in range(D_SAE):
        values = dense[..., latent][dense[..., latent] != 0]
        if len(values):
            edges = np.linspace(0, values.max(), data.BINS + 1)
            counts = np.histogram(values.clip(0), edges)[0]
            # A value on an edge may be on either side, because edges are rounded.
            assert np.abs(np.cumsum(counts - measured.histogram[latent])).max() <= 1
        assert measured.histogram[latent].sum() == len(values)


def test_images_of_the_middle_and_the_low_range(measured: Measured, dense: np.ndarray) -> None:
    peaks = dense.max(axis=1)
    shown = 0
    for latent in range(D_SAE):
        top = {example.example for example in measured.top(latent)}
        high = peaks[:, latent].max()
        for example in measured.bands(latent):
            shown += 1
            assert example.example not in top
            acts = dense[example.example, :, latent]
            assert example.value == pytest.approx(acts.max())
            assert example.patches.tolist() == np.flatnonzero(acts).tolist()
            assert example.values.tolist() == acts[acts != 0].tolist()
            share = example.value / high
            assert share <= 1 / 3 if example.kind == LOW else 1 / 3 < share <= 2 / 3
            assert example.kind in (MIDDLE, LOW)
    assert (shown > 0) == (len(measured.files) > data.N_TOP)


def test_bands_of_more_images_than_are_at_the_top(
    measured: Measured, dense: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "N_TOP", 1)
    few = Measured(measured.results, measured.shards, "", {})
    test_images_of_the_middle_and_the_low_range(few, dense)


def test_neighbours(measured: Measured, chain: Chain) -> None:
    weights = safetensors.numpy.load_file(f"{chain.run}/checkpoint/sae.safetensors")["W_dec"]
    unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -2)
    assert measured.neighbours is not None
    which, cosines = measured.neighbours
    for latent in range(D_SAE):
        best = np.sort(similar[latent])[::-1][: data.N_NEIGHBOURS]
        assert cosines[latent] == pytest.approx(best, abs=1e-6)
        assert similar[latent][which[latent]] == pytest.approx(best, abs=1e-6)


def test_order_and_usual_class(measured: Measured) -> None:
    assert sorted(measured.order.tolist()) == list(range(D_SAE))
    dead = np.flatnonzero(measured.results.counts == 0)
    assert DEAD in dead
    assert set(measured.order[-len(dead) :].tolist()) == set(dead.tolist())
    which, share = measured.usual
    assert (which[DEAD], share[DEAD]) == (data.NONE, 0)
    labels = measured.shards.labels()
    assert labels is not None
    names = Source(measured.shards).class_names
    for latent in np.flatnonzero(measured.results.counts > 0).tolist():
        top = measured.results.top(latent)
        strongest = [
            labels[example, acts.argmax()]
            for example, acts in zip(top.example_idx, top.token_acts, strict=True)
        ][: data.N_TOP]
        found = [names.get(int(label), "") for label in strongest]
        name = measured.classes[which[latent]]
        if all(found):
            assert share[latent] == pytest.approx(found.count(name) / len(found))
            assert found.count(name) == max(map(found.count, found))


def test_without_codes(chain: Chain, tmp_path: object) -> None:
    url = inference.run(
        InferenceConfig(
            run=chain.run, data=DataConfig(shards=chain.shards), save=False, out=f"{tmp_path}/out",
            device="cpu",
        )
    )  # fmt: skip
    measured = Measured(Results.open(url), Shards.open(chain.shards), chain.run, {})
    assert measured.n_images is None
    assert measured.shares is None
    assert measured.found == {}
    assert measured.bands(1) == []
    top = measured.results.top(1)
    assert measured.histogram[1].sum() == np.count_nonzero(top.token_acts[: data.N_TOP])
