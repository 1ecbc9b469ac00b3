"""What SAEs are called beside each other."""

import itertools

import pytest

from saev.config import TrainConfig
from saev.visuals import names


def config(**raw: object) -> TrainConfig:
    return TrainConfig.from_dict(raw)


def top_k(k: int, **raw: object) -> TrainConfig:
    return config(sae={"d_sae": 64, "activation": {"kind": "top-k", "top_k": k}}, **raw)


def relu(coeff: float) -> TrainConfig:
    return config(
        sae={"d_sae": 64, "activation": {"kind": "relu"}},
        objective={"kind": "vanilla", "sparsity_coeff": coeff},
    )


def test_only_what_differs_is_named() -> None:
    assert names.of([top_k(2), top_k(4)]) == ["top_k 2", "top_k 4"]


def test_what_follows_from_something_else_is_not_named() -> None:
    """A learning rate that was chosen from d_sae, and the seeds that a sweep gives."""
    wide = [config(sae={"d_sae": n}, lr=1 / n, seed=n) for n in (64, 128)]
    assert names.of(wide) == ["d_sae 64", "d_sae 128"]


def test_a_grid_names_both_axes() -> None:
    grid = [top_k(k, lr=lr) for k, lr in itertools.product((2, 4), (1e-3, 3e-4))]
    assert names.of(grid) == [
        "top_k 2, lr 0.001", "top_k 2, lr 0.0003", "top_k 4, lr 0.001", "top_k 4, lr 0.0003",
    ]  # fmt: skip


def test_kinds_have_keys_of_their_own() -> None:
    found = names.of([top_k(2), top_k(4), relu(1e-3), relu(1e-4)])
    assert found == [
        "top-k, top_k 2", "top-k, top_k 4",
        "relu, sparsity_coeff 0.001", "relu, sparsity_coeff 0.0001",
    ]  # fmt: skip


def test_seeds_are_named_where_nothing_else_differs() -> None:
    assert names.of([top_k(2, seed=1), top_k(2, seed=2)]) == ["seed 1", "seed 2"]


@pytest.mark.parametrize("n", [1, 2])
def test_equal_saes_say_what_they_are(n: int) -> None:
    same = [top_k(2, train_data={"layer": 11})] * n
    assert names.of(same) == ["top-k, top_k 2, layer 11"] * n
