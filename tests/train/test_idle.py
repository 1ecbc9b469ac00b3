"""Swept keys that change nothing are said, and do change nothing."""

import tomllib

import pytest

from saev import load_sae, train
from saev.config import LoaderConfig, SaeConfig, TopK, TrainConfig
from saev.train import resolve

from . import synthetic

RELU = "sae.activation.kind = 'relu'\n"
JUMP = "sae.activation.kind = 'jump-relu'\n"
BATCH = "sae.activation.kind = 'batch-top-k'\nsae.top_k = 3\n"
ONE_PREFIX = "objective.kind = 'matryoshka'\nobjective.n_prefixes = 1\n"
IDLE = [
    ("n_sparsity_warmup = [0, 5]", "n_sparsity_warmup", "top-k has no sparsity penalty"),
    (f"{BATCH}n_sparsity_warmup = [0, 5]", "n_sparsity_warmup", "batch-top-k has no sparsity pen"),
    (
        f"{BATCH}sae.activation.threshold_momentum = [0.5, 0.9]",
        "sae.activation.threshold_momentum",
        "the threshold is set anew on held-out tokens",
    ),
    (
        f"{RELU}objective.target_l0 = 4\nn_sparsity_warmup = [0, 5]",
        "n_sparsity_warmup",
        "a target_l0 has no warm-up",
    ),
    (
        f"{RELU}sae.sparsity_coeff = 0\nn_sparsity_warmup = [0, 5]",
        "n_sparsity_warmup",
        "coeff is 0",
    ),
    ("sae.aux_coeff = 0\nobjective.k_aux = [1, 8]", "objective.k_aux", "aux_coeff is 0"),
    ("sae.aux_coeff = 0\ndead_after = [64, 512]", "dead_after", "aux_coeff is 0"),
    (f"{ONE_PREFIX}objective.pareto_alpha = [0.5, 1.0]", "objective.pareto_alpha", "n_prefixes is"),
    ("bf16 = [true, false]", "bf16", "a CPU never uses bfloat16"),
    ("batch_size = [9000, 16384]", "batch_size", "there are only"),
]
COUNTS = [
    f"{RELU}n_sparsity_warmup = [0, 5]",
    f"{RELU}sae.sparsity_coeff = [1e-3, 1e-2]",
    "objective.k_aux = [1, 8]",
    "dead_after = [64, 512]",
    f"{JUMP}sae.activation.init_l0 = 1\nsae.aux_coeff = 0\ndead_after = [64, 9999]",
    "lr = [1e-3, 1e-2]",
    "batch_size = [128, 256]",
]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    base = tmp_path_factory.mktemp("idle")
    shards = synthetic.write_shards(str(base), synthetic.make_truth(), n_examples=200)
    return TrainConfig(
        runs_root=str(base / "runs"),
        train_data=LoaderConfig(shards=shards, layer=3, buffer_mb=0.5, val_fraction=0.1),
        sae=SaeConfig(d_sae=96, activation=TopK(top_k=3)),
        n_train=2048, n_val=1000, batch_size=256, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize(("text", "key", "reason"), IDLE)
def test_an_idle_axis_is_said_and_trains_equal_saes(
    cfg: TrainConfig, caplog: pytest.LogCaptureFixture, text: str, key: str, reason: str
) -> None:
    table = tomllib.loads(text)
    resolve.groups(cfg, table=table)
    (said,) = [r.getMessage() for r in caplog.records if "is swept, but" in r.getMessage()]
    assert said.startswith(f"{key} is swept, but ")
    assert reason in said
    assert "2 SAEs differ in their seeds alone" in said
    caplog.clear()
    urls = train.run(cfg, table={**table, "seed": 3})
    assert "2 SAEs are repetitions of each other" in caplog.text
    first, second = (load_sae(url).state_dict() for url in urls)
    assert len(set(urls)) == 2
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("text", COUNTS)
def test_an_axis_that_counts_is_not(
    cfg: TrainConfig, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    table = tomllib.loads(text)
    urls = train.run(cfg, table={**table, "seed": 3})
    assert "is swept, but" not in caplog.text
    first, second = (load_sae(url).state_dict() for url in urls)
    assert not all(first[name].equal(second[name]) for name in first)


def test_two_idle_axes_are_one_warning(cfg: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    text = "bf16 = [true, false]\nn_sparsity_warmup = [0, 5]\nsae.top_k = [3, 4]"
    resolve.groups(cfg, table=tomllib.loads(text))
    (said,) = [r.getMessage() for r in caplog.records if "is swept, but" in r.getMessage()]
    assert "; bf16 is swept, but" in said or "; n_sparsity_warmup is swept, but" in said
    assert "8 SAEs" in said
