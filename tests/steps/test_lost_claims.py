"""A step whose claim another run takes at the last moment publishes nothing any more."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from walk import Walk

from saev import cli, storage
from saev.errors import ConfigError
from saev.launch import outcomes
from saev.progress import Progress
from saev.steps import claims, discover, jobs, step

CONFIG = json.dumps(
    {
        "data": {"kind": "fake-img", "n_examples": 12, "image_size": 32},
        "shards": {"family": "timm", "ckpt": "test_vit/random", "image_size": 32, "layers": [-1]},
        "train": {"n_train": 100, "device": "cpu", "sae": {"d_sae": 32}},
        "visuals": {"log_freq_range": [-9, 0], "log_value_range": [-9, 9], "n_latents": 1},
    }
)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Roots in which everything is done but a step and those after it, as run a left them."""
    base = tmp_path_factory.mktemp("before")
    roots: dict[str, Path] = {}
    walk = Walk(str(base / "now"), CONFIG, base / "kfp", owner="a")
    walk.discover()
    for name in ("plan", "extract", "publish", "train", "infer", "summarise", "report"):
        roots[name] = base / name
        shutil.copytree(walk.root, roots[name])
        if name in walk.PLANNERS:
            walk.all_of(name)
        elif name != "report":
            walk.plan(name)
    return roots


def job_of(root: str) -> str:
    """URL of the one job below a root."""
    (url,) = Path(root).glob("jobs/*")
    return str(url)


@pytest.fixture
def taken_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Lets another run take the claim right after an object of some name is written."""

    def prepare(root: str, name: str) -> None:
        folder = discover.claims_of(root, jobs.read(job_of(root)).dataset)

        def then_take(write: Callable[..., None]) -> Callable[..., None]:
            def written(url: str, *args: object) -> None:
                write(url, *args)
                if storage.name(url) == name and claims.current(folder).owner == "a":
                    assert claims.take(folder, "b", 1.0, force=True) is not None

            return written

        for kind in ("write_json", "write_bytes", "write_text"):
            monkeypatch.setattr(storage, kind, then_take(getattr(storage, kind)))

    return prepare


@pytest.mark.parametrize(
    ("name", "at", "marker"),
    [
        ("publish", "stats.safetensors", "shards/*/shards.json"),
        ("publish", "stats.safetensors", "shards/*/files.json"),
        ("train", "config.json", "runs/*/run.json"),
        ("summarise", "sparsity.safetensors", "runs/*/inference/*/metrics.json"),
        ("summarise", "metrics.json", "runs/*/inference/*/report/index.html"),
        ("summarise", "pictures.json", "runs/*/inference/*/report/index.html"),
        ("summarise", "index.html", "runs/*/inference/*/report/visuals.json"),
        ("report", "index.html", "datasets/*/processed/*.json"),
        ("plan", "metadata.json", "shards/*/shards.json"),
    ],
)
def test_nothing_is_published(
    before: dict[str, Path],
    tmp_path: Path,
    taken_at: Callable[[str, str], None],
    name: str,
    at: str,
    marker: str,
) -> None:
    root = str(tmp_path / "root")
    shutil.copytree(before[name], root)
    words = ["--slot", "0"] if name in Walk.PLANNERS else []
    taken_at(root, at)
    with pytest.raises(ConfigError, match=r"Run a no longer has the claim .* run b"):
        step.do(cli.parse(["step", name, "--job", job_of(root), *words]), Progress(quiet=True))
    assert list(Path(root).rglob(at))
    assert not list(Path(root).glob(marker))


def test_a_run_that_had_ended_and_was_retried_holds_nothing(
    before: dict[str, Path], tmp_path: Path
) -> None:
    """Kubeflow runs the exit handler once; the last step of the retried run has to end it."""
    root = str(shutil.copytree(before["report"], tmp_path / "now"))
    job = jobs.read(job_of(root))
    folder = discover.claims_of(root, job.dataset)
    report = ["step", "report", "--job", job.url]

    def claim() -> claims.Claim:
        found = claims.current(folder)
        assert found is not None
        return found

    storage.write_json(
        outcomes.record_of(root, "a"), storage.seal({"datasets": [job.dataset._asdict()]})
    )
    step.do(cli.parse(report))
    assert claim().is_held, "the exit handler gives it back"
    for processed in Path(root).glob("datasets/*/processed/*.json"):
        processed.unlink()
    assert discover.end(root, "a", {"state": "FAILED"})["done"] == []
    assert not claim().is_held

    step.do(cli.parse(report))
    assert (claim().owner, claim().is_held) == ("a", False)
    record = storage.read_json(outcomes.record_of(root, "a"))
    assert record["done"] == [job.dataset.name]
