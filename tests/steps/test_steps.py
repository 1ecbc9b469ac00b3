"""What steps tell KFP, and what they say to a mistake."""

import json
import math
from pathlib import Path

import pytest

from saev import cli, storage
from saev.errors import ConfigError, StorageError
from saev.steps import advice, check, outputs

from .places import Place

FAKE = json.dumps(
    {
        "data": {"kind": "fake-img", "n_examples": 4, "image_size": 64},
        "shards": {"family": "timm", "ckpt": "test_vit/random", "image_size": 64, "layers": [-1]},
    }
)


def fails(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one error of a step that exits with status 1."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["step", *argv])
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert err.count("saev: error: ") == 1
    assert "Traceback" not in err
    return err.partition("saev: error: ")[2]


def test_check_uses_the_storage_and_leaves_nothing(place: Place) -> None:
    place.put("a/1.png")
    assert check.run(place.root, place.incoming) == [place.root, place.incoming]
    assert storage.find(place.root) == []


def test_check_says_what_failed_first(tmp_path: Path, s3: str) -> None:
    """Without a secret, nothing was written, so there is nothing to delete."""
    del s3
    with pytest.raises(StorageError, match="Cannot write s3://no-such-bucket-of-saev"):
        check.run("s3://no-such-bucket-of-saev/root")


def test_metrics_are_metadata_of_an_artifact_beside_all_others(tmp_path: Path) -> None:
    place = tmp_path / "executor_output.json"
    artifacts = {
        "page": {"artifacts": [{"name": "page", "uri": "s3://b/page", "metadata": {}}]},
        "metrics": {"artifacts": [{"name": "metrics", "uri": "s3://b/metrics", "metadata": {}}]},
    }
    executor_input = json.dumps({"outputs": {"outputFile": str(place), "artifacts": artifacts}})
    outputs.write_metrics(executor_input, {"l0": 2, "nmse": 0.5, "none": math.nan})
    written = json.loads(place.read_text())["artifacts"]
    assert written["metrics"]["artifacts"][0]["metadata"] == {"l0": 2.0, "nmse": 0.5}
    assert written["page"] == artifacts["page"]


@pytest.mark.parametrize("text", ["{", "[]", '{"outputs": {}}', '{"outputs": {"outputFile": "x"}}'])
def test_what_is_no_executor_input(text: str) -> None:
    with pytest.raises(ConfigError, match="is not what KFP gives"):
        outputs.write_metrics(text, {"l0": 2.0})


def test_a_labelled_dataset_shows_how_well_latents_match_its_classes(tmp_path: Path) -> None:
    root, to = str(tmp_path / "out"), tmp_path / "kfp"
    file = json.loads(FAKE)
    file["data"] |= {"kind": "fake-img-seg", "n_examples": 12}
    file["train"] = {"n_train": 200, "sae": {"d_sae": 64}}
    config = tmp_path / "run.json"
    config.write_text(json.dumps(file | {"visuals": {"n_latents": 0}}))
    cli.main(["run", "--config", str(config), "--root", root])
    (run,) = (entry.url for entry in storage.list_dir(f"{root}/runs") if entry.name != "resume")
    (shards,) = (entry.url for entry in storage.list_dir(f"{root}/shards"))
    metrics = {"metrics": {"artifacts": [{"name": "metrics", "uri": "x"}]}}
    executor_input = json.dumps({"outputs": {"outputFile": str(to), "artifacts": metrics}})
    words = ["step", "summarise", "--root", root, "--config", config.read_text()]
    words += ["--dataset", DATASET, "--shards", shards, "--run", run]
    cli.main([*words, "--executor-input", executor_input])
    written = json.loads(to.read_text())["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    expected = ("normalized_mse", "l0", "n_dead", "mean_average_precision", "purity_at_16")
    assert written.keys() >= {*expected, "coverage_at_0.3", "probe_r"}


def test_items_are_texts(tmp_path: Path) -> None:
    outputs.write_items(str(tmp_path / "items"), [{"name": "part 1 of 1"}])
    assert json.loads((tmp_path / "items").read_text()) == ['{"name":"part 1 of 1"}']


def test_no_path_no_output() -> None:
    outputs.write_items("", [])
    outputs.write_parameter("", "x")
    outputs.write_page("", "x")
    outputs.write_metrics("", {})


DATASET = json.dumps(
    {"name": "x", "url": "", "fingerprint": "f", "key": "k", "version": "", "marker": ""}
)

PART = '{"part": "1/1"}'


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["discover", "--config", "{"], "--config is '{', which is not JSON"),
        (["discover", "--config", '{"shard": {}}'], "shard: unknown key"),
        (["discover", "--config", "{}"], "No images"),
        (["discover", "--config", "{}", "--mode", "incoming"], "needs --dataset"),
        (["plan-shards", "--config", FAKE, "--dataset", "{}"], "--dataset is {}; expected"),
        (
            ["plan-shards", "--config", FAKE, "--dataset", DATASET, "--owner", "nobody"],
            "Run nobody no longer has the claim",
        ),
        (
            ["extract", "--config", FAKE, "--dataset", DATASET, "--shards", "s", "--item", "{}"],
            "--item is {}; expected an object with part",
        ),
        (
            ["extract", "--config", FAKE, "--dataset", DATASET, "--shards", "s", "--item", PART],
            "was planned: the dataset, the weights or the version of saev changed",
        ),
    ],
)
def test_mistakes(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert message in fails(capsys, *argv, "--root", str(tmp_path / "out"))


def test_a_corrupt_image_names_the_key_of_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Nobody can give a flag to a step of a pipeline."""
    images = tmp_path / "images" / "cats"
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    config = json.loads(FAKE)
    config["data"] = {"kind": "img-folder", "root": str(tmp_path / "images")}
    words = ["--root", str(tmp_path / "out"), "--config", json.dumps(config), "--dataset", DATASET]
    to = tmp_path / "to"
    cli.main(["step", "plan-shards", *words, "--to-shards", str(to)])
    capsys.readouterr()
    item = ["--item", PART, "--shards", to.read_text()]
    said = fails(capsys, "extract", *words, *item)
    assert "a.png" in said
    assert "with `skip_unreadable = true` under [shards] in the config." in said
    assert "--skip" not in said


@pytest.mark.parametrize(
    ("flag", "tables", "key"),
    [
        ("--data.max-pixels", ("shards",), "`max_pixels` under [data] in the config"),
        ("--image-size", ("shards",), "`image_size` under [shards] in the config"),
        ("--train-data.buffer-mb", ("train",), "`buffer_mb` under [train.train_data] in the"),
        ("--no-save", ("inference", "visuals"), "`save = false` under [inference] in the config"),
        ("--latents", ("inference", "visuals"), "`latents` under [visuals] in the config"),
        ("--part", ("shards",), "--part"),
        ("--item", ("train",), "--item"),
    ],
)
def test_flags_become_keys(flag: str, tables: tuple[str, ...], key: str) -> None:
    err = ConfigError(f"It is wrong. Change {flag}.")
    advice.for_config(err, *tables)
    assert str(err).startswith(f"It is wrong. Change {key}")


def test_discover_writes_for_kfp_and_prints_for_people(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place.put("a/1.png")
    to = tmp_path / "datasets"
    command = f"step discover --mode incoming --owner run --settle-minutes 0 --to-datasets {to}"
    words = [*command.split(), "--config", "{}"]
    cli.main([*words, "--root", place.root, "--dataset", place.incoming])
    assert capsys.readouterr().out.split() == [storage.join(place.incoming, "a")]
    (dataset,) = json.loads(to.read_text())
    assert json.loads(dataset)["name"] == "a"


def test_a_training_item_names_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It means the same SAEs, however groups are formed when its pod starts at last."""
    root, to = str(tmp_path / "out"), tmp_path / "kfp"
    file = json.loads(FAKE)
    file["data"]["n_examples"] = 12
    file["train"] = {"n_train": 200, "device": "cpu", "sae": {"d_sae": 64}}
    config = json.dumps(file | {"sweep": {"sae.activation.top_k": [2, 3, 4]}})
    words = ["--root", root, "--config", config, "--dataset", DATASET]
    cli.main(["step", "plan-shards", *words, "--to-shards", str(to), "--to-items", str(to) + "2"])
    shards = to.read_text()
    for item in json.loads(Path(str(to) + "2").read_text()):
        cli.main(["step", "extract", *words, "--shards", shards, "--item", item])
    cli.main(["step", "publish", *words, "--shards", shards])
    words += ["--shards", shards]
    cli.main(["step", "plan-training", *words, "--to-items", str(to)])
    (text,) = json.loads(to.read_text())
    item = json.loads(text)
    other = {"group": "000000000000", "runs": item["runs"][1:]}
    cli.main(["step", "train", *words, "--item", json.dumps(other)])
    done = {e.name for e in storage.list_dir(f"{root}/runs") if e.is_dir}
    assert done == set(item["runs"][1:])
    old = {"group": item["group"], "name": "of version 0.1.0"}
    cli.main(["step", "train", *words, "--item", json.dumps(old)])
    assert {e.name for e in storage.list_dir(f"{root}/runs")} == set(item["runs"])
    wrong = {"group": item["group"], "runs": ["0" * 12]}
    capsys.readouterr()
    assert "There is no group" in fails(capsys, "train", *words, "--item", json.dumps(wrong))
