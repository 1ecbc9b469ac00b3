"""The best examples of every latent: exact however data is cut, in whatever order parts merge."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from saev.inference import topk
from saev.inference.codes import Columns, TokenRows
from saev.inference.topk import Entries, TopExamples, ragged_index


def dense_codes(rng: np.random.Generator, n_examples: int, n_tokens: int, n_latents: int):
    """Many ties, some negative, mostly zero: float32 [example, token, latent]."""
    shape = (n_examples, n_tokens, n_latents)
    values = rng.integers(-1, 4, shape).astype(np.float32) / 2
    values[rng.random(shape) < 0.6] = 0
    return values


def add(top: TopExamples, f: np.ndarray, first: int) -> None:
    """Offer examples first.. with token indices that begin at the class token."""
    _, n_tokens, n_latents = f.shape
    flat = f.reshape(-1, n_latents)
    rows, latents = np.nonzero(flat)
    columns = Columns.from_rows(
        np.bincount(rows, minlength=len(flat)), latents, flat[rows, latents], n_latents
    )
    example, token = np.divmod(np.arange(len(flat)), n_tokens)
    unlabelled = np.full(len(flat), -1, np.int16)
    top.add(columns, TokenRows(example + first, (token - 1).astype(np.int32), unlabelled))


def expected(f: np.ndarray, k: int) -> list[tuple[int, int, float, tuple]]:
    """(latent, example, score, ((token, value), …)), by a plain sort."""
    found = []
    for latent in range(f.shape[2]):
        scores = f[:, :, latent].max(axis=1)
        ranked = sorted(np.flatnonzero(scores > 0), key=lambda e: (-scores[e], e))
        for example in ranked[:k]:
            values = f[example, :, latent]
            tokens = tuple((int(t) - 1, float(values[t])) for t in np.flatnonzero(values))
            found.append((latent, int(example), float(scores[example]), tokens))
    return found


def listed(entries: Entries) -> list[tuple[int, int, float, tuple]]:
    ends = np.cumsum(entries.length)
    return [
        (
            int(entries.latent[i]), int(entries.example_idx[i]), float(entries.value[i]),
            tuple(
                zip(
                    entries.token_idx[end - n : end].tolist(),
                    entries.token_value[end - n : end].tolist(),
                    strict=True,
                )
            ),
        )
        for i, (end, n) in enumerate(zip(ends, entries.length, strict=True))
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_examples=st.integers(1, 25),
    k=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 25), max_size=6),
    compact_at=st.sampled_from([1, 7, 1 << 20]),
)
def test_any_cut_and_any_merge_order(seed, n_examples, k, cuts, compact_at) -> None:
    rng = np.random.default_rng(seed)
    f = dense_codes(rng, n_examples, 3, 5)
    bounds = sorted({0, n_examples, *(c for c in cuts if c < n_examples)})
    saved, topk._COMPACT_AT = topk._COMPACT_AT, compact_at
    try:
        whole = TopExamples(5, k)
        parts = []
        for first, last in itertools.pairwise(bounds):
            add(whole, f[first:last], first)
            part = TopExamples(5, k)
            add(part, f[first:last], first)
            parts.append(part.result())
        merged = TopExamples(5, k)
        for i in rng.permutation(len(parts)):
            merged.merge(parts[i])
    finally:
        topk._COMPACT_AT = saved
    assert listed(whole.result()) == expected(f, k)
    for mine, theirs in zip(whole.result(), merged.result(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_latent_that_is_never_positive_has_no_examples() -> None:
    f = np.zeros((4, 2, 3), np.float32)
    f[:, :, 1] = -1
    f[2, 0, 2] = 5
    top = TopExamples(3, 2)
    add(top, f, 0)
    assert listed(top.result()) == [(2, 2, 5.0, ((-1, 5.0),))]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.data())
def test_ragged_index(lengths, data) -> None:
    n = np.array(lengths, np.int64)
    starts = np.cumsum(n) - n
    index = np.array(data.draw(st.lists(st.integers(0, len(n) - 1), max_size=8)), np.int64)
    want = [p for i in index for p in range(starts[i], starts[i] + n[i])]
    assert ragged_index(starts, n, index).tolist() == want
