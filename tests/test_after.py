"""What a person is told after a stage: its figures, and a command that can be pasted."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pasted
import pytest
from PIL import Image

from saev import after, storage
from saev.config import ImgFolder, LoaderConfig, SaeConfig, ShardsConfig, TrainConfig
from saev.shards import extract
from saev.visuals import overview


def next_of(err: str) -> str:
    (line,) = re.findall(r"^Next: (.*)$", err, re.MULTILINE)
    return line


def run_json(url: str) -> dict:
    return json.loads((Path(url) / "run.json").read_text())


def test_each_stage_says_its_figures_and_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """From the images to the page by pasting alone, in a folder whose name a shell would cut."""
    root = tmp_path / "it's a root"
    first = shlex.join(
        ["saev", "shards", "--shards-root", str(root / "shards"), "--family", "timm", "--ckpt",
         "test_vit/random", "--image-size", "32", "--layers", "-2", "-1", "data:fake-img",
         "--data.n-examples", "24"]
    )  # fmt: skip
    shards, err = pasted.run(first, capsys)
    # 24 images of 2 x 2 patches; the network is 64 wide and has 6 blocks.
    assert "Recorded 24 images: 96 patches of 64 numbers, layers 4, 5, " in err

    line = next_of(err)
    assert shlex.split(line)[:4] == ["saev", "train", "--shards", shards.strip()]
    runs, err = pasted.run(f"{line} --n-train 600 --sae.d-sae 64", capsys)
    (run,) = runs.split("\n")[:-1]
    assert Path(run).parent == root / "runs"
    record = run_json(run)
    held_out, own = record["metrics"], record["train_metrics"]
    row = (
        rf"topk32-s64 +{held_out['normalized_mse']:.4f} +{held_out['l0']:.1f} +"
        rf"{own['normalized_mse']:.4f} +{own['l0']:.1f} +{held_out['n_dead']} of 64"
    )
    assert re.search(row, err), err
    assert TrainConfig.of_run(run).train_data.layer == 5

    measured, err = pasted.run(next_of(err), capsys)
    metrics = json.loads((Path(measured.strip()) / "metrics.json").read_text())
    assert f"dead {metrics['n_dead']} of 64" in err

    page, err = pasted.run(next_of(err), capsys)
    assert next_of(err) == shlex.join(["saev", "open", page.strip()])


def test_what_was_done_before_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = (
        f"saev shards --shards-root {tmp_path}/shards --family timm --ckpt test_vit/random "
        "--image-size 32 --layers -1 data:fake-img --data.n-examples 3"
    )
    first, again = (pasted.run(line, capsys)[1].splitlines()[-2:] for _ in range(2))
    assert [re.sub(r"\(\d+ s\)", "", text) for text in first] == [
        re.sub(r"\(\d+ s\)", "", text) for text in again
    ]


def test_nothing_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two images are too few for that, so there are figures of the last batch alone."""
    shards, _ = pasted.run(
        f"saev shards --shards-root {tmp_path}/shards --family timm --ckpt test_vit/random "
        "--image-size 32 --layers -1 data:fake-img --data.n-examples 2", capsys,
    )  # fmt: skip
    run, err = pasted.run(
        f"saev train --shards {shards.strip()} --runs-root {tmp_path}/runs --n-train 100 "
        "--sae.d-sae 32", capsys,
    )  # fmt: skip
    last = json.loads((Path(run.strip()) / "metrics.jsonl").read_text().splitlines()[-1])
    own = rf"{last['train/normalized_mse']:.4f} +{last['train/l0']:.1f} "
    assert re.search(rf"topk32-s32 +– +– +{own}", err), err
    assert "Nothing is held out" in err


def test_a_sweep_goes_on_together_the_best_first(tmp_path: Path) -> None:
    """By the held-out error. Others may have fitted their training images better."""
    urls = []
    for name, held_out, own in (("a", 0.3, 0.1), ("b", 0.2, 0.15), ("c", None, 0.05)):
        url = str(tmp_path / name)
        data = LoaderConfig(shards=str(tmp_path / "shards"), layer=1)
        resolved = TrainConfig(train_data=data, sae=SaeConfig(d_sae=32))
        config = storage.json_bytes(resolved.to_dict())
        storage.write_bytes(f"{url}/config.json", config)
        metrics = {"normalized_mse": held_out, "l0": 2.0, "n_dead": 0} if held_out else {}
        record = {"metrics": metrics, "train_metrics": {"normalized_mse": own, "l0": 2.0}}
        storage.write_json(
            f"{url}/run.json", storage.seal(record, {"config.json": storage.Listed.of(config)})
        )
        urls.append(url)
    outcome = after.of(TrainConfig(), urls)
    first_name = outcome.figures(1.0).splitlines()[5].split()[0]
    for url in urls:  # what the figures are read from is not read again for the command
        shutil.rmtree(url)
    line = outcome.go_on()
    assert first_name.startswith("topk")
    runs = " ".join(f"{tmp_path}/{name}" for name in "bac")
    assert line == f"saev inference --run {runs} --shards {tmp_path}/shards"


def test_the_page_of_a_root_grows_with_each_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "root"
    _, err = pasted.run(
        f"saev shards --shards-root {root}/shards --family timm --ckpt test_vit/random "
        "--image-size 32 --layers -1 data:fake-img --data.n-examples 20", capsys,
    )  # fmt: skip
    page = root / "index.html"
    assert not page.exists()
    run, err = pasted.run(f"{next_of(err)} --n-train 100 --sae.d-sae 32 --tag first", capsys)
    held_out = run_json(run.strip())["metrics"]
    html = page.read_text()
    for text in ("topk32-s32", "not measured yet", f"{held_out['normalized_mse']:.4f}", "first"):
        assert text in html
    _, err = pasted.run(next_of(err), capsys)
    assert "not drawn yet" in page.read_text()
    report, err = pasted.run(next_of(err), capsys)
    link = Path(report.strip()).relative_to(root)
    assert f'href="{link}"' in page.read_text()
    (back,) = re.findall(r'"home":"([^"]*)"', Path(report.strip()).read_text())
    assert (Path(report.strip()).parent / back).resolve() == page
    # The same as the command that writes it.
    before = page.read_bytes()
    page.unlink()
    written, _ = pasted.run(f"saev report --root {root}", capsys)
    assert (written.strip(), page.read_bytes()) == (str(page), before)


def test_another_programs_page_stays(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "0123"
    run.mkdir(parents=True)
    (tmp_path / "index.html").write_text("<title>My site</title>")
    assert overview.root_of(str(run)) == "", "no shards beside the runs"
    (tmp_path / "shards").mkdir()
    assert overview.update(str(run)) == ""
    assert (tmp_path / "index.html").read_text() == "<title>My site</title>"


def test_images_that_were_left_out_are_counted(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "2.png").write_bytes(b"no picture")
    cfg = ShardsConfig(
        shards_root=str(tmp_path), family="timm", ckpt="test_vit/random", image_size=32,
        layers=(-1,), skip_unreadable=True, data=ImgFolder(root=str(tmp_path / "pictures")),
    )  # fmt: skip
    url = extract.run(cfg)
    recorded, left_out = after.of(cfg, [url]).lines()
    assert recorded.startswith("Recorded 2 images: 8 patches")
    assert left_out == f"Left out 1 that cannot be decoded: {url}/skipped.json"
    assert (Path(url) / "skipped.json").exists()
