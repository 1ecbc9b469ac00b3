"""saev size: what is predicted is what the stages write, byte by byte where that can be known."""

import json
import subprocess
import sys
import typing as tp
from pathlib import Path

import numpy as np
import pytest
import torch

from saev import cli, inference, limits, run, storage, train, vit
from saev.config import BatchTopK, InferenceCommand, JumpRelu, Relu, SaeConfig, TopK, Vanilla
from saev.config.run import RunConfig
from saev.config.size import SizeConfig
from saev.errors import ConfigError
from saev.grouping import measuring_bytes
from saev.inference import stage
from saev.loaders import ShuffledLoader
from saev.nn import SaeBank
from saev.shards import Shards
from saev.size import estimate, formats, inputs, models
from saev.train import resolve, resume
from saev.vit import registry

FILE = """
[data]
kind = "fake-img-seg"
n_examples = 23
image_size = 32

[shards]
family = "timm"
ckpt = "test_vit/random"
image_size = 32
layers = [-2, -1]
max_tokens_per_shard = 50
dtype = "float16"

[train]
n_train = 60
sae.d_sae = 32
train_data = { layer = 5, val_fraction = 0.25 }

[inference]
n_top = 3

[visuals]
n_latents = 1

[sweep.sae]
d_sae = [32, 48]
activation.top_k = [2, 4]
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.toml and, in root/, all that it makes."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "run.toml").write_text(FILE)
    run.run(RunConfig(config=str(folder / "run.toml"), root=str(folder / "root")))
    return folder


def values(**flags: tp.Any) -> dict[str, float]:
    """Value by key."""
    cfg = SizeConfig.from_dict(flags)
    sections = estimate.estimate(inputs.gather(cfg), cfg)
    return {row.key: row.value for section in sections for row in section.rows}


def size_of(folder: Path, *patterns: str) -> int:
    """Bytes of matching files."""
    return sum(p.stat().st_size for pattern in patterns for p in folder.glob(pattern))


# --- Against a real job --------------------------------------------------------------------


def test_recording(job: Path) -> None:
    found = values(config=str(job / "run.toml"), load_model=True)
    (folder,) = (job / "root" / "shards").iterdir()
    shards = Shards.open(str(folder))
    assert found["n_images"] == shards.n_examples == 23
    assert found["activations_bytes"] == size_of(folder, "acts*.bin")
    assert found["n_shards"] == len(shards.infos)
    assert found["examples_per_shard"] == shards.infos[0].n_examples
    assert found["shard_bytes"] == max(info.n_bytes or 0 for info in shards.infos)
    beside = size_of(folder, "checksums.bin", "labels.bin", "stats.safetensors")
    assert found["beside_bytes"] == beside
    # The fixed part of a Parquet file is a few kB; what grows is the rows.
    assert size_of(folder, "examples.parquet") <= found["examples_bytes"] + 4096


def test_training(job: Path) -> None:
    found = values(config=str(job / "run.toml"), load_model=True)
    runs = [p for p in (job / "root" / "runs").iterdir() if p.name != "resume"]
    assert found["n_saes"] == len(runs) == 4
    weights = [size_of(p, "checkpoint/sae.safetensors") for p in runs]
    assert found["checkpoint_bytes"] == max(weights)
    assert found["checkpoints_bytes"] == sum(weights)
    (folder,) = (job / "root" / "shards").iterdir()
    cfg = resolve.TrainConfig.of_run(str(runs[0]))
    with Shards.open(str(folder)) as shards:
        loader = ShuffledLoader(shards, cfg.train_data, 7, epochs=1)
        with loader:
            n_tokens = sum(len(batch.act) for batch in loader)
            assert found["epoch_bytes"] == loader.metrics()["loader/read_mb"] * 1e6
        per_example = shards.content_tokens
    assert found["n_train_examples"] * per_example == n_tokens
    assert found["training_read_bytes"] == found["epoch_bytes"], "it all stays in memory"
    summary = json.loads((runs[0] / "run.json").read_text())
    assert found["n_steps"] == summary["n_steps"]


def test_measuring(job: Path) -> None:
    file = str(job / "run.toml")
    found = values(config=file, load_model=True)
    folders = list((job / "root" / "runs").glob("*/inference/*"))
    for folder in folders:
        with np.load(folder / "token_acts.npz", allow_pickle=False) as arrays:
            n_tokens, nnz = len(arrays["example_idx"]), len(arrays["data"])
        d_sae = json.loads((folder / "metrics.json").read_text())["d_sae"]
        exact = {
            "token_acts.npz": formats.npz(formats.token_acts(n_tokens, nnz)),
            "sparsity.safetensors": formats.safetensors(formats.sparsity(d_sae)),
            "mean_values.safetensors": formats.safetensors(formats.mean_values(d_sae)),
        }
        assert {name: size_of(folder, name) for name in exact} == exact
        small = size_of(folder, "*.safetensors")
        assert small <= found["statistics_bytes"] + 64  # digits in a header
        assert size_of(folder, "token_acts.npz") <= found["codes_bytes"]
        tables = size_of(folder, "*.parquet", "tables.json")
        assert 0.1 * found["tables_bytes"] < tables < 2 * found["tables_bytes"]
    assert max(size_of(f, "token_acts.npz") for f in folders) > 0.5 * found["codes_bytes"]
    kept = sum(size_of(f, "token_acts.npz", "*.safetensors", "*.parquet") for f in folders)
    kept += found["checkpoints_bytes"]
    assert 0.25 * found["storage_runs_bytes"] < kept <= found["storage_runs_bytes"]
    (shards,) = (job / "root" / "shards").iterdir()
    assert found["inference_items"] == inference.n_pieces(Shards.open(str(shards)), 4)
    with Shards.open(str(shards)) as opened:
        layer = sum(x.n_examples * x.row_bytes for x in opened.layouts)
    assert found["inference_groups"] == 1
    assert found["inference_read_bytes"] == layer


@pytest.mark.parametrize(("latents", "n"), [(1000, 1), (96, 2), (1, 4)])
def test_passes_are_those_of_inference(
    job: Path, monkeypatch: pytest.MonkeyPatch, latents: int, n: int
) -> None:
    """Whether there is room for all SAEs, for any two, or for one."""
    cfg = SizeConfig(config=str(job / "run.toml"), load_model=True)
    given = inputs.gather(cfg)
    monkeypatch.setattr(limits, "PIECE_ENTRIES", 0)  # what does not depend on the latents
    meta = given.recording
    room = measuring_bytes(meta.d_model, latents, meta.tokens_per_example, 3)
    monkeypatch.setattr(limits, "GROUP_BYTES", room)
    measuring = stage.Measuring(InferenceCommand(runs=str(job / "root" / "runs"), n_top=3))
    assert len(estimate.Estimate(given, cfg).passes()) == len(measuring._groups) == n
    measuring.close()


def test_groups_are_those_of_training(job: Path) -> None:
    file = job / "run.toml"
    (folder,) = (job / "root" / "shards").iterdir()
    for more, n in (("", 1), ("max_parallel = 3\n", 2)):
        changed = job / f"changed{n}.toml"
        changed.write_text(file.read_text().replace("[train]\n", f"[train]\n{more}"))
        stages = run.resolve(RunConfig(config=str(changed), root=str(job / "root")))
        items = train.plan(stages.training(str(folder)), table=stages.sweep)
        assert len(items) == n
        assert values(config=str(changed), load_model=True)["n_groups"] == n


# --- Against the parts ---------------------------------------------------------------------


KINDS = (TopK(top_k=3), BatchTopK(top_k=3), Relu(), JumpRelu())


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
@pytest.mark.parametrize("optim", ["adam", "muon"])
def test_state_of_a_bank(activation: tp.Any, optim: tp.Any, tmp_path: Path) -> None:
    n, d_model, d_sae = 3, 16, 48
    cfg = SaeConfig(d_model=d_model, d_sae=d_sae, activation=activation)
    saes = SaeBank([cfg] * n, [Vanilla()] * n, [1e-3] * n, [0] * n, d_model, optim=optim)
    saes.step(torch.randn(32, d_model))
    shape = (n, d_model, d_sae, activation.kind)

    state = formats.bank_state(*shape, optim)
    resume.Points(str(tmp_path)).save(resume.ResumePoint(1, saes.state_dict(), {}))
    assert size_of(tmp_path, "*.safetensors") == formats.safetensors(state, ordered=True)
    gradients = sum(g.nbytes for g in saes.grads.values())
    assert gradients == formats.tensor_bytes(formats.bank_parameters(*shape))
    on_device = sum(t.nbytes for t in saes._tensors().values()) + gradients
    flags = {"n_images": 9, "d_model": d_model, "content_tokens_per_example": 4, "d_sae": d_sae}
    cfg_ = SizeConfig.from_dict({**flags, "n_saes": n, "top_k": 3})
    given = inputs.gather(cfg_)
    trained = [s.model_copy(update={"optim": optim, "sae": cfg}) for s in given.saes]
    sizes = estimate.Estimate(given._replace(saes=tuple(trained)), cfg_)
    assert sizes.state_bytes([0, 1, 2]) == on_device

    saes.to_sae(0).save(str(tmp_path / "sae"))
    tensors = formats.checkpoint(d_model, d_sae, activation.kind)
    assert size_of(tmp_path, "sae/sae.safetensors") == formats.safetensors(tensors)


def test_resume_point_of_a_group_with_several_banks() -> None:
    """Names are prefixed with the number of the bank."""
    cfg = SizeConfig.from_dict({"n_images": 9, "d_model": 8, "content_tokens_per_example": 4})
    given = inputs.gather(cfg)
    saes = [
        given.saes[0].model_copy(update={"sae": SaeConfig(d_sae=d_sae)}) for d_sae in (16, 16, 40)
    ]
    sizes = estimate.Estimate(given._replace(saes=tuple(saes)), cfg)
    assert list(sizes.banks([0, 1, 2]).values()) == [2, 1]
    one, other = sizes.resume_bytes([0, 1]), sizes.resume_bytes([2])
    assert one + other < sizes.resume_bytes([0, 1, 2]) + 32
    assert sizes.resume_bytes([0, 1, 2]) < one + other + 32


def test_constants_are_those_of_the_stages() -> None:
    assert torch.Generator().get_state().nbytes == formats.RNG_BYTES


@pytest.mark.parametrize("n", [0, 1, 1 << 32])
def test_npz_of_any_size(n: int) -> None:
    """Large arrays have longer entries in the ZIP directory; checked without writing them."""
    small = formats.npz({"data": n})
    assert small - n < 500
    assert formats.npz({"data": n, "more": 0}) - small in range(128, 500)


# --- Models --------------------------------------------------------------------------------


def _real(model: models.Vit) -> registry.Tower:
    """The model as `saev shards` builds it, without memory for its weights."""
    with torch.device("meta"):
        return registry._find(model.family)(f"{model.arch}/random", None)


@pytest.mark.parametrize("name", list(models.MODELS))
def test_every_model_is_as_the_list_says(name: str) -> None:
    model = models.MODELS[name]
    tower = _real(model)
    assert tower.grid[0] * tower.grid[1] == model.content_tokens()
    assert len(tower.blocks) == model.n_layers
    assert tower.cls_token == model.cls_token
    assert tower.spec.image_size == (model.image_size, model.image_size)
    norms = [m for m in tower.blocks[0].modules() if isinstance(m, torch.nn.LayerNorm)]
    assert norms[0].normalized_shape == (model.d_model,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip-vitb32", "siglip-vitb16", "dinov2-vits14", "vit-tiny16"])
def test_small_models_record_what_the_list_says(name: str) -> None:
    model = models.MODELS[name]
    image_size = 224
    loaded = vit.load(model.family, f"{model.arch}/random", image_size=image_size)
    found = (loaded.d_model, loaded.content_tokens_per_example, loaded.has_cls_token)
    assert found == (model.d_model, model.content_tokens(image_size), model.cls_token)
    assert models.build(model.family, f"{model.arch}/tag", image_size) == found


@pytest.mark.parametrize(
    ("family", "ckpt", "name"),
    [
        ("clip", "ViT-B-16/openai", "clip-vitb16"),
        ("clip", "ViT-B-16@s3://b/w.safetensors", "clip-vitb16"),
        ("siglip", "ViT-B-16-SigLIP/webli", "siglip-vitb16"),
        ("dinov2", "vits14", "dinov2-vits14"),
        ("timm", "vit_small_patch14_dinov2.lvd142m", "dinov2-vits14"),
        ("dinov2", "vit_small_patch14_dinov2/random", "dinov2-vits14"),
        ("timm", "vit_base_patch16_224.mae", "vit-base16"),
    ],
)
def test_checkpoints_are_found(family: str, ckpt: str, name: str) -> None:
    assert models.by_checkpoint(family, ckpt) == models.MODELS[name]


def test_an_image_size_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"200 does not fit ViT-B-16: .* such as 192 or 208"):
        models.MODELS["clip-vitb16"].content_tokens(200)


# --- As a command --------------------------------------------------------------------------


def command(*argv: str, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    """Status, standard output and standard error of `saev size`."""
    capsys.readouterr()
    try:
        cli.main(["size", *argv])
        status = 0
    except SystemExit as err:
        status = err.code if isinstance(err.code, int) else 1
    out, err = capsys.readouterr()
    return status, out, " ".join(err.split())


def test_the_sum_of_the_issue(capsys: pytest.CaptureFixture) -> None:
    """N images × tokens × layers × d_model × bytes."""
    argv = ["--n-images", "1000000", "--model", "clip-vitb16", "--layers", "6"]
    status, out, _ = command(*argv, "--json", capsys=capsys)
    assert status == 0
    found = json.loads(out)["values"]
    assert found["activations_bytes"] == 1_000_000 * 197 * 6 * 768 * 4
    status, out, _ = command(*argv, "--no-cls-token", "--dtype", "float16", capsys=capsys)
    assert status == 0
    assert "1.81 TB" in out
    assert "196 tokens" in out


def test_hours_come_from_the_users_rates(capsys: pytest.CaptureFixture) -> None:
    argv = ["--n-images", "720000", "--d-model", "100", "--content-tokens-per-example", "10"]
    _, out, _ = command(*argv, capsys=capsys)
    assert " h " not in out
    rates = "--images-per-second 100 --tokens-per-second 1e4 --gb-per-second 0.5"
    _, out, _ = command(*argv, *rates.split(), "--json", capsys=capsys)
    found = json.loads(out)["values"]
    assert found["recording_hours"] == pytest.approx(2)
    assert found["reading_hours"] == pytest.approx(found["read_bytes"] / 0.5e9 / 3600)


def test_images_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for i in range(5):
        storage.write_bytes(tmp_path / "class" / f"{i}.png", b"")
    argv = ["--model", "vit-tiny16", "--json", "data:img-folder", "--data.root", str(tmp_path)]
    _, out, _ = command(*argv, capsys=capsys)
    assert json.loads(out)["values"]["n_images"] == 5
    argv[-1] = str(tmp_path / "no")
    status, _, err = command(*argv, capsys=capsys)
    assert (status, "no" in err, "Traceback" in err) == (1, True, False)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", "How many images? Give --n-images"),
        ("--n-images 5", "Which model? Give --model"),
        ("--n-images 5 --model nope", "There is no model 'nope' in the list: clip-vitb32,"),
        ("--n-images 5 --family timm --ckpt test_vit", "not in the list of models"),
        ("--n-images 5 --d-model 9", "Which model?"),
        ("--config /no/such.toml", "it does not exist"),
        ("--n-images 5 --model vit-tiny16 --top-k 9 --d-sae 8", "has only 8 latents"),
    ],
)
def test_mistakes(argv: str, expected: str, capsys: pytest.CaptureFixture) -> None:
    status, out, err = command(*argv.split(), capsys=capsys)
    assert (status, out) == (1, "")
    assert expected in err


def test_list_of_models(capsys: pytest.CaptureFixture) -> None:
    status, out, _ = command("--model", "list", capsys=capsys)
    assert status == 0
    assert all(name in out for name in models.MODELS)


def test_it_needs_no_torch(job: Path) -> None:
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, *args):\n"
        "        if name.partition('.')[0] in ('torch', 'timm'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from saev import cli\n"
        f"cli.main(['size', '--config', {str(job / 'run.toml')!r}, *sys.argv[1:]])"
    )
    for more, status in ((["--model", "vit-tiny16"], 0), (["--load-model"], 1)):
        argv = [sys.executable, "-c", code, *more]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
    assert "--load-model needs" in done.stderr
