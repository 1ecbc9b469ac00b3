"""The tables against scikit-learn, scipy and plain loops over the raw codes, and how they are
read."""

import os
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import s3_proxy
import s3fs
import torch
from inference.world import LAYER, LAYERS, World, make_world
from sklearn.metrics import average_precision_score

from saev import inference, limits, parquet, storage
from saev.config import DataConfig, InferenceConfig, Relu, SaeConfig
from saev.errors import ConfigError, CorruptDataError, StorageError
from saev.inference import decoder, embeddings, sums, tabulate
from saev.inference import part as part_module
from saev.inference.results import Results
from saev.nn import SparseAutoencoder
from saev.parquet import writer as writer_module
from saev.shards import Shards
from saev.shards.protocol import in_validation

N_CLASSES, FRACTION, FLOOR = 3, 0.4, 0.5
N_EXAMPLES, N_TOKENS, D_SAE = 60, 9, 48


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(
        tmp_path_factory.mktemp("tables"), n_examples=N_EXAMPLES, per_shard=25,
        n_classes=N_CLASSES, train={"split": "train", "val_fraction": FRACTION},
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(world) -> Iterator[Results]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_module, "_PIECE_ENTRIES", 200)
        patch.setattr(tabulate, "MAX_ENTRIES", 300)  # several blocks of latents
        cfg = InferenceConfig(run=world.run, n_dists=0, n_top=4, image_floor=FLOOR)
        yield Results.open(inference.run(cfg))


@pytest.fixture(scope="module")
def latents(results) -> pd.DataFrame:
    return results.latents().to_pandas()


HELD = in_validation(np.arange(N_EXAMPLES), FRACTION)
SIDES = {"": np.ones(N_EXAMPLES, bool), "_held_out": HELD, "_training": ~HELD}


def dense(results: Results) -> np.ndarray:
    """Codes, float64 [example, token, latent]."""
    return results.codes().toarray().astype(np.float64).reshape(N_EXAMPLES, N_TOKENS, D_SAE)


def peaks(results: Results) -> np.ndarray:
    """Largest values, float64 [example, latent]."""
    return dense(results).max(axis=1)


def test_both_sides_are_there() -> None:
    assert 10 < HELD.sum() < 40


@pytest.mark.parametrize("ending", ["", "_held_out"])
def test_statistics_of_each_side(results, latents, ending) -> None:
    f = dense(results)[SIDES[ending]].reshape(-1, D_SAE)
    images = dense(results)[SIDES[ending]].max(axis=1) > 0
    fires = (f != 0).any(axis=0)
    assert fires[2:].sum() > 30
    assert not fires[:2].any()
    column = {name: latents[name + ending].to_numpy() for name in
              ("n_tokens", "frequency", "n_images", "image_share", "mean", "max")}  # fmt: skip
    np.testing.assert_array_equal(column["n_tokens"], (f != 0).sum(axis=0))
    np.testing.assert_allclose(column["frequency"], (f != 0).mean(axis=0))
    np.testing.assert_array_equal(column["n_images"], images.sum(axis=0))
    np.testing.assert_allclose(column["image_share"], images.mean(axis=0))
    means = pd.DataFrame(np.where(f != 0, f, np.nan)).mean()
    np.testing.assert_allclose(column["mean"][fires], means[fires], rtol=1e-6)
    np.testing.assert_allclose(column["max"][fires], f.max(axis=0)[fires], rtol=1e-6)
    assert np.isnan(column["mean"][~fires]).all()
    assert np.isnan(column["max"][~fires]).all()


@pytest.mark.parametrize("ending", ["", "_held_out"])
def test_histograms_and_quantiles(results, latents, ending) -> None:
    f = dense(results)[SIDES[ending]].reshape(-1, D_SAE)
    facts = results.tables.index.facts["histogram"]
    steps = np.arange(facts["n_bins"] + 1)
    per_octave, low = facts["bins_per_octave"], facts["low_exponent"]
    edges = 2.0 ** (low + steps // per_octave) * (1 + steps % per_octave / per_octave)
    np.testing.assert_array_equal(edges, sums.bin_edges())
    for latent in range(D_SAE):
        values = f[:, latent][f[:, latent] != 0]
        counts, first, quantiles = (
            latents[name + ending][latent] for name in ("histogram", "histogram_first", "quantiles")
        )
        if not len(values):
            assert counts is None
            assert quantiles is None
            continue
        want = np.histogram(values, edges)[0]
        filled = np.flatnonzero(want)
        assert first == filled[0]
        np.testing.assert_array_equal(counts, want[filled[0] : filled[-1] + 1])
        exact = np.quantile(values, results.tables.index.facts["quantiles"], method="inverted_cdf")
        np.testing.assert_allclose(quantiles, exact, rtol=1 / per_octave)


def test_values_outside_of_the_bins_are_in_the_ends() -> None:
    bins = sums.bins_of(np.array([-3.0, 1e-9, 1e9, 2.0**-12, 1.0], np.float32))
    assert bins.tolist() == [0, 0, sums.N_BINS - 1, 0, 12 * sums.BINS_PER_OCTAVE]


# --- Classes -------------------------------------------------------------------------------


def test_class_scores(world, results) -> None:
    found = results.classes().to_pandas()
    values = peaks(results)
    tokens = dense(results).reshape(-1, D_SAE)
    kinds = {
        "image": (world.classes, values, SIDES),
        "mask": (world.labels.ravel(), tokens, {k: v.repeat(N_TOKENS) for k, v in SIDES.items()}),
    }
    assert set(found["kind"]) == set(kinds)
    for kind, (label, scores, of_side) in kinds.items():
        rows = found[found["kind"] == kind]
        fires = [(scores[label == c] != 0).any(axis=0).sum() for c in np.unique(label)]
        assert len(rows) == sum(fires)  # fewer than are kept at most
        for row in rows.itertuples():
            for ending, mine in of_side.items():
                y, s = (label == row.value)[mine], scores[mine, row.latent]
                assert getattr(row, f"support{ending}") == y.sum()
                ap = average_precision_score(y, s)
                assert getattr(row, f"ap{ending}") == pytest.approx(ap, rel=1e-6)
                inside, outside = (s[y] != 0).mean(), (s[~y] != 0).mean()
                assert getattr(row, f"rate_inside{ending}") == pytest.approx(inside, rel=1e-6)
                assert getattr(row, f"rate_outside{ending}") == pytest.approx(outside, rel=1e-6)
    assert set(found[found["kind"] == "image"]["name"]) == {"c0", "c1", "c2"}


def test_the_best_class_is_chosen_on_the_training_side(world, results, latents) -> None:
    values = peaks(results)
    differs = 0
    for latent in range(2, D_SAE):
        ap = {
            ending: [average_precision_score((world.classes == c)[mine], values[mine, latent])
                     for c in range(N_CLASSES)]
            for ending, mine in SIDES.items()
        }  # fmt: skip
        if not values[~HELD, latent].any():
            continue
        fires = [values[~HELD & (world.classes == c), latent].any() for c in range(N_CLASSES)]
        best = int(np.argmax(np.where(fires, ap["_training"], -1)))
        differs += best != int(np.argmax(ap["_held_out"]))
        row = latents.loc[latent]
        assert row["best_class"] == best
        assert row["best_class_name"] == f"c{best}"
        assert row["best_class_support"] == (world.classes == best).sum()
        for ending in SIDES:
            assert row[f"best_class_ap{ending}"] == pytest.approx(ap[ending][best], rel=1e-6)
    assert differs


@pytest.mark.parametrize("ending", ["", "_held_out"])
def test_class_entropy(world, results, latents, ending) -> None:
    import scipy.stats

    values, mine = peaks(results), SIDES[ending]
    mass = np.stack([values[mine & (world.classes == c)].sum(axis=0) for c in range(N_CLASSES)])
    fires = mass.sum(axis=0) > 0
    found = latents[f"class_entropy{ending}"].to_numpy()
    np.testing.assert_allclose(found[fires], scipy.stats.entropy(mass[:, fires]), atol=1e-6)
    assert np.isnan(found[~fires]).all()


def test_only_the_best_pairs_are_kept(world, monkeypatch, tmp_path) -> None:
    from saev.inference import scores

    monkeypatch.setattr(scores, "PER_CLASS", 3)
    monkeypatch.setattr(scores, "PER_LATENT", 1)
    monkeypatch.setattr(tabulate, "MAX_ENTRIES", 100)
    cfg = InferenceConfig(run=world.run, n_dists=0, concepts=False, out=str(tmp_path))
    results = Results.open(inference.run(cfg))
    found, values = results.classes().to_pandas(), peaks(results)
    ap = np.array([
        [average_precision_score(world.classes == c, values[:, j]) for j in range(D_SAE)]
        for c in range(N_CLASSES)
    ])  # fmt: skip
    ap[np.array([[not (values[world.classes == c, j] != 0).any() for j in range(D_SAE)]
                 for c in range(N_CLASSES)])] = -1  # fmt: skip
    want = {(c, j) for c in range(N_CLASSES) for j in np.argsort(-ap[c], kind="stable")[:3]}
    want |= {(int(ap[:, j].argmax()), j) for j in range(D_SAE) if ap[:, j].max() > 0}
    assert set(zip(found["value"], found["latent"], strict=True)) == want
    assert results.class_latents("c1")["ap"].to_pylist() == sorted(
        found[found["name"] == "c1"]["ap"], reverse=True
    )
    with pytest.raises(ConfigError, match="fires on a class 'dog'"):
        results.class_latents("dog")


# --- Images --------------------------------------------------------------------------------


def test_images(world, results) -> None:
    found = results.images().to_pandas()
    f = dense(results)
    assert found["path"].tolist() == [f"{i}.png" for i in range(N_EXAMPLES)]
    assert found["label"].tolist() == [f"c{c}" for c in world.classes]
    assert found["side"].tolist() == ["held-out" if h else "training" for h in HELD]
    np.testing.assert_allclose(found["l0"], (f != 0).sum(axis=2).mean(axis=1), rtol=1e-6)
    x = world.acts[:, 1:].astype(np.float64)
    sae = world.sae
    x_hat = f @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()
    mse = np.square(x - x_hat).sum(axis=2).mean(axis=1)
    np.testing.assert_allclose(found["mse"], mse, rtol=1e-5)
    variance = np.square(x - x.mean(axis=(0, 1))).sum(axis=2).mean()
    np.testing.assert_allclose(found["normalized_mse"], mse / variance, rtol=1e-5)
    whole = results.metrics["normalized_mse"]
    assert found["normalized_mse"].mean() == pytest.approx(whole, rel=1e-6)


def test_examples_are_the_top_and_a_sample(results) -> None:
    f, values = dense(results), peaks(results)
    for latent in range(D_SAE):
        found = results.latent_examples(latent).to_pandas()
        firing = np.flatnonzero(values[:, latent] > 0)
        top, spread = (found[found["kind"] == kind] for kind in ("top", "spread"))
        want = results.top(latent)
        np.testing.assert_array_equal(top["example"], want.example_idx)
        assert len(spread) == min(limits.SPREAD_EXAMPLES, len(firing))
        assert set(spread["example"]) <= set(firing)
        assert spread["value"].is_monotonic_decreasing
        for row in found.itertuples():
            assert row.value == np.float32(values[row.example, latent])
            share = (values[firing, latent] <= values[row.example, latent]).mean()
            assert row.quantile == pytest.approx(share, rel=1e-6)
            assert row.side == ("held-out" if HELD[row.example] else "training")
            want_values = f[row.example, :, latent]
            np.testing.assert_array_equal(row.patches, np.flatnonzero(want_values))
            stored = want_values[want_values != 0].astype(np.float16)
            np.testing.assert_array_equal(row.patch_values, stored)
    with pytest.raises(ConfigError, match="no latent 48"):
        results.latent_examples(48)


def test_the_sample_is_even_over_the_range_of_values(results) -> None:
    found = results.tables.read("examples").to_pandas()
    quantiles = found[found["kind"] == "spread"]["quantile"]
    assert 0.4 < quantiles.mean() < 0.6
    assert np.histogram(quantiles, 4, (0, 1))[0].min() > 0.15 * len(quantiles)


def test_image_acts_in_both_orders(results, latents) -> None:
    f = dense(results)
    values, means = f.max(axis=1), f.mean(axis=1)
    keep = (f != 0).any(axis=1) & (values >= np.float32(FLOOR) * values.max(axis=0))
    by_latent = results.tables.read("image_acts_by_latent").to_pandas()
    by_image = results.tables.read("image_acts_by_image").to_pandas()
    latent, example = np.nonzero(keep.T)
    np.testing.assert_array_equal(by_latent["latent"], latent)
    np.testing.assert_array_equal(by_latent["example"], example)
    np.testing.assert_array_equal(by_latent["max"], values[example, latent].astype(np.float16))
    want = means[example, latent].astype(np.float32).astype(np.float16)
    np.testing.assert_allclose(by_latent["mean"].astype(float), want.astype(float), rtol=1e-3)
    want_rows = by_latent.sort_values(["example", "latent"], ignore_index=True)
    pd.testing.assert_frame_equal(by_image, want_rows[by_image.columns])
    dropped = (f != 0).any(axis=1).sum(axis=0) - keep.sum(axis=0)
    np.testing.assert_array_equal(latents["n_image_acts_dropped"], dropped)
    assert dropped.sum() > 0
    one = results.image_acts(7).to_pandas()
    np.testing.assert_array_equal(one["latent"], np.flatnonzero(keep[7]))
    one = results.latent_acts(5).to_pandas()
    np.testing.assert_array_equal(one["example"], np.flatnonzero(keep[:, 5]))


# --- Tokens --------------------------------------------------------------------------------


def test_token_acts_in_both_orders(results) -> None:
    f = dense(results)
    by_latent = results.tables.read("token_acts_by_latent").to_pandas()
    by_image = results.tables.read("token_acts_by_image").to_pandas()
    latent, example, patch = np.nonzero(f.transpose(2, 0, 1))
    np.testing.assert_array_equal(by_latent["latent"], latent)
    np.testing.assert_array_equal(by_latent["example"], example)
    np.testing.assert_array_equal(by_latent["patch"], patch)
    values = f[example, patch, latent].astype(np.float16)
    np.testing.assert_array_equal(by_latent["value"], values)
    want = by_latent.sort_values(["example", "patch", "latent"], ignore_index=True)
    pd.testing.assert_frame_equal(by_image, want[by_image.columns])
    assert len(results.latent_tokens(5)) == (f[:, :, 5] != 0).sum()
    assert len(results.image_tokens(7)) == (f[7] != 0).sum()


def test_a_latent_that_is_alone_is_written_by_piece(world, results, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(part_module, "_PIECE_ENTRIES", 200)
    monkeypatch.setattr(tabulate, "MAX_ENTRIES", 1)
    cfg = InferenceConfig(run=world.run, n_dists=0, n_top=4, image_floor=FLOOR, out=str(tmp_path))
    alone = Results.open(inference.run(cfg))
    for name in alone.tables.names:
        assert alone.tables.read(name).equals(results.tables.read(name)), name


def test_without_npz(world, results, tmp_path) -> None:
    cfg = InferenceConfig(run=world.run, n_dists=0, n_top=4, out=str(tmp_path), npz=False)
    found = Results.open(inference.run(cfg))
    assert not (tmp_path / "token_acts.npz").exists()
    assert len(found.latent_tokens(5)) == len(results.latent_tokens(5))
    with pytest.raises(StorageError, match=r"--no-npz\. Run it again without that flag"):
        found.codes()


def test_coactive_latents(results, latents) -> None:
    fires = (dense(results).reshape(-1, D_SAE) != 0).astype(float)
    counts = np.maximum(fires.sum(axis=0), 1)
    cosines = fires.T @ fires / np.sqrt(np.outer(counts, counts))
    np.fill_diagonal(cosines, 0)
    assert results.tables.index.facts["n_coactivation_tokens"] == len(fires)
    for latent in range(D_SAE):
        found = latents["coactive_cosines"][latent]
        want = np.sort(cosines[latent])[::-1][:10]
        np.testing.assert_allclose(found, want[want > 0], rtol=1e-6)
        np.testing.assert_allclose(cosines[latent, latents["coactive"][latent]], found, rtol=1e-6)


def test_coactivation_is_of_whole_images_at_even_steps(monkeypatch) -> None:
    from saev.inference import coactivation

    monkeypatch.setattr(coactivation, "MAX_TOKENS", 10)
    found = coactivation.Coactivation(np.arange(100, 112), np.full(12, 3), 2)  # 36 tokens
    for example in range(100, 112):
        assert found.wants(np.array([example])) == (example in (100, 104, 108))


# --- Monosemanticity and decoder -----------------------------------------------------------


def by_pairs(values: np.ndarray, unit: np.ndarray) -> float:
    """Of one latent, as published: a loop over pairs."""
    if values.max() == values.min():
        return np.nan
    scaled = (values - values.min()) / (values.max() - values.min())
    above = below = 0.0
    for i in range(len(scaled)):
        for j in range(i + 1, len(scaled)):
            above += scaled[i] * scaled[j] * (unit[i] @ unit[j])
            below += scaled[i] * scaled[j]
    return above / below if below else np.nan


@pytest.mark.parametrize("ending", ["", "_held_out"])
def test_monosemanticity_is_that_of_all_pairs(world, results, latents, ending) -> None:
    mine = SIDES[ending]
    unit = world.acts[:, 0].astype(np.float64)  # the class token of the last recorded layer
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    values = peaks(results)[mine]
    want = [by_pairs(values[:, j], unit[mine]) for j in range(D_SAE)]
    assert np.isfinite(want).sum() > 30
    np.testing.assert_allclose(latents[f"monosemanticity{ending}"], want, rtol=1e-5)


def test_latents_that_fire_everywhere_are_scaled_from_their_lowest_value() -> None:
    from saev.inference.monosemanticity import Embedded

    rng = np.random.default_rng(0)
    values = rng.uniform(2, 3, 20).astype(np.float32)
    vectors = rng.standard_normal((20, 5)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    embedded = Embedded(np.arange(20), vectors, 20)
    found = embedded.monosemanticity(np.zeros(20, int), np.arange(20), values, 1)
    assert found[0] == pytest.approx(by_pairs(values.astype(np.float64), unit), rel=1e-5)


@pytest.mark.parametrize("dense_above", [0, 2])
def test_latents_that_fire_on_many_images(monkeypatch, dense_above) -> None:
    """They are multiplied as a dense matrix; others are not."""
    from saev.inference import monosemanticity

    monkeypatch.setattr(monosemanticity, "_DENSE_ABOVE", dense_above)
    rng = np.random.default_rng(0)
    values = rng.uniform(0.1, 3, (6, 30)).astype(np.float32)
    values[rng.random(values.shape) < 0.4] = 0
    vectors = rng.standard_normal((30, 5)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    embedded = monosemanticity.Embedded(np.arange(30), vectors, 30)
    latents, images = np.nonzero(values)
    found = embedded.monosemanticity(latents, images, values[latents, images], 6)
    want = [by_pairs(row.astype(np.float64), unit) for row in values]
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_embeddings_without_a_class_token_are_means(tmp_path) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 3, 8)).astype(np.float32)
    from saev.inference.codes import TokenRows

    class Metadata:
        cls_token = False

    class Folder:
        metadata, url, layers, d_model = Metadata, "x", (3, 7), 8

    data = embeddings.config(Folder)
    assert (data.layer, data.tokens) == (7, "content")
    made = embeddings.Embedder(Folder, data, np.array([11, 13]))
    assert made.is_read_anyway
    tokens = TokenRows(np.repeat([10, 11, 12, 13], 3), np.tile(np.arange(3), 4), np.full(12, -1))
    made.add(torch.from_numpy(x.reshape(12, 8)), tokens)
    np.testing.assert_allclose(made.result(), x[[1, 3]].mean(axis=1), rtol=1e-5, atol=1e-6)


def test_embeddings_are_stored(world, results) -> None:
    table = results.embeddings()
    assert table["example"].to_pylist() == list(range(N_EXAMPLES))
    assert table.schema.field("embedding").type == pa.list_(pa.float16())
    with Shards.open(world.shards) as shards:
        of_shard = [
            shards.read(i, LAYER, 0, info.n_examples)[:, 0] for i, info in enumerate(shards.infos)
        ]
    want = np.concatenate(of_shard).astype(np.float16)
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float16), want)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_damaged_class_token_is_found(tmp_path, layer) -> None:
    """It is read for the embedding, whichever layer the SAE reads."""
    world = make_world(tmp_path)
    with Shards.open(world.shards) as shards:
        layout, name = shards.layouts[1], shards.infos[1].name
        at = layout.offset(shards.layer_index(LAYERS[-1]), 2, 0)
    place = tmp_path / "shards" / world.shards.rsplit("/", 1)[1] / name
    damaged = bytearray(place.read_bytes())
    damaged[at] ^= 1
    place.write_bytes(damaged)
    with pytest.raises(CorruptDataError, match=name):
        inference.run(InferenceConfig(run=world.run, data=DataConfig(layer=layer), n_dists=0))


def test_matches_of_another_sae(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(decoder, "_CHUNK", 7)
    saes = [SparseAutoencoder(SaeConfig(d_model=16, d_sae=n, activation=Relu())) for n in (40, 24)]
    for seed, sae in enumerate(saes):
        sae.W_dec.data.normal_(generator=torch.Generator().manual_seed(seed))
    first, second = (sae.W_dec.detach().numpy().astype(np.float64) for sae in saes)
    unit = [rows / np.linalg.norm(rows, axis=1)[:, None] for rows in (first, second)]
    cosines = unit[0] @ unit[1].T
    saes[1].save(str(tmp_path / "other" / "checkpoint"))
    found = decoder.matches(saes[0], str(tmp_path / "other" / "checkpoint"), n=3)
    np.testing.assert_array_equal(found.latents, np.argsort(-cosines, axis=1)[:, :3])
    np.testing.assert_allclose(found.cosines, -np.sort(-cosines, axis=1)[:, :3], atol=1e-6)
    itself = decoder.matches(saes[0], saes[0], n=1)
    np.testing.assert_array_equal(itself.latents[:, 0], np.arange(40))
    assert decoder.matches(*saes, n=100).latents.shape == (40, 24)
    narrow = SparseAutoencoder(SaeConfig(d_model=8, d_sae=24))
    with pytest.raises(ConfigError, match=r"the SAE has 16 and the SAE has 8"):
        decoder.matches(saes[0], narrow)
    with pytest.raises(ConfigError, match="n is 0, expected at least 1"):
        decoder.matches(*saes, n=0)


def test_a_sample_of_many_images_is_embedded(monkeypatch) -> None:
    monkeypatch.setattr(embeddings, "MAX_IMAGES", 4)
    assert embeddings.sample(np.arange(100, 109)).tolist() == [100, 103, 106]
    assert embeddings.sample(np.arange(4)).tolist() == [0, 1, 2, 3]


def test_decoder_columns(world, latents) -> None:
    from sklearn.decomposition import PCA

    rows = world.sae.W_dec.double().numpy()
    norms = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(latents["decoder_norm"], norms, rtol=1e-6)
    unit = rows / norms[:, None]
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    for latent in range(D_SAE):
        want = np.argsort(-cosines[latent])[:10]
        assert latents["neighbours"][latent].tolist() == want.tolist()
        found = latents["neighbour_cosines"][latent]
        np.testing.assert_allclose(found, cosines[latent, want], atol=1e-6)
    places = PCA(2).fit_transform(unit)
    for axis, name in enumerate("xy"):
        assert abs(np.corrcoef(latents[name], places[:, axis])[0, 1]) == pytest.approx(1, abs=1e-5)


# --- Files ---------------------------------------------------------------------------------


def test_other_programs_open_them(results) -> None:
    import duckdb

    for name in results.tables.names:
        url = storage.join(results.url, f"{name}.parquet")
        want = results.tables.read(name).to_pandas()
        pd.testing.assert_frame_equal(pd.read_parquet(url), want)
        found = duckdb.sql(f"SELECT * FROM '{url}'").df()
        assert len(found) == len(want)
        assert found.columns.tolist() == want.columns.tolist()
        for column in found.columns:
            if want[column].dtype.kind in "if":
                np.testing.assert_array_equal(
                    found[column], want[column].astype(found[column].dtype)
                )


def test_results_of_an_earlier_version_have_no_tables(results, tmp_path) -> None:
    import shutil

    old = tmp_path / "old"
    shutil.copytree(results.url, old)
    for path in [*old.glob("*.parquet"), old / "tables.json"]:
        path.unlink()
    sealed = storage.read_sealed(str(old / "metrics.json"))
    kept = {k: v for k, v in sealed.files.items() if "parquet" not in k and k != "tables.json"}
    storage.write_json(str(old / "metrics.json"), storage.seal(sealed.record, kept))
    found = Results.open(str(old))
    np.testing.assert_array_equal(found.frequency, results.frequency)
    with pytest.raises(StorageError, match=r"no tables.*delete this folder and run the same"):
        found.latents()


def test_damage_is_named(results, tmp_path) -> None:
    import shutil

    shutil.copytree(results.url, tmp_path / "copy")
    entry = results.tables.table("latents").files[0]
    path = tmp_path / "copy" / entry.name
    data = bytearray(path.read_bytes())
    data[entry.groups[0].start + 10] ^= 1
    path.write_bytes(data)
    found = Results.open(str(tmp_path / "copy"))
    with pytest.raises(CorruptDataError, match=r"latents.parquet is damaged: bytes 4 to"):
        found.latents()


ROWS = pa.schema([pa.field("key", pa.int32(), nullable=False), ("list", pa.list_(pa.int32()))])


def rows_of(sizes: list[int]) -> pa.Table:
    """As many rows of each key, from 0, each with a list of two."""
    keys = np.repeat(np.arange(len(sizes)), sizes)
    return pa.table({"key": keys, "list": [[i, i] for i in range(len(keys))]}, schema=ROWS)


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(writer_module, "GROUP_ROWS", 20)
    monkeypatch.setattr(writer_module, "SPLIT_ROWS", 50)
    monkeypatch.setattr(writer_module, "MAX_GROUPS", 3)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_row_groups_hold_whole_keys(small, tmp_path, step) -> None:
    table = rows_of([4, 5, 3, 120, 11, 2, 2, 2, 30])
    with parquet.TableWriter(str(tmp_path), "t", ROWS, "key") as writer:
        for start in range(0, len(table), step):
            writer.write(table.slice(start, step))
        entry = writer.close()
    groups = [(g.first, g.last, g.n_rows) for file in entry.files for g in file.groups]
    assert groups == [  # closed at 20 elements, which are 10 rows
        (0, 2, 12), (3, 3, 50), (3, 3, 50), (3, 3, 20), (4, 4, 11), (5, 8, 36),
    ]  # fmt: skip
    assert [file.name for file in entry.files] == ["t.parquet", "t-001.parquet"]
    index = parquet.Index({"t": entry}, {})
    data = storage.canonical_json(index.to_dict()).encode()
    found = parquet.Tables.open(str(tmp_path), data)
    assert found.index == index
    assert found.read("t").equals(table)
    for key in range(10):
        want = table.filter(pa.compute.equal(table["key"], key))
        assert found.rows("t", key).equals(want)
        assert found.rows("t", key, ["list"]).equals(want.select(["list"]))
    for name, listed in writer.listed.items():
        whole = (tmp_path / name).read_bytes()
        assert storage.Listed.of(whole) == listed
        file = next(f for f in entry.files if f.name == name)
        for span in [file.footer, *(g.span for g in file.groups)]:
            assert storage.crc32c(whole[span.start : span.start + span.n_bytes]) == span.crc
    with pytest.raises(ConfigError, match="no table 'x'; it has t"):
        found.read("x")


def test_files_do_not_depend_on_the_calls(small, tmp_path) -> None:
    rng = np.random.default_rng(0)
    table = rows_of(rng.integers(0, 12, 40).tolist())
    for name, step in (("a", 1), ("b", 17)):
        with parquet.TableWriter(str(tmp_path / name), "t", ROWS, "key") as writer:
            for start in range(0, len(table), step):
                writer.write(table.slice(start, step))
            writer.close()
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) > 2
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_error_leaves_no_file(tmp_path) -> None:
    def fail() -> None:
        with parquet.TableWriter(str(tmp_path), "t", ROWS, "key") as writer:
            writer.write(rows_of([140_000]))
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_proxy.Proxy]:
    with s3_proxy.before(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


def test_one_latent_on_s3_is_a_list_and_two_small_reads(s3, proxy, tmp_path) -> None:
    """A table of more than one row group, each of as many rows as by default."""
    url, n = f"{s3}/tables", 300_000
    schema = parquet.schema.image_acts(pa.float16(), "latent")
    rng = np.random.default_rng(0)
    latent = np.sort(rng.integers(0, 2000, n)).astype(np.int32)
    values = rng.random((2, n)).astype(np.float16)
    example = rng.integers(0, 1_000_000, n).astype(np.int32)
    whole = pa.table({"latent": latent, "example": example, "max": values[0], "mean": values[1]})
    with parquet.TableWriter(url, "acts", schema, "latent") as writer:
        writer.write(whole)
        index = parquet.Index({"acts": writer.close()}, {})
    data = storage.canonical_json(index.to_dict()).encode()
    storage.write_bytes(storage.join(url, "tables.json"), data)
    assert len(index.tables["acts"].files[0].groups) > 3

    proxy.requests.clear()
    found = parquet.Tables.open(url, storage.read_bytes(storage.join(url, "tables.json")))
    listed, proxy.requests[:] = list(proxy.requests), []
    assert [r.method for r in listed if r.method == "GET"] == ["GET"]
    one = found.rows("acts", 1234)
    assert one["example"].to_pylist() == example[latent == 1234].tolist()
    assert [r.method for r in proxy.requests] == ["GET", "GET"]
    for request in proxy.requests:
        first, last = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
        assert last + 1 - first < 500_000
    proxy.requests.clear()
    found.rows("acts", 17)
    assert [r.method for r in proxy.requests] == ["GET"]  # the footer is known
