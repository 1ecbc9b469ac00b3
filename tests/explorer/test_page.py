"""The file: its size, its policy, and errors."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from visuals.chain import HOSTILE_CLASS, HOSTILE_LABEL, Chain

from saev import cli, visuals
from saev.config import ImgSegFolder, VisualsConfig
from saev.config.pages import ReportConfig
from saev.errors import ConfigError
from saev.explorer import page, pictures


def facts_of(text: str) -> list[dict]:
    (found,) = re.findall(r'<script type="application/json" id="runs">(.*?)</script>', text)
    return json.loads(found)


def test_only_its_own_script_may_run(file: Path) -> None:
    text = file.read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    hashes = [
        "sha256-" + base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for part in (script, style)
    ]
    assert policy.split("; ")[:3] == [
        "default-src 'none'", f"script-src '{hashes[0]}'", f"style-src '{hashes[1]}'",
    ]  # fmt: skip
    assert not re.findall(r"<[^>]*(src|href)=", text.replace(script, "")), "it needs no other file"


def test_hostile_names_stay_text(file: Path) -> None:
    text = file.read_text()
    assert HOSTILE_LABEL not in text
    classes = [one["name"] for one in facts_of(text)[0]["classes"]]
    assert HOSTILE_LABEL in classes
    assert HOSTILE_CLASS in classes


def test_small_files_have_fewer_pictures(chain: Chain, file: Path, tmp_path: Path) -> None:
    whole = facts_of(file.read_text())[0]
    assert whole["nPictured"] == whole["nDetailed"] == whole["nFiring"]
    bare = page.write(ReportConfig(run=(chain.run,), out=str(tmp_path / "bare.html")))
    least = len(page._frame([])) / 1e6
    rest = file.stat().st_size / 1e6 - least
    pictured = []
    for share in (0.5, 0.7, 0.9, 1.1):
        cfg = ReportConfig(
            run=(chain.run,), out=str(tmp_path / "s.html"), max_mb=least + share * rest
        )
        url = page.write(cfg)
        assert Path(url).stat().st_size <= cfg.max_mb * 1e6
        facts = facts_of(Path(url).read_text())[0]
        pictured.append((facts["nPictured"], facts["nDetailed"]))
    assert pictured == sorted(pictured)
    assert pictured[0] < pictured[-1] == (whole["nFiring"], whole["nFiring"])
    assert Path(bare).read_bytes() == file.read_bytes(), "equal inputs give equal files"
    with pytest.raises(ConfigError, match=r"numbers of all latents alone take .* --max-mb"):
        page.write(ReportConfig(run=(chain.run,), out=str(tmp_path / "s.html"), max_mb=least))
    assert pictures.SIZES[-1] > pictures.THUMB


def test_several_runs_share_the_file(
    chain: Chain, trained: list[str], file_of_two: Path, tmp_path: Path
) -> None:
    text = file_of_two.read_text()
    first, second = facts_of(text)
    assert (first["nLatents"], second["nLatents"]) == (24, 48)
    assert 'id="b1-pictures"' in text
    assert "match1" in first["kinds"]
    assert "match0" in second["kinds"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--run RUN", "--run writes one HTML file: say where with --out FILE"),
        ("--out x.html", "--out is of the file of all latents: say of which SAE with --run URL"),
        ("--run RUN --out x.html --max-mb 0", "--max-mb"),
        ("--run /nowhere --out x.html", "/nowhere"),
        ("--run RUN --out x.html --shards /nowhere", "/nowhere"),
    ],
)
def test_errors(flags: str, message: str, chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["report", *flags.replace("RUN", chain.run).split()])
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_images_that_have_moved(chain: Chain, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    Path(chain.photos).rename(moved)
    try:
        cfg = ReportConfig(run=(chain.run,), out=str(tmp_path / "m.html"))
        with pytest.raises(Exception, match="data:img-folder"):
            page.write(cfg)
        page.write(cfg.model_copy(update={"data": ImgSegFolder(root=str(moved))}))
    finally:
        moved.rename(chain.photos)


def test_what_a_report_stored_needs_no_images(chain: Chain, tmp_path: Path) -> None:
    run = shutil.copytree(chain.run, tmp_path / "run")
    visuals.run(VisualsConfig(run=str(run), shards=chain.shards, image_size=64))
    moved = tmp_path / "moved"
    Path(chain.photos).rename(moved)
    try:
        url = page.write(ReportConfig(run=(str(run),), out=str(tmp_path / "s.html")))
    finally:
        moved.rename(chain.photos)
    facts = facts_of(Path(url).read_text())[0]
    assert facts["nDetailed"] == facts["nFiring"]
