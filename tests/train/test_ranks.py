"""Training in several processes: the same SAEs, whatever their number and whoever is killed.

Every command is real: processes that find each other through gloo on this machine.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from forker import Ended, Forker

from saev import storage, torchrun, train
from saev.config import LoaderConfig, SaeConfig, TrainConfig
from saev.errors import ConfigError, StorageError
from saev.nn import load_sae
from saev.shards import Shards
from saev.train import team

from .test_training import files_of, metrics_of, rows_of, update

SWEEP = """
sae.d_sae = 96
objective.sparsity_coeff = 1e-3
dead_after = 600
[[grid]]
sae.activation.kind = ["relu", "jump-relu"]
objective.kind = ["vanilla", "matryoshka"]
[[grid]]
sae.activation.kind = ["top-k", "batch-top-k"]
sae.activation.top_k = 3
objective.kind = ["vanilla", "matryoshka"]
"""


def command(cfg: TrainConfig, **flags: object) -> list[str]:
    """`saev train` with a config's values."""
    data = cfg.train_data
    values = {
        "runs-root": cfg.runs_root, "train-data.shards": data.shards, "train-data.layer": 3,
        "train-data.buffer-mb": data.buffer_mb, "n-train": cfg.n_train, "n-val": cfg.n_val,
        "batch-size": cfg.batch_size, "log-every": cfg.log_every, "device": "cpu",
        "checkpoint-every": cfg.checkpoint_every,
        **{name.replace("_", "-"): value for name, value in flags.items()},
    }  # fmt: skip
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    kind = ["sae.activation:top-k", "--sae.activation.top-k", "3"]
    return ["train", *words, *([] if "sweep" in values else ["--sae.d-sae", "96", *kind])]


def torchrun_of(forker: Forker, size: int, argv: list[str]) -> Ended:
    """A command under torchrun, to its end."""
    script = "import runpy; runpy.run_module('torch.distributed.run', run_name='__main__')"
    pid = forker.start([f"--nproc-per-node={size}", "-m", "saev", *argv], script=script)
    return forker.wait(pid)


def results_of(url: str) -> dict[str, bytes]:
    """All files of a run but its config, which says where it is."""
    return {name: data for name, data in files_of(url).items() if name != "config.json"}


def children(pid: int) -> list[int]:
    """Processes that a process started, in that order."""
    return [int(w) for w in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for(what, seconds: float = 120.0):
    """The first true value that a function returns."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s in vain")


def points(cfg: TrainConfig) -> list[Path]:
    return sorted(Path(cfg.runs_root).glob("resume/*/*.json"))


@pytest.fixture
def long(cfg) -> TrainConfig:
    """Several seconds of steps, with many resume points."""
    return update(cfg, n_train=250 * 256, checkpoint_every=20, log_every=20)


# --- The same SAEs ---


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_the_same_saes(cfg, forker, tmp_path, size):
    """All kinds in one sweep; 3 ranks as torchrun starts them, 2 as this program does."""
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(SWEEP)
    cfg = update(cfg, n_train=30 * 250, batch_size=250, sweep=str(sweep), sae=SaeConfig())
    alone = train.run(update(cfg, runs_root=str(tmp_path / "alone")))
    if size == 2:
        done = forker.run(command(cfg, sweep=sweep, n_ranks=2))
    else:
        done = torchrun_of(forker, 3, command(cfg, sweep=sweep))
    assert done.status == 0, done.stderr
    assert done.stderr.count(f"{size} ranks share batches of 250 tokens") == 1  # rank 0 alone logs
    together = done.stdout.split()
    assert [storage.name(u) for u in together] == [storage.name(u) for u in alone]
    assert len(alone) == 8
    for one, many in zip(alone, together, strict=True):
        want, found = rows_of(one), rows_of(many)
        assert len(want) == len(found) == 15
        assert any(row["train/aux"] > 0 for row in want) or "relu" in str(
            files_of(one)["config.json"]
        )
        for a, b in zip(want, found, strict=True):
            exact = {k for k in a if k.startswith("loader/") or k in ("step", "tokens", "train/lr")}
            assert {k: b[k] for k in exact} == {k: a[k] for k in exact}
            assert b["train/mse"] == pytest.approx(a["train/mse"], rel=1e-3)
            assert b["train/l0"] == pytest.approx(a["train/l0"], rel=1e-3)
            assert b["train/n_dead"] == pytest.approx(a["train/n_dead"], abs=1)
        assert metrics_of(many)["normalized_mse"] == pytest.approx(
            metrics_of(one)["normalized_mse"], rel=1e-3
        )
        torch.testing.assert_close(load_sae(many).W_dec, load_sae(one).W_dec, rtol=0, atol=0.02)
    assert not points(cfg)


@pytest.mark.slow
def test_one_rank_of_torchrun_is_plain(cfg, forker, tmp_path):
    plain = train.run(update(cfg, runs_root=str(tmp_path / "plain")))
    done = torchrun_of(forker, 1, command(cfg))
    assert done.status == 0, done.stderr
    (url,) = done.stdout.split()
    assert results_of(url) == results_of(plain[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a machine with two GPUs")
def test_two_gpus_train_what_one_trains(cfg, tmp_path):
    """Through NCCL, one process per GPU without being asked for."""
    cfg = update(cfg, device="auto", bf16=False, n_train=30 * 256)
    (one,) = train.run(update(cfg, runs_root=str(tmp_path / "one"), n_ranks=1))
    (many,) = train.run(cfg)
    for a, b in zip(rows_of(one), rows_of(many), strict=True):
        assert b["train/mse"] == pytest.approx(a["train/mse"], rel=1e-2)
        assert b["loader/example_entropy"] == a["loader/example_entropy"]


# --- Interruptions ---


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all_and_the_same_command_completes(long, forker, tmp_path):
    whole = forker.run(command(update(long, runs_root=str(tmp_path / "whole")), n_ranks=2))
    assert whole.status == 0, whole.stderr
    pid = forker.start(command(long, n_ranks=2))
    wait_for(lambda: len(points(long)) > 1)
    ranks = children(pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    status, out, err = forker.wait(pid)
    assert status == 1
    assert out == ""
    assert err.count("saev: error: ") == 1
    assert "Traceback" not in err
    assert "Rank 1 of 2 was killed by SIGKILL" in err
    assert "same command continues" in err
    assert not any(alive(pid) for pid in ranks)
    assert points(long)
    again = forker.run(command(long, n_ranks=2))
    assert again.status == 0, again.stderr
    assert "Continuing at step" in again.stderr
    assert results_of(again.stdout.strip()) == results_of(whole.stdout.strip())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_writes_a_resume_point(long, forker, tmp_path, number):
    long = update(long, n_train=500 * 256, checkpoint_every=100)
    pid = forker.start(command(long, n_ranks=2))
    wait_for(lambda: points(long))
    os.kill(pid, number)
    status, _, err = forker.wait(pid)
    assert status == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], err
    assert "Traceback" not in err
    step = json.loads(points(long)[-1].read_text())["step"]
    assert 100 < step < 500
    assert step % 100  # written because of the signal
    if number == signal.SIGINT:
        return
    # Another number of ranks goes on, with the same rows in every batch.
    again = forker.run(command(long, n_ranks=3))
    assert again.status == 0, again.stderr
    assert f"Continuing at step {step} of 500" in again.stderr
    (alone,) = train.run(update(long, runs_root=str(tmp_path / "alone")))
    found, want = rows_of(again.stdout.strip()), rows_of(alone)
    assert [r["step"] for r in found] == [r["step"] for r in want]
    assert [r["loader/example_entropy"] for r in found] == [
        r["loader/example_entropy"] for r in want
    ]
    assert found[-1]["train/mse"] == pytest.approx(want[-1]["train/mse"], rel=0.05)


@pytest.mark.slow
def test_ranks_end_with_what_started_them(long, forker):
    pid = forker.start(command(long, n_ranks=2))
    wait_for(lambda: points(long))
    ranks = children(pid)
    os.kill(pid, signal.SIGKILL)
    forker.wait(pid)
    wait_for(lambda: not any(alive(pid) for pid in ranks), 20)


# --- Mistakes ---


@pytest.mark.slow
def test_what_goes_wrong_in_the_ranks_is_one_error_of_its_kind(cfg, shards_url):
    with pytest.raises(ConfigError, match=r"the loss is not finite at step \d+ of 8"):
        train.run(update(cfg, n_ranks=2, lr=1e30, n_lr_warmup=0))


@pytest.mark.slow
def test_what_only_one_rank_sees_is_the_error_of_all(cfg, tmp_path):
    """A damaged example: the rank that reads it names it, the other one lost its partner."""
    copy = tmp_path / "shards"
    for path in Path(cfg.train_data.shards).iterdir():
        (copy / path.name).parent.mkdir(exist_ok=True)
        (copy / path.name).write_bytes(path.read_bytes())
    with Shards.open(str(copy)) as shards:
        assert len(shards.infos) > 1
    damaged = bytearray((copy / "acts000001.bin").read_bytes())
    damaged[100] ^= 1
    (copy / "acts000001.bin").write_bytes(damaged)
    data = LoaderConfig(shards=str(copy), layer=3, buffer_mb=0.5)
    with pytest.raises(StorageError, match=r"acts000001\.bin"):
        train.run(update(cfg, train_data=data, n_ranks=2, n_train=40_000, n_val=0))


def test_a_wrong_number_of_ranks(cfg, monkeypatch):
    with pytest.raises(ConfigError, match="cuda:1 is one device"):
        team.n_ranks(update(cfg, device="cuda:1", n_ranks=2))
    assert team.n_ranks(update(cfg, device="cuda:1")) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert team.n_ranks(update(cfg, device="auto")) == 4
    assert team.n_ranks(update(cfg, device="auto", n_ranks=2)) == 2
    assert team.n_ranks(cfg) == 1
    with pytest.raises(ConfigError, match="n-ranks is 5, but there are 4 GPUs"):
        team.n_ranks(update(cfg, device="cuda", n_ranks=5))
    place = torchrun.Place(rank=4, size=5, local_rank=4)
    with pytest.raises(ConfigError, match="Rank 4 is the 5th on its machine, which has 4 GPUs"):
        team.join(place, update(cfg, device="cuda"))
    with pytest.raises(ConfigError, match="n-ranks is 2, but 5 ranks were started"):
        team.join(place, update(cfg, n_ranks=2))


def test_what_torchrun_says(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun.place() is None
    values = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "trainer-0", "MASTER_PORT": "29500"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert torchrun.place() == (5, 8, 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert torchrun.place() == (5, 8, 1)
    monkeypatch.setenv("RANK", "five")
    with pytest.raises(ConfigError, match="RANK='five', expected a number"):
        torchrun.place()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert torchrun.place() is None


def test_a_machine_of_several_does_not_train_alone(cfg, monkeypatch):
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_NODE_RANK", "1")
    with pytest.raises(ConfigError, match=r"PET_NNODES=2, .* but no RANK: each of them"):
        train.run(cfg)
    assert not points(cfg)
    for nodes in ("1", "1:1", ""):
        monkeypatch.setenv("PET_NNODES", nodes)
        torchrun.refuse_to_be_alone()
    monkeypatch.setenv("PET_NNODES", "1:4")
    with pytest.raises(ConfigError, match="PET_NNODES=1:4"):
        torchrun.refuse_to_be_alone()


def test_the_run_id_does_not_depend_on_the_number_of_ranks(cfg):
    ids = {train.plan(update(cfg, n_ranks=n))[0]["members"][0]["run_id"] for n in (0, 1, 8)}
    assert len(ids) == 1
