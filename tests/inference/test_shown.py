"""The order of latents and the purity of their images, against sorts and counts of Python."""

import collections
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saev.inference.shown import N_TOP, image_purity, strong_first

LATENT = st.tuples(st.integers(0, 9), st.floats(0.01, 100), st.integers(1, 30))
"""Tokens of ten on which it fires, mean value, images."""


@given(st.lists(LATENT, max_size=12))
def test_strong_and_rare_latents_come_first(latents: list[tuple[int, float, int]]) -> None:
    frequency = np.array([n / 10 for n, _, _ in latents])
    mean = np.array([value if n else math.nan for n, value, _ in latents])
    n_images = np.array([images if n else 0 for n, _, images in latents], dtype=np.int64)
    most = max(n_images, default=0)

    def place(i: int) -> tuple[int, float]:
        if not frequency[i]:
            return 2, 0.0
        is_few = n_images[i] < N_TOP and n_images[i] < most
        return int(is_few), -(mean[i] * math.log(1 / frequency[i]))

    found = strong_first(frequency, mean, n_images)
    assert sorted(found.tolist()) == list(range(len(latents)))
    expected = [place(i) for i in sorted(range(len(latents)), key=place)]
    assert [place(i) for i in found] == [(kind, pytest.approx(at)) for kind, at in expected]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 3)), max_size=40))
def test_purity_is_the_share_of_the_most_common_class(pairs: list[tuple[int, int]]) -> None:
    latent, class_idx = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    found = image_purity(latent, class_idx, 6)
    for one in range(6):
        classes = [number for who, number in pairs if who == one]
        known = collections.Counter(number for number in classes if number >= 0)
        if known:
            assert found[one] == known.most_common(1)[0][1] / len(classes)
        else:
            assert math.isnan(found[one])
