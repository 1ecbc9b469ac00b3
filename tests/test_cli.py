"""The command line as a user meets it: parsing, help, standard output, and one clear error each."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forker import Forker

from saev import cli, shorthand
from saev.config import ImgSegFolder, Matryoshka, Relu, ShardsConfig, TrainConfig

ROOT = Path(__file__).parents[1]
TINY = ("--family", "timm", "--ckpt", "test_vit/random", "--image-size", "32", "--layers", "-1")


def saev(*argv: str, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    """Run a command in this process; returns status, standard output, standard error."""
    capsys.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        cli.main(argv)
        status = 0
    except SystemExit as err:
        status = err.code if isinstance(err.code, int) else 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    out, err = capsys.readouterr()
    return status, out, " ".join(err.split())


# --- Parsing -------------------------------------------------------------------------------


def test_the_guides_shards_command_parses() -> None:
    cfg = cli.parse(
        "shards --shards-root URL --family clip --ckpt ViT-B-16/openai --d-model 768 "
        "--layers 6 7 8 9 10 11 --content-tokens-per-example 196 --batch-size 512 "
        "data:img-seg-folder --data.root URL --data.split training".split()
    )
    assert isinstance(cfg, ShardsConfig)
    assert cfg.layers == (6, 7, 8, 9, 10, 11)
    assert cfg.data == ImgSegFolder(root="URL", split="training")


def test_the_guides_train_command_parses() -> None:
    cfg = cli.parse(
        "train --runs-root URL --lr 4e-3 --sae.exp-factor 16 --sae.d-model 1024 --tag ade20k-v0.1 "
        "--n-train 100_000_000 --train-data.shards URL --train-data.layer 11 --val-data.shards URL "
        "--val-data.layer 11 sae.activation:relu objective:matryoshka "
        "--objective.sparsity-coeff 1e-3".split()
    )
    assert isinstance(cfg, TrainConfig)
    assert (cfg.n_train, cfg.lr, cfg.sae.d_model) == (100_000_000, 4e-3, 1024)
    assert cfg.sae.activation == Relu()
    assert isinstance(cfg.objective, Matryoshka)
    assert cfg.objective.sparsity_coeff == 1e-3


def test_flags_may_stand_behind_a_subcommand() -> None:
    cfg = cli.parse(["shards", "data:img-folder", "--data.root", "x", "--batch-size", "3"])
    assert cfg.batch_size == 3


def test_explicit_keys_name_what_the_command_line_set() -> None:
    argv = "train --sae.d-sae=8 --no-scale-mean --lr 1e-3 objective:vanilla".split()
    keys = cli.explicit_keys(argv)
    assert {"sae.d_sae", "scale_mean", "lr", "objective.kind"} <= keys
    assert "sae.d_model" not in keys


STEPS = {f"step {name}": model for name, model in cli.STEPS.items()}


@pytest.mark.parametrize("command", ["", *cli.COMMANDS, *STEPS])
def test_help_explains_every_flag(command: str, capsys: pytest.CaptureFixture) -> None:
    flag = "--help-all" if command in shorthand.COMMANDS else "--help"
    status, out, _ = saev(*command.split(), flag, capsys=capsys)
    assert status == 0
    out = " ".join(out.replace("│", " ").split())
    model = {**cli.COMMANDS, **STEPS, "": None, "step": None}[command]
    if model is not None:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no docstring"
            text = field.description.split()[0].strip(".,`")
            assert text in out, f"--{name} is not explained in the help"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["shards"], "Expected one of"),
        (["shards", "--batch-sise", "3", "data:fake-img"], "--batch-size"),
        (["shards", "--batch-size", "0", "data:fake-img"], "greater than or equal to 1"),
        (["shards", "--batch-size", "many", "data:fake-img"], "--batch-size"),
        (["shards", "data:img-folder"], "--data.root"),
        (["trian"], "train"),
        (["inference"], "--run"),
        (["inference", "--tag", "a"], "error: --tag chooses among"),
        (["train", "--target-l0", "3", "--objective.sparsity-coeff", "1"], "error: target_l0 is 3"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    status, out, err = saev(*argv, capsys=capsys)
    assert status == 2
    assert expected in err
    assert out == ""
    assert "pydantic.dev" not in err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trian --shards x", "There is no command 'trian'. Did you mean train? There are shards,"),
        ("train --shards x --lr -1", "--lr: Input should be greater than 0 (found -1.0). `saev t"),
        ("train --train-data.shards x --top-k 0", "--top-k: Input should be greater than or equ"),
        ("train --train-data.val-fraction=2 --shards x", "--train-data.val-fraction: Input shou"),
        ("run --config dinov2-smal", "--config: there is no file 'dinov2-smal', and saev has none"),
        ("inference --run x --shards y --batch-size 0", "--batch-size: Input should be greater t"),
        ("step plan --job x --n-parts 0", "--n-parts: Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_value_names_its_flag_and_whose_help_explains_it(
    line: str, expected: str, capsys: pytest.CaptureFixture
) -> None:
    """Under the name that the user typed, in one line, without pydantic's own words."""
    status, out, err = saev(*line.split(), capsys=capsys)
    assert status == 2
    assert out == ""
    assert err.startswith(f"saev: error: {expected}")
    assert "type=" not in err
    if "trian" not in line:
        command = " ".join(line.split()[: 1 + line.startswith("step")])
        assert err.endswith(f"`saev {command} --help-all` explains the flags.")
        assert saev(*command.split(), "--help-all", capsys=capsys)[0] == 0


# --- Whole stages ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small shards folder, through the command line."""
    from saev.config import FakeImg
    from saev.shards import extract

    cfg = ShardsConfig(
        shards_root=str(tmp_path_factory.mktemp("shards")),
        family="timm",
        ckpt="test_vit/random",
        image_size=32,
        layers=(-1,),
        max_tokens_per_shard=60,
        data=FakeImg(n_examples=24, image_size=32),
    )
    return extract.run(cfg)


@pytest.fixture(scope="module")
def trained(recorded: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small run on it."""
    from saev import train
    from saev.config import LoaderConfig, SaeConfig, TopK

    cfg = TrainConfig(
        runs_root=str(tmp_path_factory.mktemp("runs")),
        n_train=400,
        n_val=50,
        batch_size=20,
        sae=SaeConfig(d_sae=64, activation=TopK(top_k=4)),
        train_data=LoaderConfig(shards=recorded, layer=None, val_fraction=0.25),
    )
    (url,) = train.run(cfg)
    return url


def test_all_stages_print_only_the_url(
    recorded: str, trained: str, capsys: pytest.CaptureFixture
) -> None:
    status, out, err = saev("inference", "--run", trained, "--data.shards", recorded, capsys=capsys)
    assert status == 0, err
    (measured,) = out.splitlines()
    metrics = json.loads((Path(measured) / "metrics.json").read_text())
    assert {"normalized_mse", "explained_variance", "l0"} <= metrics.keys()
    argv = ["visuals", "--run", trained, "--shards", recorded, "--latents", "0", "1"]
    status, out, err = saev(*argv, "--n-latents", "2", capsys=capsys)
    assert status == 0, err
    (page,) = out.splitlines()
    assert Path(page).name == "index.html"
    assert Path(page).exists()


def test_python_m_saev_keeps_logs_off_standard_output(forker: Forker, tmp_path: Path) -> None:
    script = "import runpy; runpy.run_module('saev', run_name='__main__')"
    argv = ["shards", "--shards-root", tmp_path, *TINY, "data:fake-img", "--data.n-examples", "3"]
    (url,) = forker.output(script, *argv).splitlines()
    assert (Path(url) / "shards.json").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_stage_at_once_and_without_a_traceback(
    forker: Forker, tmp_path: Path, signum: signal.Signals
) -> None:
    argv = ["shards", "--shards-root", str(tmp_path), *TINY, "--max-tokens-per-shard", "50"]
    pid = forker.start([*argv, "data:fake-img", "--data.n-examples", "100000"])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/acts*.bin")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(pid, signum)
    ended = forker.wait(pid)
    assert ended.status == (130 if signum == signal.SIGINT else 143), ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.glob("*/.tmp-*")), "a temporary was left behind"


@pytest.mark.parametrize("command", ["saev", "pipelines"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_first_second_is_one_line(command: str, signum: signal.Signals) -> None:
    """At several instants: while Python starts it, while it imports, while a stage is imported."""
    argv = [sys.executable, "-m", command, *("shards --family x --ckpt y data:fake-img".split())]
    if command == "pipelines":
        argv = [sys.executable, "-m", command, "compile", "--out", os.devnull]
    seen = set()
    for delay in (0.02, 0.4):
        process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        _wait_for_handlers(process)
        time.sleep(delay)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
        if process.returncode in (128 + signum, 1):  # 1: it was faster, and found its mistake
            assert len(err.splitlines()) == 1, err
        else:
            raise AssertionError(f"status {process.returncode}: {err}")
        seen.add(process.returncode)
    assert 128 + signum in seen


def _wait_for_handlers(process: subprocess.Popen) -> None:
    """Until the process catches signals: before that, the interpreter itself is starting."""
    bit = 1 << (signal.SIGTERM - 1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) & bit:
            return
        time.sleep(0.002)


@pytest.mark.parametrize("words", ["saev --help", "saev train --help", "pipelines submit --help"])
def test_a_reader_that_goes_away_gets_no_traceback(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", *words.split()], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# --- Bad input: one clear error each ---------------------------------------------------------


def test_missing_image_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["shards", "--shards-root", str(tmp_path), *TINY, "data:img-folder", "--data.root"]
    status, _, err = saev(*argv, str(tmp_path / "nothing"), capsys=capsys)
    assert status == 1
    assert str(tmp_path / "nothing") in err


def test_empty_image_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    argv = ["shards", "--shards-root", str(tmp_path), *TINY, "data:img-folder", "--data.root"]
    status, _, err = saev(*argv, str(tmp_path / "empty"), capsys=capsys)
    assert status == 1
    assert "no images" in err.lower()
    assert ".jpg" in err


def test_corrupt_image(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    argv = ["shards", "--shards-root", str(tmp_path / "s"), *TINY, "data:img-folder"]
    status, _, err = saev(*argv, "--data.root", str(tmp_path / "img"), capsys=capsys)
    assert status == 1
    assert "broken.png" in err
    assert "--skip-unreadable" in err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--family", "vgg"), "dinov2"),
        (("--layers", "99"), "99"),
        (("--d-model", "7"), "7"),
        (("--content-tokens-per-example", "5"), "5"),
        (("--ckpt", "no_such_vit/random"), "no_such_vit"),
        (("--part", "3/2"), "3/2"),
        (("--part", "half"), "half"),
    ],
)
def test_wrong_model_flags(
    flags: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["shards", "--shards-root", str(tmp_path), *TINY, *flags, "data:fake-img"]
    status, out, err = saev(*argv, capsys=capsys)
    assert status == 1
    assert "saev: error:" in err
    assert expected in err
    assert out == ""
    assert not any(tmp_path.iterdir()), "something was written before the flags were checked"


def test_shards_root_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    argv = ["shards", "--shards-root", str(tmp_path / "file"), *TINY, "data:fake-img"]
    status, _, err = saev(*argv, capsys=capsys)
    assert status == 1
    assert str(tmp_path / "file") in err


@pytest.mark.parametrize("command", ["train", "inference"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "incomplete"])
def test_damaged_shards(
    command: str,
    damage: str,
    recorded: str,
    trained: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(recorded, copy)
    victim = sorted(copy.glob("acts*.bin"))[1]
    if damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        os.truncate(victim, victim.stat().st_size - 1)
    elif damage == "flipped":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    else:
        victim = copy / "shards.json"
        victim.unlink()
    if command == "train":
        argv = ["train", "--runs-root", str(tmp_path / "runs"), "--n-train", "400"]
        argv += ["--batch-size", "20", "--sae.d-sae", "64", "--train-data.shards", str(copy)]
    else:
        argv = ["inference", "--run", trained, "--data.shards", str(copy)]
        argv += ["--out", str(tmp_path / "out")]
    status, out, err = saev(*argv, capsys=capsys)
    assert status == 1, err
    assert victim.name in err
    assert "Traceback" not in err
    assert out == ""


def test_sae_and_shards_of_different_width(
    trained: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = [
        "shards",
        "--shards-root",
        str(tmp_path),
        *TINY,
        "--ckpt",
        "vit_tiny_patch16_224/random",
    ]
    status, out, err = saev(*argv, "data:fake-img", "--data.n-examples", "2", capsys=capsys)
    assert status == 0, err
    argv = ["inference", "--run", trained, "--data.shards", out.strip(), "--data.layer", "11"]
    status, _, err = saev(*argv, "--out", str(tmp_path / "o"), capsys=capsys)
    assert status == 1
    assert "192" in err
    assert "64" in err


def test_unknown_key_in_a_sweep(
    recorded: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sweep = tmp_path / "sweep.toml"
    sweep.write_text("[sae]\nd_say = [16, 32]\n")
    argv = ["train", "--runs-root", str(tmp_path), "--sweep", str(sweep)]
    status, _, err = saev(*argv, "--train-data.shards", recorded, capsys=capsys)
    assert status == 1
    assert "d_say" in err
    assert "d_sae" in err


def test_missing_run(recorded: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["inference", "--run", str(tmp_path / "none"), "--data.shards", recorded]
    status, _, err = saev(*argv, capsys=capsys)
    assert status == 1
    assert str(tmp_path / "none") in err


def test_latent_out_of_range(recorded: str, trained: str, capsys: pytest.CaptureFixture) -> None:
    saev("inference", "--run", trained, "--data.shards", recorded, capsys=capsys)
    argv = ["visuals", "--run", trained, "--shards", recorded, "--latents", "64"]
    status, _, err = saev(*argv, capsys=capsys)
    assert status == 1
    assert "64" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A real full disk: a tmpfs of 256 kB, where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)],
        check=False, capture_output=True,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here; root may do it")
    try:
        argv = ["shards", "--shards-root", str(disk), *TINY, "--layers", "0", "1", "2"]
        argv += ["--max-tokens-per-shard", "60", "data:fake-img", "--data.n-examples", "200"]
        status, _, err = saev(*argv, capsys=capsys)
        assert status == 1
        assert "no space left" in err
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        status, out, err = saev(*argv, capsys=capsys)
        assert status == 0, err
        assert (Path(out.strip()) / "shards.json").exists()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_read_only_root(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A file system that is mounted read-only: permissions do not stop root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here; root may do it")
    try:
        argv = ["shards", "--shards-root", str(disk), *TINY, "data:fake-img"]
        status, _, err = saev(*argv, capsys=capsys)
        assert status == 1
        assert "read-only" in err
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
