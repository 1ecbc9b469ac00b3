"""Entropy and coverage, against scipy and against what can be counted by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy

from saev.loaders import Batch, batch_metrics


def batch_of(examples, tokens) -> Batch:
    examples, tokens = torch.tensor(examples), torch.tensor(tokens)
    return Batch(torch.zeros(len(examples), 1), examples, tokens, None, torch.zeros(len(examples)))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 5)), min_size=1, max_size=200))
def test_against_scipy(rows):
    examples, tokens = map(list, zip(*rows, strict=True))
    found = batch_metrics(batch_of(examples, tokens), n_examples=10, content_tokens=6)
    counts = np.bincount(examples, minlength=10)
    assert found["loader/example_entropy"] == pytest.approx(scipy_entropy(counts), abs=1e-12)
    assert found["loader/example_entropy_normalized"] == pytest.approx(
        scipy_entropy(counts) / math.log(10), abs=1e-12
    )
    assert found["loader/example_coverage"] == (counts > 0).mean()
    content = [t for t in tokens if t >= 0]
    assert ("loader/token_entropy" in found) == bool(content)
    if content:
        counts = np.bincount(content, minlength=6)
        assert found["loader/token_entropy"] == pytest.approx(scipy_entropy(counts), abs=1e-12)
        assert found["loader/token_entropy_normalized"] == pytest.approx(
            scipy_entropy(counts) / math.log(6), abs=1e-12
        )
        assert found["loader/token_coverage"] == pytest.approx((counts > 0).mean())


def test_the_extremes():
    one = batch_metrics(batch_of([4] * 8, [2] * 8), n_examples=10, content_tokens=4)
    assert one["loader/example_entropy"] == one["loader/token_entropy_normalized"] == 0.0
    assert one["loader/token_coverage"] == 0.25
    even = batch_metrics(batch_of([0, 1, 2, 3], [3, 2, 1, 0]), n_examples=4, content_tokens=4)
    assert even["loader/example_entropy"] == pytest.approx(math.log(4))
    assert even["loader/token_entropy_normalized"] == pytest.approx(1.0)
    assert even["loader/example_coverage"] == even["loader/token_coverage"] == 1.0
    single = batch_metrics(batch_of([0, 0], [0, 0]), n_examples=1, content_tokens=1)
    assert single["loader/example_entropy_normalized"] == 1.0
