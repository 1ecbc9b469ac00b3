"""SIGKILL at 20 random moments: what is resumed ends as what was never interrupted, byte for byte.

TensorBoard's event files and timings.jsonl hold wall times, so they are not compared.
"""

import json
from pathlib import Path

import pytest
from forker import Forker


@pytest.mark.slow
@pytest.mark.timeout(600)  # half a minute on two idle cores
def test_killed_20_times(forker: Forker, shards_url, tmp_path):
    script = Path(__file__).with_name("kill_runs.py").read_text()
    report = json.loads(forker.output(script, shards_url, tmp_path, 20, 0))
    assert len(report["kills"]) == 20
    assert report["different"] == []
    assert report["left"] == []
    names = {Path(f).name for f in report["files"]}
    assert names == {"run.json", "config.json", "metrics.jsonl", "sae.safetensors"}
    assert len(report["files"]) == 3 * 5  # checkpoint/ has a config.json of its own
    # The kills were spread: some before and some after there was something to go on from.
    states = {after for _, after in report["kills"]}
    assert len(states) >= 5, states
