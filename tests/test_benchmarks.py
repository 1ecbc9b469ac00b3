"""Every benchmark runs, in its trial size; what it measures is for a quiet machine to say."""

import json
import math
from pathlib import Path

import pytest
from forker import Ended, Forker
from visuals import chromium

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FLAGS = {
    "loader": ["--root={}"],
    "training": [],
    "inference": ["--root={}"],
    "many": ["--root={}"],
    "extraction": ["--root={}"],
    "planning": ["--root={}"],
    "explorer": [],
    "serve": ["--root={}"],
    "own_image": [],
    "gpu": ["--root={}", "--device=cpu", "--no-kernels"],  # tests/nn/test_triton.py runs those
    "sparsity": ["--root={}", "--device=cpu"],
}


def run(forker: Forker, script: Path, *flags: object) -> Ended:
    """A benchmark, to its end."""
    code = f"""
import runpy, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
sys.argv[0] = {str(script)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    return forker.wait(forker.start(flags, script=code))


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_a_trial_gives_every_row(forker: Forker, name, tmp_path) -> None:
    if name == "explorer" and chromium.BINARY is None:
        pytest.skip(chromium.MISSING)
    found = tmp_path / f"{name}.json"
    flags = [flag.format(tmp_path) for flag in FLAGS[name]]
    ran = run(forker, BENCHMARKS / f"{name}.py", "--small", "--repeats=1", "--json", found, *flags)
    assert ran.status == 0, ran.stderr
    record = json.loads(found.read_text())
    assert record["rows"]
    for row in record["rows"]:
        assert row["values"]
        assert all(map(math.isfinite, row["values"])), row
        assert row["what"] in ran.stdout
    assert not list(tmp_path.glob("saev-bench-*"))


@pytest.mark.slow
def test_l0_on_unseen_images_is_what_was_asked_for(forker: Forker, tmp_path) -> None:
    """100,000 tokens, three seeds: JumpReLU had an L0 of 678 whatever its penalty was, BatchTopK
    with k = 32 one of 40.5."""
    found = tmp_path / "found.json"
    flags = "--n-train 100_000 --d-model 32 --d-sae 192 --n-images 400 --targets 12".split()
    script = BENCHMARKS / "sparsity.py"
    ran = run(forker, script, "--device=cpu", f"--root={tmp_path}", "--json", found, *flags)
    assert ran.status == 0, ran.stderr
    misses = [row for row in json.loads(found.read_text())["rows"] if "largest miss" in row["what"]]
    assert len(misses) == 3
    for row in misses:
        assert row["values"][0] < 10, ran.stdout


def test_the_page_holds_the_tables(forker: Forker, tmp_path) -> None:
    row = {"what": "w", "unit": "GB/s", "values": [1.0, 3.0], "target": "≥ 4", "met": False}
    machine = {
        "date": "2026-01-01", "processor": "P", "cores": 2, "memory_gb": 8, "gpu": "none",
        "torch": "2", "python": "3",
    }  # fmt: skip
    record = {"command": "python benchmarks/loader.py", "machine": machine, "rows": [row]}
    (tmp_path / "loader.json").write_text(json.dumps(record))
    code = (
        f"import pathlib, runpy, sys; sys.path.insert(0, {str(BENCHMARKS)!r});"
        "print(runpy.run_path(sys.argv[1])['page'](pathlib.Path(sys.argv[2])))"
    )
    page = forker.output(code, BENCHMARKS / "__main__.py", tmp_path)
    assert "| w | 2 GB/s | 1 – 3 | ≥ 4 | **no** |" in page


def test_a_benchmark_that_is_not_there_is_an_error(forker: Forker, tmp_path) -> None:
    ran = run(forker, BENCHMARKS / "__main__.py", "loaderr", "--out", tmp_path / "out")
    assert ran.status == 2
    assert "no benchmark 'loaderr'" in ran.stderr
    assert not (tmp_path / "out").exists()
