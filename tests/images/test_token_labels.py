"""token_labels against a reference that counts one token at a time."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saev.errors import ConfigError
from saev.images import token_labels


def reference(mask: np.ndarray, grid: tuple[int, int], pixel_agg: str, bg_label: int) -> list[int]:
    """Read off the definition, with loops."""
    rows, columns = grid
    height, width = mask.shape[0] // rows, mask.shape[1] // columns
    labels = []
    for row in range(rows):
        for column in range(columns):
            counts: collections.Counter[int] = collections.Counter()
            for y in range(row * height, (row + 1) * height):
                for x in range(column * width, (column + 1) * width):
                    counts[int(mask[y, x])] += 1
            if pixel_agg == "prefer-fg" and set(counts) != {bg_label}:
                del counts[bg_label]
            most = max(counts.values())
            labels.append(min(value for value, n in counts.items() if n == most))
    return labels


@st.composite
def masks(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int]]:
    rows, columns, height, width = (draw(st.integers(1, 5)) for _ in range(4))
    seed, n_values = draw(st.integers(0, 2**32)), draw(st.sampled_from([1, 2, 3, 256]))
    rng = np.random.default_rng(seed)
    values = rng.choice(256, n_values, replace=False)  # few values make many ties
    mask = rng.choice(values, (rows * height, columns * width)).astype(np.uint8)
    return mask, (rows, columns)


@given(masks(), st.sampled_from(["majority", "prefer-fg"]), st.integers(0, 255), st.booleans())
@settings(max_examples=400, deadline=None)
def test_agrees_with_the_definition(
    case: tuple[np.ndarray, tuple[int, int]], pixel_agg: str, bg_label: int, bg_occurs: bool
):
    mask, grid = case
    if bg_occurs:
        bg_label = int(mask[0, 0])
    labels = token_labels(mask, grid, pixel_agg, bg_label)
    assert labels.dtype == np.uint8
    assert labels.tolist() == reference(mask, grid, pixel_agg, bg_label)


def test_examples_in_words():
    mask = np.array([[0, 0, 5, 5], [0, 7, 2, 2], [9, 9, 1, 0], [9, 9, 0, 0]], np.uint8)
    assert token_labels(mask, (2, 2)).tolist() == [0, 2, 9, 0]  # a tie of 5 and 2 goes to 2
    assert token_labels(mask, (2, 2), "prefer-fg").tolist() == [7, 2, 9, 1]
    assert token_labels(mask, (2, 2), "prefer-fg", 9).tolist() == [0, 2, 9, 0]
    assert token_labels(mask, (1, 2)).tolist() == [9, 0]  # not square, row by row


@pytest.mark.parametrize("grid", [(3, 2), (2, 3), (0, 2), (8, 8)])
def test_grid_that_does_not_divide_the_mask(grid: tuple[int, int]):
    with pytest.raises(
        ConfigError, match=rf"4 x 4 pixels cannot be cut into {grid[0]} x {grid[1]}"
    ):
        token_labels(np.zeros((4, 4), np.uint8), grid)
