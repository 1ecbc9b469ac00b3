"""Sweep files: grids, precedence, seeds, and what a wrong key is answered with."""

import re
from pathlib import Path

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from saev import cli
from saev.config import Matryoshka, Relu, TopK, TrainConfig, Vanilla
from saev.config.sweeps import leaves, requested_configs, requested_saes
from saev.errors import ConfigError

GUIDE = """
[sae]
sparsity_coeff = [1e-4, 2e-4, 3e-4]
d_model = 768
d_sae = [6144, 12288]
[data]
scale_mean = true
"""


@pytest.fixture
def sweep(tmp_path):
    """Writes a sweep file and resolves it, after a command line if there is one."""

    def resolved(text: str, argv: str = "", **update) -> tuple[TrainConfig, ...]:
        path = tmp_path / "sweep.toml"
        path.write_text(text)
        cfg = tyro.cli(TrainConfig, args=argv.split()).model_copy(update={"sweep": str(path)})
        return requested_configs(cfg.model_copy(update=update), cli.explicit_keys(argv.split()))

    return resolved


def test_the_guides_file(sweep):
    members = sweep(GUIDE, "sae.activation:relu")
    found = [(m.objective.sparsity_coeff, m.sae.d_sae) for m in members]
    assert found == [(c, s) for c in (1e-4, 2e-4, 3e-4) for s in (6144, 12288)]
    assert all(m.sae.d_model == 768 and m.scale_mean for m in members)
    assert all(isinstance(m.sae.activation, Relu) for m in members)
    assert {m.seed for m in members} == {0}  # each one's own is made when all else is decided
    assert all(m.sweep == "" for m in members)


def test_no_sweep_is_one_config():
    cfg = TrainConfig(seed=5)
    assert requested_configs(cfg) == (cfg,)


def test_separate_grids_share_what_stands_outside(sweep):
    members = sweep("""
        batch_size = 512
        lr = [1e-3, 1e-4]
        [[grid]]
        sae.activation.kind = "relu"
        objective.sparsity_coeff = [1e-4, 3e-4]
        [[grid]]
        lr = 5e-4
        sae.activation = {kind = "batch-top-k", top_k = [4, 8, 16]}
    """)
    found = [
        (m.lr, m.sae.activation.kind, getattr(m.sae.activation, "top_k", None)) for m in members
    ]
    assert found[:4] == [(lr, "relu", None) for lr in (1e-3, 1e-4) for _ in range(2)]
    assert found[4:] == [(5e-4, "batch-top-k", k) for k in (4, 8, 16)]
    assert {m.batch_size for m in members} == {512}


def test_kinds_are_swept_and_keep_what_was_chosen(sweep):
    members = sweep(
        """
        [sae.activation]
        kind = ["top-k", "batch-top-k"]
        [objective]
        kind = ["vanilla", "matryoshka"]
        """,
        "sae.activation:top-k --sae.activation.top-k 7",
    )
    # The command line chose the kind, so only the objectives are left.
    assert [(m.sae.activation.kind, m.objective.kind) for m in members] == [
        ("top-k", "vanilla"),
        ("top-k", "matryoshka"),
    ]
    base = TrainConfig.from_dict({"sae": {"activation": {"kind": "top-k", "top_k": 7}}})
    members = sweep('sae.activation.kind = ["top-k", "batch-top-k"]', sae=base.sae)
    assert [(m.sae.activation.kind, m.sae.activation.top_k) for m in members] == [
        ("top-k", 7),
        ("batch-top-k", 7),
    ]


def test_the_command_line_wins_even_with_the_default_value(sweep):
    text = "dead_after = [5, 20]\nlr = [1e-3, 1e-4]"
    members = sweep(text, "--dead-after 7")
    assert [(m.dead_after, m.lr) for m in members] == [(7, 1e-3), (7, 1e-4)]
    assert [m.scale_mean for m in sweep("scale_mean = [true, false]", "--scale-mean")] == [True]
    assert [m.scale_norm for m in sweep("data.scale_norm = true", "--no-scale-norm")] == [False]
    members = sweep("objective.sparsity_coeff = [1e-4, 2e-4]", "objective:matryoshka")
    assert all(isinstance(m.objective, Matryoshka) for m in members)
    assert [m.objective.sparsity_coeff for m in members] == [1e-4, 2e-4]


def test_seeds_that_are_swept_are_taken_as_they_are(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text("[[grid]]\nseed = [7, 7, 9]\n[[grid]]\nlr = [1e-3, 1e-4]")
    found = requested_saes(TrainConfig(sweep=str(path), seed=40))
    assert [(one.config.seed, one.position) for one in found] == [
        (7, None), (9, None), (40, 2), (40, 3),
    ]  # fmt: skip
    assert [one.position for one in requested_saes(TrainConfig(seed=5))] == [None]


def test_repeated_combinations_are_trained_once(sweep, caplog):
    members = sweep("[[grid]]\nlr = [1e-3, 1e-4]\n[[grid]]\nlr = [1e-4, 1e-5]")
    assert [m.lr for m in members] == [1e-3, 1e-4, 1e-5]
    assert "1 of 4 combinations are repeated" in caplog.text


def test_tuples_are_swept_by_lists_of_lists(sweep):
    members = sweep("[train_data]\nignore_labels = [[], [0], [0, 255]]")
    assert [m.train_data.ignore_labels for m in members] == [(), (0,), (0, 255)]
    members = sweep("[train_data]\nignore_labels = [0, 255]")
    assert [m.train_data.ignore_labels for m in members] == [(0, 255)]


def test_data_sets_both_sides(sweep):
    members = sweep("[data]\nlayer = [3, 11]\nseed = 4\nval_fraction = 0.2")
    assert [(m.train_data.layer, m.val_data.layer) for m in members] == [(3, 3), (11, 11)]
    assert all(m.data_seed == 4 and m.val_data.val_fraction == 0.2 for m in members)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sae.sparsity_coef = [1e-4]", "unknown key sae.sparsity_coef.*sae.sparsity_coeff"),
        ("learning_rate = 1e-4\n", "unknown key learning_rate"),
        ("[sae]\nlr = 1e-4", "unknown key sae.lr. Did you mean "),
        ("[sae.activation]\ntopk = 3", r"Did you mean sae.activation.top_k\?"),
        ("[sae]\ntop_kk = 3", r"Did you mean sae.top_k\?"),
        ("lr = ['fast']", "lr: .*number.*found 'fast'"),
        ("lr = [true]", "lr: .*number.*found True"),
        ("batch_size = 12.5", "batch_size: .*integer.*found 12.5"),
        ("batch_size = '64'", "batch_size: .*integer.*found '64'"),
        ("sae.d_sae = [-4]", "sae.d_sae: .*greater than or equal to 1.*found -4"),
        ("optim = 'sgd'", "optim: .*'adam' or 'muon'.*found 'sgd'"),
        ("sae.activation.kind = 'topk'", "sae.activation.kind: .*found 'topk'"),
        ("lr = []", "lr is an empty list"),
        ("device = ['cpu', 'cuda']", "device does not change what is trained"),
        ("[grid]\nlr = 1e-4", r"\[\[grid\]\]"),
        ("lr = ", "not valid TOML"),
        ("lr = " + "[" * 100_000, "not valid TOML"),
        (
            "[sae.activation]\nkind = ['relu', 'top-k']\ntop_k = [4, 8]",
            "sae.activation.top_k is set, but sae.activation is relu",
        ),
    ],
)
def test_a_wrong_file_names_the_key(sweep, text, message):
    with pytest.raises(ConfigError, match=message):
        sweep(text)


def test_integral_floats_are_integers(sweep):
    (member,) = sweep("n_train = 1e6")
    assert member.n_train == 1_000_000
    assert isinstance(member.n_train, int)


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(Exception, match="does not exist") as caught:
        requested_configs(TrainConfig(sweep=str(tmp_path / "none.toml")))
    assert type(caught.value).__name__ == "StorageError"


def test_every_flag_of_the_command_line_is_a_key_of_sweeps():
    """What explicit_keys reads from a command line are the names that a sweep uses."""
    line = (
        "--lr 4e-3 --sae.exp-factor 16 --n-train=100_000_000 --train-data.layer 11 --no-bf16 "
        "--sae.no-normalize-w-dec sae.activation:relu objective:matryoshka "
        "--objective.sparsity-coeff 1e-3"
    )
    argv = line.split()
    cfg = tyro.cli(TrainConfig, args=argv)
    assert not cfg.bf16
    assert not cfg.sae.normalize_w_dec
    want = {
        "lr", "sae.exp_factor", "n_train", "train_data.layer", "sae.normalize_w_dec",
        "sae.activation.kind", "objective.kind", "objective.sparsity_coeff", "bf16",
    }  # fmt: skip
    assert want <= cli.explicit_keys(argv)
    assert want <= set(leaves())


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "n_members"), [("topk", 8), ("relu", 6), ("kinds", 14), ("lr", 12), ("layers", 6)]
)
def test_ready_made_sweeps(name, n_members):
    members = requested_configs(TrainConfig(sweep=name))
    assert len(members) == n_members


def test_sweeps_of_the_documentation(tmp_path):
    text = (ROOT / "docs" / "training.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    found = []
    for block in blocks:
        (tmp_path / "s.toml").write_text(block)
        found.append(len(requested_configs(TrainConfig(sweep=str(tmp_path / "s.toml")))))
    assert found == [8, 5]


def test_all_ready_made_sweeps_are_tested():
    assert len(list((ROOT / "saev/configs/sweeps").glob("*.toml"))) == 5


@given(
    lrs=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=4, unique=True),
    ks=st.lists(st.integers(1, 512), min_size=1, max_size=4, unique=True),
    n_grids=st.integers(1, 3),
)
def test_a_grid_is_the_product_in_order(tmp_path_factory, lrs, ks, n_grids):
    path = tmp_path_factory.mktemp("sweep") / "s.toml"
    grids = "".join(f"[[grid]]\ndata_seed = {i}\nsae.top_k = {ks}\n" for i in range(n_grids))
    path.write_text(f"lr = {lrs}\n{grids}")
    members = requested_configs(TrainConfig(sweep=str(path)))
    want = [(lr, k, i) for i in range(n_grids) for lr in lrs for k in ks]
    assert [(m.lr, m.sae.activation.top_k, m.data_seed) for m in members] == want
    assert all(isinstance(m.sae.activation, TopK) for m in members)


@pytest.mark.parametrize(
    ("text", "argv"),
    [
        ("", "objective:vanilla --objective.sparsity-coeff 1e-3"),  # the default, but asked for
        ("", "sae.activation:top-k objective:vanilla --objective.sparsity-coeff 2e-3"),
        ("", "sae.activation:batch-top-k objective:vanilla --objective.sparsity-coeff 2e-3"),
        ("lr = [1e-3, 2e-3]", "objective:vanilla --objective.sparsity-coeff 2e-3"),
        ("sae.sparsity_coeff = [1e-3]", "sae.activation:top-k"),
        (
            "[[grid]]\nsae.sparsity_coeff = 1e-3\nsae.activation.kind = 'top-k'\n"
            "[[grid]]\nsae.activation.kind = 'relu'",
            "",
        ),
        ("sae.sparsity_coeff = 1e-3\nsae.activation.kind = 'batch-top-k'", ""),
    ],
)
def test_a_penalty_for_top_k_is_refused(sweep, text, argv):
    args = argv.split()
    cfg = tyro.cli(TrainConfig, args=args)
    with pytest.raises(ConfigError, match=r"top-k has no sparsity penalty.* or choose sae\.activ"):
        _ = sweep(text, argv) if text else requested_saes(cfg, keys(args))


keys = cli.explicit_keys


@pytest.mark.parametrize(
    ("text", "argv"),
    [
        (GUIDE, ""),  # only warned of, since ReLU is the default there
        ("sae.sparsity_coeff = [1e-3]", "sae.activation:relu"),
        ("lr = [1e-3]", "sae.activation:relu objective:vanilla --objective.sparsity-coeff 1e-3"),
        ("sae.activation.kind = ['top-k', 'relu']", ""),
        (
            "sae.activation.kind = ['top-k', 'relu']",
            "objective:vanilla --objective.sparsity-coeff 2e-3",
        ),
        (
            "sae.sparsity_coeff = 1e-3\n"
            "[[grid]]\nsae.top_k = 2\n[[grid]]\nsae.activation.kind = 'relu'",
            "",
        ),
        ("lr = [1e-3]", "objective:vanilla --objective.sparsity-coeff 0"),
    ],
)
def test_other_penalties_are_not(sweep, text, argv):
    assert sweep(text, argv)


def test_a_penalty_from_python_is_refused():
    with pytest.raises(ConfigError, match="top-k has no sparsity penalty"):
        requested_configs(TrainConfig(objective=Vanilla(sparsity_coeff=0.1)))


def test_tuples_that_may_be_none_are_swept_by_lists_of_lists(sweep):
    members = sweep("val_data.ignore_labels = [[], [0, 255]]")
    assert [m.val_data.ignore_labels for m in members] == [(), (0, 255)]
    (member,) = sweep("val_data.ignore_labels = [0, 255]")
    assert member.val_data.ignore_labels == (0, 255)


def test_keys_of_earlier_versions_are_left_out_with_a_word(sweep, caplog):
    text = """
    grad_clip = [0.5, 1.0]
    sae.activation = {kind = "jump-relu", init_threshold = 0.1, bandwidth = [0.05, 0.1]}
    lr = [1e-3, 1e-4]
    """
    members = sweep(text)
    assert [(m.sae.activation.kind, m.lr) for m in members] == [
        ("jump-relu", 1e-3),
        ("jump-relu", 1e-4),
    ]
    for key in ("grad_clip", "sae.activation.init_threshold", "sae.activation.bandwidth"):
        assert f"{key} was removed and does nothing" in caplog.text
