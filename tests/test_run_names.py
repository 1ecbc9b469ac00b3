"""What SAEs are called beside each other."""

import itertools

import pytest

from saev import names
from saev.config import TrainConfig


def config(**raw: object) -> TrainConfig:
    return TrainConfig.from_dict(raw)


def top_k(k: int, **raw: object) -> TrainConfig:
    return config(sae={"d_sae": 64, "activation": {"kind": "top-k", "top_k": k}}, **raw)


def relu(coeff: float) -> TrainConfig:
    return config(
        sae={"d_sae": 64, "activation": {"kind": "relu"}},
        objective={"kind": "vanilla", "sparsity_coeff": coeff},
    )


def test_every_name_says_what_the_sae_is() -> None:
    assert names.of([top_k(2), top_k(4)]) == ["topk2-s64", "topk4-s64"]
    aimed = config(
        sae={"d_sae": 128, "activation": {"kind": "jump-relu"}},
        objective={"kind": "matryoshka", "target_l0": 32.0},
    )
    assert names.of([aimed]) == ["jumprelu-l32-s128-matryoshka"]


def test_what_follows_from_something_else_is_not_named() -> None:
    """A learning rate that was chosen from d_sae, and the seeds that a sweep gives."""
    wide = [config(sae={"d_sae": n}, lr=1 / n, seed=n) for n in (64, 128)]
    assert names.of(wide) == ["topk32-s64", "topk32-s128"]


def test_a_grid_names_both_axes() -> None:
    grid = [top_k(k, lr=lr) for k, lr in itertools.product((2, 4), (1e-3, 3e-4))]
    assert names.of(grid) == [
        "topk2-s64-lr0.001", "topk2-s64-lr0.0003", "topk4-s64-lr0.001", "topk4-s64-lr0.0003",
    ]  # fmt: skip


def test_kinds_have_keys_of_their_own() -> None:
    found = names.of([top_k(2), top_k(4), relu(1e-3), relu(1e-4)])
    assert found == ["topk2-s64", "topk4-s64", "relu-s64-coeff0.001", "relu-s64-coeff0.0001"]


def test_seeds_are_named_where_nothing_else_differs() -> None:
    assert names.of([top_k(2, seed=1), top_k(2, seed=2)]) == ["topk2-s64-seed1", "topk2-s64-seed2"]


def test_a_key_of_several_words_stands_apart_from_its_value() -> None:
    found = names.of([top_k(2, batch_size=n) for n in (256, 512)])
    assert found == ["topk2-s64-batch_size=256", "topk2-s64-batch_size=512"]


@pytest.mark.parametrize("n", [1, 2])
def test_equal_saes_have_equal_names(n: int) -> None:
    assert names.of([top_k(2, train_data={"layer": 11})] * n) == ["topk2-s64"] * n
