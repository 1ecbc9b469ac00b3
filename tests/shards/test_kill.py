"""Recording is killed (SIGKILL) and started again: every byte is as if nothing had happened."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from forker import Forker

from saev import storage
from shards.recording import MODEL, tree

N_KILLS = 20

pytestmark = pytest.mark.timeout(900)  # some 80 processes; a minute on two idle cores


def command(root: Path) -> list[str]:
    return [
        "shards", "--shards-root", str(root), "--family", MODEL["family"], "--ckpt", MODEL["ckpt"],
        "--image-size", str(MODEL["image_size"]), "--layers", "1", "-1", "--n-workers", "2",
        "--max-tokens-per-shard", str(5 * 2 * 17), "--device", "cpu",
        "data:fake-img-seg", "--data.n-examples", "18",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed")
    ended = forker.run(command(root))
    assert ended.status == 0, ended.stderr
    files = tree(root)
    (folder,) = root.iterdir()
    assert ended.stdout == f"{folder}\n"
    assert len([name for name in files if "acts" in name]) == 4
    return files


@pytest.mark.slow
def test_killed_at_random_moments(
    forker: Forker, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    started = time.monotonic()
    forker.run(command(tmp_path / "timed"))
    seconds = time.monotonic() - started
    draw = random.Random(0)
    killed, seen = 0, set()
    for i in range(N_KILLS):
        root = tmp_path / str(i)
        pid = forker.start(command(root))
        time.sleep(seconds * (i + draw.random()) / N_KILLS)
        os.kill(pid, signal.SIGKILL)
        ended = forker.wait(pid)
        killed += ended.status == -signal.SIGKILL
        assert ended.status in (0, -signal.SIGKILL), ended.stderr
        seen.add(frozenset(tree(root)))
        again = forker.run(command(root))
        assert again.status == 0, again.stderr
        assert tree(root) == undisturbed, f"killed after {i}/{N_KILLS} of {seconds:.2f} s"
    assert killed >= N_KILLS // 2
    assert len(seen) >= 4  # the kills did hit different states


@pytest.mark.slow
def test_killed_before_every_change_of_a_name(
    forker: Forker, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Each rename and removal, those of publishing and tidying up too, is once the last moment."""
    states, at = [], 0
    while True:
        root = tmp_path / str(at)
        ended = forker.run(command(root), die_at=at)
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended.stderr
        states.append({Path(name).name for name in tree(root)})
        again = forker.run(command(root))
        assert again.status == 0, again.stderr
        assert tree(root) == undisturbed, f"killed before change {at}"
        at += 1
    # metadata, 4 shards and their records, labels, examples, statistics, checksums, shards.json
    assert at >= 1 + 2 * 4 + 5
    complete = [i for i, names in enumerate(states) if "shards.json" in names]
    assert complete, "no kill between publishing and tidying up"
    assert any("labels.bin" in names and "shards.json" not in names for names in states)


@pytest.mark.slow
def test_killed_again_and_again(
    forker: Forker, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Each attempt dies at its ninth change; publishing, which begins anew each time, has fewer."""
    for attempt in range(100):  # noqa: B007 - asked for after the loop
        ended = forker.run(command(tmp_path), die_at=8)
        leftovers = [n for n in tree(tmp_path) if Path(n).name.startswith(storage.TMP_PREFIX)]
        assert len(leftovers) <= 1, "temporaries of earlier attempts pile up"
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended.stderr
    assert attempt >= 2
    assert tree(tmp_path) == undisturbed
