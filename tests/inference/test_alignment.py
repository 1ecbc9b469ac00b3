"""Concept alignment against scikit-learn, and against itself in small portions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference.test_codes import as_columns
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss

from saev import storage
from saev.inference import concepts
from saev.inference.alignment import N_CLASSES, average_precision, descending_key, probe_r, purity
from saev.inference.codes import CodesWriter, StoredCodes, TokenRows


def dense(rng: np.random.Generator, n: int, n_latents: int, *, ties: bool, negative: bool):
    f = rng.normal(size=(n, n_latents)).astype(np.float32)
    f = np.round(f, 1) if ties else f
    f[rng.random(f.shape) < 0.5] = 0
    f[:, 0] = 0
    return f if negative else np.abs(f)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 120),
    ties=st.booleans(),
    negative=st.booleans(),
)
def test_average_precision_is_sklearns(seed, n, ties, negative) -> None:
    rng = np.random.default_rng(seed)
    f = dense(rng, n, 5, ties=ties, negative=negative)
    y = rng.choice([0, 3, 255], n)
    latents, rows = np.nonzero(f.T)
    n_by_class = np.bincount(y, minlength=N_CLASSES)
    ap = average_precision(latents, f[rows, latents], y[rows], 5, n_by_class)
    assert ap.shape == (5, N_CLASSES)
    for label in np.unique(y):
        want = [average_precision_score(y == label, f[:, j]) for j in range(5)]
        np.testing.assert_allclose(ap[:, label], want, rtol=1e-12)
    assert not ap[:, 1].any()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=30))
def test_descending_key_orders_floats(values) -> None:
    v = np.array(values, np.float32) + np.float32(0)  # no -0
    order = np.argsort(descending_key(v), kind="stable")
    np.testing.assert_array_equal(v[order], np.sort(v)[::-1])


@pytest.mark.parametrize("seed", range(8))
def test_probe_r_is_mcfaddens_of_sklearns_fit(seed) -> None:
    rng = np.random.default_rng(seed)
    n = 500
    y = rng.random(n) < 0.3
    f = np.maximum(0, rng.normal(size=n) + y * rng.uniform(0, 3) - 0.5).astype(np.float32) * 40
    active = f != 0
    # Two chunks, as two pieces would give.
    halves = [(f[:250], y[:250], active[:250]), (f[250:], y[250:], active[250:])]
    found = probe_r(lambda: [(v[a], t[a]) for v, t, a in halves], n, int(y.sum()))
    fit = LogisticRegression(C=1e12, tol=1e-12, max_iter=10_000).fit(f[:, None] / 40, y)
    nll = log_loss(y, fit.predict_proba(f[:, None] / 40)[:, 1])
    assert found == pytest.approx(1 - nll / log_loss(y, np.full(n, y.mean())), abs=1e-6)


def test_probe_r_extremes() -> None:
    y = np.arange(100) < 20
    perfect = np.ones(20, np.float32)
    assert probe_r(lambda: [(perfect, y[:20])], 100, 20) > 0.999
    assert probe_r(lambda: [(perfect[:0], y[:0])], 100, 20) == pytest.approx(0, abs=1e-12)
    assert probe_r(lambda: [(perfect, y[:20])], 20, 20) == 0.0  # nothing to tell apart


def test_purity_counts_the_sixteen_highest() -> None:
    rng = np.random.default_rng(0)
    f = np.abs(rng.normal(size=300)).astype(np.float32)
    y = rng.random(300) < 0.4
    best = np.argsort(-f)[:16]
    assert purity(f, y, 1000, 500, 16) == pytest.approx(y[best].mean())


def test_purity_shares_the_last_places_among_ties() -> None:
    values = np.array([3, 3, 2, 1], np.float32)
    is_class = np.array([True, False, True, True])
    # Two of the four places go to silent tokens, of which 6 of 96 are of the class.
    assert purity(values[:2], is_class[:2], 98, 7, 4) == pytest.approx((1 + 2 * 6 / 96) / 4)
    # One place between two tied tokens.
    assert purity(values, is_class, 4, 3, 1) == pytest.approx(0.5)
    # Fewer tokens than places.
    assert purity(values, is_class, 4, 3, 16) == pytest.approx(0.75)
    # Negative values come after the silent ones.
    assert purity(-values, is_class, 6, 3, 2) == pytest.approx(0.0)


def store(root: str, f: np.ndarray, labels: np.ndarray, size: int) -> StoredCodes:
    import scipy.sparse

    with storage.open_write(storage.join(root, "c")) as handle:
        writer = CodesWriter(handle, "c", f.shape[1])
        for i in range(0, len(f), size):
            n = len(f[i : i + size])
            tokens = TokenRows(np.arange(n), np.zeros(n, np.int32), labels[i : i + n])
            writer.append(as_columns(scipy.sparse.csr_matrix(f[i : i + size])), tokens)
    return StoredCodes(root, [writer.info()])


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("max_entries", [1, 20, 150, 10**6])
def test_best_latents_do_not_depend_on_the_memory_bound(tmp_path, max_entries, negative) -> None:
    rng = np.random.default_rng(3)
    f = dense(rng, 200, 7, ties=True, negative=negative)
    f[:, 6] = np.round(rng.random(200), 1)  # dense: longer than the middle bounds
    y = rng.integers(-1, 4, 200).astype(np.int16)  # -1: class tokens take no part
    f[:, 5] += (y == 2) * np.float32(1.25)
    codes = store(str(tmp_path), f, y, 37)
    side = np.zeros(len(f), np.int8)
    rows = concepts.align(codes, (f != 0).sum(0), side, 0, max_entries).classes

    kept, labels = f[y >= 0], y[y >= 0]
    assert [row.label for row in rows] == [0, 1, 2, 3]
    for row in rows:
        ap = [average_precision_score(labels == row.label, kept[:, j]) for j in range(7)]
        assert row.average_precision == pytest.approx(max(ap), rel=1e-12)
        assert ap[row.latent] == pytest.approx(max(ap), rel=1e-12)
        assert row.n_tokens == (labels == row.label).sum()
        values, is_class = kept[:, row.latent], labels == row.label
        n_class = int(is_class.sum())
        want = purity(values[values != 0], is_class[values != 0], len(kept), n_class, 16)
        assert row.purity_at_16 == pytest.approx(want, rel=1e-12)
        want = probe_r(lambda v=values, c=is_class: [(v[v != 0], c[v != 0])], len(kept), n_class)
        assert row.probe_r == pytest.approx(want, abs=1e-9)
    assert rows[2].latent == 5
    summary = concepts.summarize(rows)
    assert summary["mean_average_precision"] == pytest.approx(
        np.mean([row.average_precision for row in rows])
    )
    assert summary["coverage_at_0.3"] == np.mean([row.average_precision >= 0.3 for row in rows])
