"""A step that fails is run again, or is not, and says why."""

import contextlib
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from walk import Walk

from saev import interrupts
from saev.errors import ConfigError, RankError
from saev.launch import outcomes
from saev.steps import last_word, memory, supervisor
from saev.steps.last_word import LastWord
from saev.steps.supervisor import Policy, Supervisor

QUICK = Policy(retries=3, wait_s=0.05)
SAEV = [sys.executable, "-m", "saev"]
MODULE = [sys.executable, "-m", supervisor.MODULE]

FAKE = {
    "data": {"kind": "fake-img", "n_examples": 8, "image_size": 64},
    "shards": {"family": "timm", "ckpt": "test_vit/random", "image_size": 64, "layers": [-1]},
    "train": {"n_train": 100_000_000, "checkpoint_minutes": 0.05, "sae": {"d_sae": 64}},
}


def script(tmp_path: Path, body: str) -> Supervisor:
    """Supervises a Python script, in which `n` counts its runs from 1."""
    counter = f"""
import os, pathlib, sys
place = pathlib.Path({str(tmp_path / "runs")!r})
n = int(place.read_text()) + 1 if place.exists() else 1
place.write_text(str(n))
"""
    return Supervisor([sys.executable, "-c", counter + body], QUICK, look=lambda: None)


def test_a_process_that_is_killed_is_run_again(tmp_path: Path) -> None:
    supervised = script(tmp_path, "n < 3 and os.kill(os.getpid(), 9)")
    assert supervised.run() is None
    assert supervised.n_runs == 3


def test_there_is_an_end_to_it(tmp_path: Path) -> None:
    supervised = script(tmp_path, "os.kill(os.getpid(), 9)")
    assert supervised.run() == LastWord("passing", "The process was killed by SIGKILL.")
    assert supervised.n_runs == 1 + QUICK.retries


def test_old_failures_do_not_count(tmp_path: Path) -> None:
    supervised = script(tmp_path, "import time; time.sleep(0.3); n < 4 and os.kill(os.getpid(), 9)")
    supervised._policy = Policy(retries=1, window_s=0.2, wait_s=0.01)
    assert supervised.run() is None
    assert supervised.n_runs == 4


def test_the_same_bug_twice_is_no_third_time(tmp_path: Path) -> None:
    body = """
from saev import cli
cli.stage = lambda *words: 1 / 0
cli.main(["step", "check", "--root", "x"])
"""
    supervised = script(tmp_path, body)
    word = supervised.run()
    assert word is not None
    assert word.kind == "permanent"
    assert word.error == "ZeroDivisionError: division by zero (twice the same)"
    assert supervised.n_runs == 2


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    words = ["step", "discover", "--root", str(tmp_path), "--owner", "run-1"]
    words += ["--config", '{"dta": {"kind": "fake-img"}}']
    ended = subprocess.run([*MODULE, *words], capture_output=True, text=True, timeout=120)
    assert ended.returncode == interrupts.PERMANENT
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("saev: permanent error: ")
    assert "dta" in last
    (kept,) = outcomes.last_words(str(tmp_path), "run-1")
    assert (kept.step, kept.kind) == ("discover", "permanent")
    assert kept.error in last
    assert ended.stderr.count("saev: error: ") == 1


@pytest.mark.parametrize(
    ("passing", "spent", "n_runs", "kind"),
    [(True, False, 4, "passing"), (True, True, 1, "passing"), (False, True, 1, "permanent")],
)
def test_what_was_tried_in_new_pods_is_not_tried_again(
    tmp_path: Path, passing: bool, spent: bool, n_runs: int, kind: str
) -> None:
    body = f"""
from saev.errors import LaunchError
from saev.steps import last_word
last_word.tell(LaunchError("2 of 6 slots failed", passing={passing}, spent={spent}))
sys.exit(1)
"""
    supervised = script(tmp_path, body)
    word = supervised.run()
    assert word is not None
    assert (word.kind, word.error) == (kind, "2 of 6 slots failed")
    assert supervised.n_runs == n_runs


def test_a_wrong_flag_is_not_tried_again() -> None:
    ended = subprocess.run(
        [*MODULE, "step", "check", "--rot", "x"], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == interrupts.PERMANENT
    assert ended.stderr.strip().splitlines()[-1].startswith("saev: permanent error: ")


class Relay(socketserver.BaseRequestHandler):
    """Passes bytes on to the server at the port ``behind``."""

    behind = 0

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.behind)) as server:
            thread = threading.Thread(target=self.copy, args=(self.request, server))
            thread.start()
            self.copy(server, self.request)
            thread.join()

    @staticmethod
    def copy(source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                to.sendall(data)
        with contextlib.suppress(OSError):
            to.shutdown(socket.SHUT_WR)


@pytest.mark.slow
def test_a_store_that_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its bucket: a store without one would be a mistake, which is not tried again."""
    from s3_server import SERVE, free_port, wait_for

    port, Relay.behind = free_port(), free_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "SAEV_PATIENCE_S": "0.5",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    supervised = Supervisor(
        [*SAEV, "step", "check", "--root", "s3://bucket/root"],
        Policy(retries=50, wait_s=0.05, most_wait_s=1.0),
    )
    found: list[LastWord | None] = []
    thread = threading.Thread(target=lambda: found.append(supervised.run()))
    command = [sys.executable, "-c", SERVE, "-H", "127.0.0.1", "-p", str(Relay.behind)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        behind = f"http://127.0.0.1:{Relay.behind}"
        wait_for(behind, server)
        request = urllib.request.Request(f"{behind}/bucket", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        thread.start()
        while supervised.n_runs < 2:  # once it has met the outage
            time.sleep(0.05)
        with socketserver.ThreadingTCPServer(("127.0.0.1", port), Relay) as relay:
            threading.Thread(target=relay.serve_forever, daemon=True).start()
            thread.join(200)
            relay.shutdown()
        assert found == [None]
    finally:
        supervised.stop()
        thread.join(60)
        server.terminate()
        server.wait(20)


@pytest.mark.slow
def test_a_stopped_step_writes_its_resume_point(tmp_path: Path) -> None:
    """As on a cluster: Argo runs a command in the container, which signals the supervisor."""
    root, config = str(tmp_path / "root"), json.dumps(FAKE)
    walk = Walk(root, config, tmp_path / "kfp", owner="run-1")
    walk.until("train")
    (slot,) = walk.slots("train")
    process = subprocess.Popen(
        [*MODULE, "step", "train", "--job", walk.job, "--slot", slot],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not steps_of(root) and time.monotonic() < deadline:
            time.sleep(0.02)
        before = max(steps_of(root))
        # Other tests may run supervisors at the same time, so the list holds this one alone.
        proc = tmp_path / "proc"
        proc.mkdir()
        (proc / str(process.pid)).symlink_to(f"/proc/{process.pid}")
        supervisor.send(signal.SIGTERM, proc)
        _, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == supervisor.STOPPED
    assert err.strip().splitlines()[-1].startswith("saev: stopped: ")
    assert max(steps_of(root)) > before
    assert outcomes.last_words(root, "run-1") == []


def steps_of(root: str) -> list[int]:
    """Steps of the resume points of the one group there is."""
    pointers = Path(root).glob("runs/resume/*/step-*.json")
    return [int(path.stem.split("-")[1]) for path in pointers]


@pytest.mark.parametrize(
    ("errors", "kind", "says"),
    [
        ([RankError("gone"), ConfigError("wrong"), SystemExit(143)], "permanent", "wrong"),
        ([SystemExit(143), RankError("gone")], "passing", "gone"),
        ([SystemExit(143), SystemExit(143)], "stopped", "stopped"),
        ([RankError("gone"), ZeroDivisionError("zero")], "passing", "zero"),
    ],
)
def test_of_several_processes_the_one_that_knows_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: list, kind: str, says: str
) -> None:
    monkeypatch.setenv(last_word.FOLDER_VARIABLE, str(tmp_path))
    for pid, error in enumerate(errors):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        last_word.tell(error)
    word = last_word.heard(tmp_path)
    assert word is not None
    assert word.kind == kind
    assert says in word.error


def test_machines_do_not_overwrite_each_others_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["step", "train", "--root", str(tmp_path), "--owner", "a"]
    supervisor._keep(LastWord("permanent", "wrong"), words)
    monkeypatch.setenv("PET_NODE_RANK", "1")
    supervisor._keep(LastWord("passing", "gone", is_echo=True), words)
    assert {word.error for word in outcomes.last_words(str(tmp_path), "a")} == {"wrong", "gone"}
    supervisor._keep(None, words)
    assert [word.error for word in outcomes.last_words(str(tmp_path), "a")] == ["wrong"]


def test_success_takes_an_earlier_failure_back(tmp_path: Path) -> None:
    root = str(tmp_path)
    flags = ["--root", root, "--owner", "a"]
    last_word.keep(LastWord("passing", "no answer"), root, "a", "train", flags)
    last_word.keep(LastWord("passing", "no answer"), root, "a", "train", [*flags, "--item", "2"])
    assert len(outcomes.last_words(root, "a")) == 2
    last_word.withdraw(root, "a", "train", flags)
    assert len(outcomes.last_words(root, "a")) == 1
    assert outcomes.last_words(root, "b") == []


def test_memory_that_runs_out_ends_the_process_and_not_the_pod(tmp_path: Path) -> None:
    supervised = script(tmp_path, "import time; time.sleep(60)")
    supervised._look = lambda: memory.Memory(used=995 << 20, limit=1000 << 20)
    word = supervised.run()
    assert word is not None
    assert word.kind == "permanent"
    assert "0.97 of the 0.98 GiB" in word.error
    assert supervised.n_runs == 2


STAT_V2 = """anon 300000
file 700000
kernel 50000
slab_reclaimable 20000
slab_unreclaimable 10000
inactive_anon 300000
active_anon 100000
inactive_file 400000
active_file 200000
"""


def test_memory_of_cgroup_v2(tmp_path: Path) -> None:
    """Shared memory (here 100,000 of `file`) is on the lists of anon, so it counts."""
    assert memory.look(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.look(tmp_path) is None
    (tmp_path / "memory.max").write_text("2000000\n")
    (tmp_path / "memory.current").write_text("1050000\n")
    (tmp_path / "memory.stat").write_text(STAT_V2)
    found = memory.look(tmp_path)
    assert found == (1_050_000 - 400_000 - 200_000 - 20_000, 2_000_000)
    assert not found.is_short
    (tmp_path / "memory.current").write_text("2570000\n")
    assert memory.look(tmp_path).is_short


def test_memory_of_cgroup_v1(tmp_path: Path) -> None:
    place = tmp_path / "memory"
    place.mkdir()
    (place / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (place / "memory.usage_in_bytes").write_text("1000000\n")
    (place / "memory.stat").write_text("total_inactive_file 300000\ntotal_active_file 100000\n")
    assert memory.look(tmp_path) is None
    (place / "memory.limit_in_bytes").write_text("1200000\n")
    assert memory.look(tmp_path) == (600_000, 1_200_000)
