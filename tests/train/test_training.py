"""The training stage as a user sees it: what is learned, what is written, what is skipped."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from saev import storage, train
from saev.config import (
    BatchTopK,
    JumpRelu,
    LoaderConfig,
    Matryoshka,
    Relu,
    SaeConfig,
    TopK,
    TrainConfig,
    Vanilla,
)
from saev.errors import CheckpointError, ConfigError, IncompleteError
from saev.loaders import OrderedLoader
from saev.nn import SaeBank, load_sae
from saev.shards import Shards
from saev.train import resume, team, trainer

from . import synthetic


def update(cfg: TrainConfig, **values) -> TrainConfig:
    return cfg.model_copy(update=values)


def metrics_of(url: str) -> dict:
    return storage.read_json(storage.join(url, "run.json"))["metrics"]


def rows_of(url: str) -> list[dict]:
    return [json.loads(line) for line in (Path(url) / "metrics.jsonl").read_text().splitlines()]


def files_of(url: str | Path) -> dict[str, bytes]:
    """Everything in a run folder but what holds wall times.

    run.json lists config.json, which names runs_root and the like; that is left out.
    """
    root = Path(url)
    found = {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.parent.name != "tb" and p.name != "timings.jsonl"
    }
    if "run.json" in found:
        record = json.loads(found["run.json"])
        del record["checksum"], record["files"]["config.json"]
        found["run.json"] = json.dumps(record).encode()
    return found


# --- What is learned ---

LONG = {"n_train": 120_000, "batch_size": 512, "log_every": 50, "lr": 1e-2}
GOLDEN = {  # activation, objective, largest NMSE, largest L0
    "top-k": (TopK(top_k=3), Vanilla(), 0.06, 3),
    "batch-top-k": (BatchTopK(top_k=3), Vanilla(), 0.06, 3.5),
    "matryoshka": (BatchTopK(top_k=3), Matryoshka(n_prefixes=3), 0.1, 3.5),
    "relu": (Relu(), Vanilla(sparsity_coeff=0.03), 0.13, 20),
    "jump-relu": (JumpRelu(), Vanilla(target_l0=3), 0.06, 3.3),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_true_directions_are_found(cfg, truth, name):
    """Golden runs: the bounds are twice what was measured when this was written."""
    activation, objective, nmse, l0 = GOLDEN[name]
    sae = SaeConfig(d_sae=96, activation=activation)
    (url,) = train.run(update(cfg, **LONG, sae=sae, objective=objective))
    metrics = metrics_of(url)
    assert metrics["normalized_mse"] < nmse
    assert metrics["l0"] <= l0
    assert synthetic.recovered(load_sae(url).W_dec, truth) > 0.9


def test_jump_relu_and_its_penalty(cfg, tmp_path):
    """A larger coefficient of the L0 penalty leaves fewer latents on."""
    sweep = tmp_path / "s.toml"
    sweep.write_text("objective.sparsity_coeff = [0.0, 1e-3, 1e-2, 1e-1]\n")
    sae = SaeConfig(d_sae=96, activation=JumpRelu())
    found = [metrics_of(u) for u in train.run(update(cfg, **LONG, sae=sae, sweep=str(sweep)))]
    l0 = [m["l0"] for m in found]
    assert l0[0] > 1.3 * l0[1] > 1.3 * 1.3 * l0[2], l0
    assert l0[3] < 4, l0
    assert max(m["normalized_mse"] for m in found[:3]) < 0.1


def test_a_saved_sae_takes_activations_as_recorded(cfg):
    """The evaluation in run.json is what the saved weights give on the raw validation split."""
    (url,) = train.run(cfg)
    config = TrainConfig.of_run(url)
    sae = load_sae(url)
    with Shards.open(config.val_data.shards) as shards:
        batches = list(OrderedLoader(shards, config.val_data, 4096))
    x = torch.cat([b.act for b in batches])
    x_hat, f = sae(x)
    nmse = float((x - x_hat).double().square().sum() / (x - x.mean(0)).double().square().sum())
    metrics = metrics_of(url)
    assert len(x) > config.n_val == metrics["n_tokens"]
    assert metrics["l0"] == pytest.approx(float((f > 0).sum(1).float().mean()))
    assert metrics["normalized_mse"] == pytest.approx(nmse, rel=0.1)  # a sample of this split
    assert not set(torch.cat([b.example_idx for b in batches]).tolist()) & set(
        train_examples(config)
    )


def train_examples(config: TrainConfig) -> list[int]:
    with Shards.open(config.train_data.shards) as shards:
        loader = OrderedLoader(shards, config.train_data, 4096)
        return torch.cat([b.example_idx for b in loader]).unique().tolist()


# --- What is written ---


def test_a_run_folder(cfg):
    (url,) = train.run(update(cfg, tag="mine", n_val=10**6))
    root = Path(url)
    assert Path(url).parent == Path(cfg.runs_root)
    names = {p.name for p in root.iterdir()}
    assert names == {
        "checkpoint",
        "config.json",
        "metrics.jsonl",
        "timings.jsonl",
        "tb",
        "run.json",
    }
    assert not (Path(cfg.runs_root) / "resume").exists() or not any(
        (Path(cfg.runs_root) / "resume").iterdir()
    )
    record = storage.read_json(storage.join(url, "run.json"))
    assert (record["tag"], record["n_steps"], record["n_tokens"]) == ("mine", 8, 2048)
    rows = rows_of(url)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert {
        "tokens", "train/loss", "train/mse", "train/sparsity", "train/aux", "train/normalized_mse",
        "train/explained_variance", "train/l0", "train/l1", "train/n_dead", "train/grad_norm",
        "train/lr", "loader/example_entropy", "loader/token_entropy_normalized",
    } <= rows[0].keys()  # fmt: skip
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    config = TrainConfig.of_run(url)
    assert rows[-1]["train/lr"] < config.lr
    assert (config.sae.d_model, config.val_data.split) == (32, "val")


def test_tensorboard_shows_name_settings_and_evaluation(cfg):
    """Read by TensorBoard itself."""
    (url,) = train.run(cfg)
    events = EventAccumulator(storage.join(url, "tb"))
    events.Reload()
    start = plugin_data_pb2.HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info
    config = TrainConfig.of_run(url)
    assert start.hparams["lr"].number_value == pytest.approx(config.lr)
    name = start.hparams["name"].string_value
    assert name.startswith(config.sae.activation.kind.replace("-", ""))
    assert f"s{config.sae.d_sae}" in name
    record = storage.read_json(storage.join(url, "run.json"))
    for side, found in (("held_out", "metrics"), ("training", "train_metrics")):
        for key in ("normalized_mse", "l0", "n_dead"):
            (event,) = events.Scalars(f"{side}/{key}")
            assert event.value == pytest.approx(record[found][key])
            assert event.step == record["n_steps"]


def test_a_finished_run_is_skipped(cfg, monkeypatch):
    urls = train.run(cfg)
    before = files_of(urls[0])
    monkeypatch.setattr(SaeBank, "__init__", None)  # any training would fail
    assert train.run(update(cfg, tag="other", log_every=1)) == urls
    assert files_of(urls[0]) == before


def test_a_sweep_in_object_storage(cfg, tmp_path):
    sweep = tmp_path / "s.toml"
    sweep.write_text('sae.top_k = [2, 3]\nobjective.kind = ["vanilla", "matryoshka"]\n')
    (group,) = train.plan(update(cfg, runs_root="memory://runs-test", sweep=str(sweep)))
    assert len(group["members"]) == 4
    json.dumps(group)
    cfg = update(cfg, runs_root="memory://runs-test", sweep=str(sweep))
    with pytest.raises(IncompleteError, match="4 of 4 runs"):
        train.finish(cfg)
    urls = train.work(cfg, group)
    assert train.finish(cfg) == urls
    assert len(set(urls)) == 4
    found = [round(metrics_of(u)["l0"]) for u in urls]
    assert found == [2, 2, 3, 3]
    assert load_sae(urls[0]).d_sae == 96


def test_members_do_not_depend_on_their_company(cfg, tmp_path):
    """A run is named by its config alone, so it must not matter what it was trained beside."""
    sweep = tmp_path / "s.toml"
    sweep.write_text(
        "seed = 5\n[[grid]]\nsae.top_k = [2, 3]\nlr = [1e-3, 3e-3]\n"
        "[[grid]]\nsae.d_sae = 64\n[[grid]]\nsae.activation.kind = 'batch-top-k'\nsae.top_k = 3\n"
        "[[grid]]\nsae.activation.kind = ['relu', 'jump-relu']\nobjective.target_l0 = [3, 4]\n"
    )
    together = train.run(update(cfg, sweep=str(sweep)))
    apart = update(cfg, sweep=str(sweep), max_parallel=1, runs_root=str(tmp_path / "apart"))
    assert len(train.plan(apart)) == len(together) == 10
    for a, b in zip(together, train.run(apart), strict=True):
        assert Path(a).name == Path(b).name
        ours, theirs = files_of(a), files_of(b)
        ours.pop("config.json"), theirs.pop("config.json")  # names runs_root and max_parallel
        assert ours == theirs


def test_the_number_of_threads_changes_nothing(cfg, tmp_path):
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            data = cfg.train_data.model_copy(update={"n_threads": n})
            (url,) = train.run(update(cfg, train_data=data, runs_root=str(tmp_path / str(n))))
            found.append(files_of(url))
    finally:
        torch.set_num_threads(before)
    found[0].pop("config.json"), found[1].pop("config.json")
    assert found[0] == found[1]


def test_fewer_tokens_than_a_batch(cfg, tmp_path, truth, caplog):
    url = synthetic.write_shards(str(tmp_path), truth, n_examples=9, content_tokens=4)
    data = LoaderConfig(shards=url, layer=3, val_fraction=0.3)
    (run,) = train.run(update(cfg, train_data=data, n_train=1000, n_val=5))
    assert "fewer than batch_size 256" in caplog.text
    assert storage.read_json(storage.join(run, "run.json"))["n_tokens"] >= 1000


def test_old_folders_are_trained_on(cfg, tmp_path, truth):
    url = synthetic.write_shards(str(tmp_path), truth, n_examples=100, protocol="2.1")
    (run,) = train.run(update(cfg, train_data=LoaderConfig(shards=url, layer=7)))
    assert metrics_of(run)["normalized_mse"] < 1


@pytest.mark.parametrize("optim", ["adam", "muon"])
@pytest.mark.parametrize("scaled", [True, False])
def test_options(cfg, optim, scaled):
    cfg = update(cfg, optim=optim, scale_mean=scaled, scale_norm=scaled, n_val=0)
    (url,) = train.run(cfg)
    assert metrics_of(url) == {}
    assert TrainConfig.of_run(url).train_data.split == "all"


# --- Interruption ---


class Killed(BaseException):
    """Nothing in the library catches it."""


def interrupt_at(monkeypatch, steps: list[int]) -> None:
    """Each training ends at the next of these steps, in the middle of it."""
    left = list(steps)
    original = SaeBank.apply_gradients

    def apply(self, *args):
        if left and self.t >= left[0]:
            left.pop(0)
            raise Killed
        original(self, *args)

    monkeypatch.setattr(SaeBank, "apply_gradients", apply)


def test_an_interrupted_run_ends_with_the_same_bytes(cfg, tmp_path, monkeypatch):
    sweep = tmp_path / "s.toml"
    sweep.write_text(
        'objective.kind = "matryoshka"\n'
        '[[grid]]\nsae.activation.kind = ["top-k", "batch-top-k"]\n'
        '[[grid]]\nsae.activation.kind = ["relu", "jump-relu"]\nobjective.target_l0 = [3, 5]\n'
    )
    cfg = update(cfg, sweep=str(sweep), n_train=6000, checkpoint_every=3)
    whole = [files_of(u) for u in train.run(cfg)]
    cut = update(cfg, runs_root=str(tmp_path / "cut"))
    interrupt_at(monkeypatch, [2, 5, 6, 22])
    for _ in range(4):
        with pytest.raises(Killed):
            train.run(cut)
    again = [files_of(u) for u in train.run(cut)]
    for a, b in zip(whole, again, strict=True):
        a.pop("config.json"), b.pop("config.json")
        assert a == b


def test_a_damaged_resume_point_costs_only_time(cfg, tmp_path, monkeypatch, caplog):
    cfg = update(cfg, checkpoint_every=2)
    (whole,) = train.run(cfg)
    cut = update(cfg, runs_root=str(tmp_path / "cut"))
    interrupt_at(monkeypatch, [5])
    with pytest.raises(Killed):
        train.run(cut)
    caplog.set_level("INFO")
    newest = max(Path(tmp_path / "cut/resume").rglob("*.safetensors"))
    assert newest.name == "step-000000000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    (url,) = train.run(cut)
    assert "passed over" in caplog.text
    steps = [r.args[0] for r in caplog.records if r.msg.startswith("Continuing at step")]
    assert steps == [2]
    assert (Path(url) / "checkpoint/sae.safetensors").read_bytes() == (
        Path(whole) / "checkpoint/sae.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_signals_leave_a_resume_point(cfg, monkeypatch, number, error):
    original = SaeBank.apply_gradients

    def apply(self, *args):
        if self.t == 3:
            os.kill(os.getpid(), number)
        original(self, *args)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(SaeBank, "apply_gradients", apply)
        with pytest.raises(error) as caught:
            train.run(cfg)
    if error is SystemExit:
        assert caught.value.code == 143
    assert signal.getsignal(number) is before
    (group,) = train.plan(cfg)
    point = resume.Points(resume.folder(cfg.runs_root, group["group"])).load()
    assert point.step == 4
    assert not [t for t in threading.enumerate() if t.name.startswith("saev-reader")]
    train.run(cfg)


def test_what_was_published_before_a_crash_stays(cfg, tmp_path, monkeypatch):
    sweep = tmp_path / "s.toml"
    sweep.write_text("sae.top_k = [2, 3]\n")
    cfg = update(cfg, sweep=str(sweep))
    write_json = storage.write_json

    def fail(url, obj):
        if url.endswith("run.json") and storage.exists(first):
            raise Killed
        write_json(url, obj)

    members = train.plan(cfg)[0]["members"]
    first = storage.join(cfg.runs_root, members[0]["run_id"], "run.json")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_json", fail)
        with pytest.raises(Killed):
            train.run(cfg)

    def state() -> dict[str, tuple[bytes, int]]:
        """With wall times and times of writing: nothing is written again."""
        files = [p for p in Path(first).parent.rglob("*") if p.is_file()]
        return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}

    done = state()
    assert first in done
    urls = train.run(cfg)
    assert state() == done
    assert round(metrics_of(urls[1])["l0"]) == 3


def test_a_resume_point_of_others_is_refused(cfg, monkeypatch):
    interrupt_at(monkeypatch, [5])
    cfg = update(cfg, checkpoint_every=2)
    with pytest.raises(Killed):
        train.run(cfg)
    (item,) = train.plan(cfg)
    points = resume.Points(resume.folder(cfg.runs_root, item["group"]))
    point = points.load()
    with pytest.raises(CheckpointError, match="is of runs none"):
        trainer.Trainer(
            train.stage.Group.from_item(item).members,
            points,
            team.alone(cfg),
            point._replace(meta={**point.meta, "run_ids": ["none"]}),
        )


# --- Mistakes ---


def test_a_loss_that_is_not_finite_names_run_step_and_remedy(cfg):
    cfg = update(cfg, lr=1e30, n_lr_warmup=0)
    (item,) = train.plan(cfg)
    run_id = item["members"][0]["run_id"]
    with pytest.raises(
        ConfigError, match=rf"Run {run_id}: the loss is not finite at step \d+ of 8\. Lower --lr"
    ):
        train.run(cfg)
    assert resume.Points(resume.folder(cfg.runs_root, item["group"])).load() is None


def test_a_root_that_cannot_be_written_is_said_before_training(cfg, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(SaeBank, "__init__", None)
    with pytest.raises(Exception, match="it is a file, expected a folder"):
        train.run(update(cfg, runs_root=str(tmp_path / "file/runs")))


def test_a_device_that_is_not_there(cfg):
    with pytest.raises(ConfigError, match="--device cuda:63 cannot be used here"):
        train.run(update(cfg, device="cuda:63"))


def test_wandb_without_the_package(cfg, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--wandb-project p needs Weights & Biases"):
        train.plan(update(cfg, wandb_project="p"))


def test_no_validation_examples(cfg, tmp_path, truth):
    url = synthetic.write_shards(str(tmp_path), truth, n_examples=3, content_tokens=4)
    data = LoaderConfig(shards=url, layer=3, val_fraction=0.01)
    with pytest.raises(ConfigError, match="val"):
        train.run(update(cfg, train_data=data))


def test_data_without_validation_is_said_before_the_first_step(cfg, tmp_path, truth, monkeypatch):
    url = synthetic.write_shards(str(tmp_path), truth, n_examples=3, content_tokens=4)
    monkeypatch.setattr(SaeBank, "__init__", None)
    data = LoaderConfig(shards=url, layer=3, val_fraction=0.001)
    with pytest.raises(ConfigError, match=r"--train-data.val-fraction is 0\.001, .* 3 images"):
        train.run(update(cfg, train_data=data))


@pytest.mark.parametrize("n_examples", [1, 2])
def test_a_folder_of_one_or_two_images(cfg, tmp_path, truth, n_examples, caplog):
    url = synthetic.write_shards(str(tmp_path), truth, n_examples=n_examples, content_tokens=4)
    sweep = tmp_path / "s.toml"
    sweep.write_text("sae.top_k = [2, 3]\n")
    data = LoaderConfig(shards=url, layer=3)
    urls = train.run(update(cfg, train_data=data, sweep=str(sweep), batch_size=4, n_train=16))
    assert caplog.text.count("too few to keep 10% of them for evaluation") == 1
    for run in urls:
        assert metrics_of(run) == {}
        config = TrainConfig.of_run(run)
        assert (config.train_data.split, config.n_val) == ("all", 0)


# --- Generations ---


def test_both_points_damaged(cfg, tmp_path, monkeypatch):
    """The curves until then are kept, training begins anew, and run.json says so."""
    cfg = update(cfg, checkpoint_every=2)
    (whole,) = train.run(cfg)
    cut = update(cfg, runs_root=str(tmp_path / "cut"))
    interrupt_at(monkeypatch, [5, 3])
    with pytest.raises(Killed):
        train.run(cut)
    folder = next((tmp_path / "cut/resume").iterdir())
    for place in folder.glob("*.safetensors"):
        place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(Killed):  # in the second generation, after its first point
        train.run(cut)
    assert [p.name for p in (folder / "generation-2").glob("*.json")] == ["step-000000000002.json"]
    kept = list((folder / "set-aside-1").rglob("metrics.jsonl"))
    assert [len(k.read_text().splitlines()) for k in kept] == [2]
    (url,) = train.run(cut)
    ours, theirs = files_of(url), files_of(whole)
    record, other = (json.loads(f.pop("run.json")) for f in (ours, theirs))
    ours.pop("config.json"), theirs.pop("config.json")
    assert ours == theirs
    assert (record["generation"], other["generation"]) == (2, 1)
    assert "set_aside" not in other
    (aside,) = record["set_aside"]
    assert [p["point"][-1] for p in aside["points"]] == ["4", "2"]
    assert not (tmp_path / "cut/resume").exists()


WRITES = ("open_write", "write_bytes", "delete")


def kill_after(monkeypatch, n: int) -> list[int]:
    """Training ends as the n-th object is to be written or deleted."""
    left = [n]

    def dying(original):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*args, **kwargs)

        return call

    for name in WRITES:
        monkeypatch.setattr(storage, name, dying(getattr(storage, name)))
    monkeypatch.setattr(storage, "write_json", dying(storage.write_json))
    return left


@pytest.mark.slow
def test_a_kill_between_any_two_writes(cfg, tmp_path, monkeypatch):
    """Of two members, with resume points at every step; each time it ends with the same bytes."""
    sweep = tmp_path / "s.toml"
    sweep.write_text("sae.top_k = [2, 3]\n")
    cfg = update(cfg, sweep=str(sweep), n_train=3 * 64, batch_size=64, log_every=1, n_val=0)
    cfg = update(cfg, checkpoint_every=1)
    whole = {Path(u).name: files_of(u) for u in train.run(cfg)}
    n, killed = 0, True
    while killed:
        root = tmp_path / str(n)
        with monkeypatch.context() as patch:
            kill_after(patch, n)
            try:
                train.run(update(cfg, runs_root=str(root)))
                killed = False
            except Killed:
                pass
        urls = train.run(update(cfg, runs_root=str(root)))
        found = {Path(u).name: files_of(u) for u in urls}
        for files in (*found.values(), *whole.values()):
            files.pop("config.json", None)
        assert found == whole, n
        assert not (root / "resume").exists(), n
        for url in urls:
            assert len((Path(url) / "timings.jsonl").read_text().splitlines()) == 3
        n += 1
    assert n > 30


def test_what_is_left_after_the_last_run_json_goes(cfg, tmp_path, monkeypatch):
    (item,) = train.plan(cfg)
    with monkeypatch.context() as patch:
        patch.setattr(resume, "clear", lambda url: exec("raise Killed", {"Killed": Killed}))
        with pytest.raises(Killed):
            train.run(cfg)
    assert (Path(cfg.runs_root) / "resume" / item["group"]).exists()
    train.finish(cfg)  # as the pipeline does
    assert not (Path(cfg.runs_root) / "resume").exists()
