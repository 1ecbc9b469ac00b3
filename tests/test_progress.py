"""What the log of a pod says of progress, by a clock that the tests turn."""

import logging
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from saev import eta, progress, storage
from saev.config import ShardsConfig
from saev.progress import Progress


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shown(clock: Clock) -> Progress:
    return Progress(quiet=True, clock=clock)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (9000, "2.5 h"), (2e5, "2.3 d")],
)
def test_spans(seconds: float, text: str) -> None:
    assert eta.span(seconds) == text


def test_only_what_is_finished_is_all_of_it() -> None:
    assert [eta.percent(x) for x in (0.29, 0.9999, 1.0)] == ["29%", "99%", "100%"]


def test_a_task_says_its_share_and_when_it_ends(shown: Progress, clock: Clock) -> None:
    """100 of 400 units in 50 s are 2 per second, so the other 300 take 150 s."""
    with shown.task("shards", total=400, unit="img") as task:
        clock.now += 50
        task.advance(100, n_bytes=50_000_000, note="a note")
        assert shown.line() == (
            "shards: 25%, 100/400 img, 2.0 img/s 1.0 MB/s, about 2 min left, a note"
        )


def test_what_an_earlier_run_did_took_no_time(shown: Progress, clock: Clock) -> None:
    """Of 400 units 200 were there. 100 more in 50 s: the last 100 take 50 s more."""
    with shown.task("shards", total=400, unit="img", done=200) as task:
        assert shown.line() == "shards: 50%, 200/400 img, 0.0 img/s"
        clock.now += 50
        task.advance(100)
        assert shown.line() == "shards: 75%, 300/400 img, 2.0 img/s, about 50 s left"


def test_a_task_of_unknown_size_counts(shown: Progress, clock: Clock) -> None:
    with shown.task("list", total=None, unit="file") as task:
        clock.now += 10
        task.advance(20_000)
        assert shown.line() == "list: 20,000 file, 2000.0 file/s"


def test_what_is_not_counted_has_a_name_or_at_least_a_time(shown: Progress, clock: Clock) -> None:
    clock.now += 40
    assert shown.line() == "at work for 40 s"
    with shown.doing("plan"):
        clock.now += 60
        with shown.doing("load the model"):
            clock.now += 30
            assert shown.line() == "load the model: 30 s so far"
        assert shown.line() == "plan: 2 min so far"


def test_one_item_has_its_name_before_it(shown: Progress, clock: Clock) -> None:
    shown.item("part 3 of 8", 1, 1)
    with shown.task("shards", total=100, unit="img", is_main=True) as task:
        clock.now += 9
        task.advance(45)
        assert shown.line() == "part 3 of 8: shards: 45%, 45/100 img, 5.0 img/s, about 11 s left"


def test_several_items_tell_the_share_of_all_of_them(shown: Progress, clock: Clock) -> None:
    """The second of four is half done after 60 s: 1.5 of 4 items, so 2.5 items take 100 s."""
    shown.item("a", 1, 4)
    with shown.task("train", total=10, unit="tok", is_main=True) as task:
        clock.now += 40
        task.advance(10)
    with shown.task("evaluate", total=10, unit="tok"):
        assert shown.line().endswith("; slot 25%, about 2 min left")
    shown.item("b", 2, 4)
    with shown.task("train", total=10, unit="tok", is_main=True) as task:
        clock.now += 20
        task.advance(5)
        assert shown.line() == (
            "b (2 of 4 here): train: 50%, 5/10 tok, 0.2 tok/s, about 20 s left; "
            "slot 37%, about 2 min left"
        )


def test_items_that_were_done_before_do_not_count_as_work(shown: Progress, clock: Clock) -> None:
    """Two of four are found done, the third was half done. A quarter of it takes 30 s: what is left
    of it and the fourth, 1.25 items, take 150 s."""
    for number, name in enumerate("ab", start=1):
        shown.item(name, number, 4)
    shown.item("c", 3, 4)
    with shown.task("train", total=100, unit="tok", done=50, is_main=True) as task:
        clock.now += 30
        task.advance(25)
        assert shown.line().endswith("; slot 68%, about 2 min left")
        assert eta.left(2.75 / 4, 0.25 / 4, 30) == "about 2 min left"


def test_another_process_goes_on_to_tell(shown: Progress, clock: Clock) -> None:
    """The ranks that train a group have a clock of their own."""
    shown.item("a", 1, 2)
    with shown.task("train", total=10, unit="tok", is_main=True) as task:
        clock.now += 40
        task.advance(10)
    shown.item("b", 2, 2)
    theirs = Clock()
    theirs.now = 7.0
    rank = Progress(quiet=True, clock=theirs, slot=shown.place)
    with rank.task("train", total=10, unit="tok", is_main=True) as task:
        theirs.now += 20
        task.advance(5)
        assert rank.line().startswith("b (2 of 2 here): train: 50%")
        assert rank.line().endswith("; slot 75%, about 20 s left")


def test_downloads_of_other_libraries_are_told(shown: Progress) -> None:
    tqdm = pytest.importorskip("tqdm.auto").tqdm
    with (
        shown.doing("load the model"),
        open("/dev/null", "w") as away,
        tqdm(desc="model.safetensors", total=80_000_000, unit="B", unit_scale=True, file=away) as b,
    ):
        b.update(20_000_000)
        said = shown.line()
        assert re.fullmatch(
            r"load the model: 0 s so far: model.safetensors: 25%, 20/80 MB, about \d+ s left", said
        )
    assert shown.line().startswith("at work for")


def test_a_terminal_has_one_line_for_each_of_them() -> None:
    """tqdm would print a line for each update, because rich has the last lines of the screen."""
    code = """
import time
from saev.progress import Progress

with Progress() as shown, shown.doing("load the model"):
    from tqdm.auto import tqdm
    with tqdm(desc="model.safetensors", total=80_000_000, unit="B", unit_scale=True) as bar:
        for _ in range(4):
            bar.update(10_000_000)
            time.sleep(0.15)  # tqdm draws at most ten times a second
"""
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 80))
    subprocess.run([sys.executable, "-c", code], stderr=stderr, check=True, timeout=200)
    os.close(stderr)
    said = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert re.search(r"model.safetensors: \d+%, \d0/80 MB", said)
    plain = re.sub(r"\x1b\[[\d;]*m", "", said)  # without colours
    assert "%|" not in plain, "tqdm has drawn its bar, too"


def test_lines_come_while_nothing_advances(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a store does not answer: the work itself says nothing."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    told, said = threading.Event(), []

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            told.set()

    monkeypatch.setattr(progress.logger, "level", logging.INFO)
    monkeypatch.setattr(progress.logger, "handlers", [Told()])
    with Progress() as shown, shown.doing("wait for the store"):
        assert told.wait(30)
    assert re.fullmatch(r"wait for the store: \d+ s so far", said[0])


def test_a_stage_says_what_it_did(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also one that is over before the first half minute."""
    import saev.shards.extract as extract

    caplog.set_level(logging.INFO, logger="saev.progress")
    raw = {"kind": "fake-img", "n_examples": 6}
    cfg = ShardsConfig.from_dict(
        {
            "shards_root": str(tmp_path), "data": raw, "family": "timm",
            "ckpt": "test_vit/random", "image_size": 32, "device": "cpu",
        }
    )  # fmt: skip
    with Progress() as shown:
        extract.run(cfg, shown)
    assert re.search(r"shards: 100%, 6/6 img, [\d.]+ img/s [\d.]+ MB/s", caplog.text)


def test_how_long_it_takes_is_said_from_the_first_batches(
    shown: Progress, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The first of 100 takes a minute, as kernels are compiled; each other one a second."""
    caplog.set_level(logging.INFO, logger="saev.progress")
    with shown.task("train", total=1000, unit="tok", is_main=True) as task:
        clock.now += 60
        task.advance(10)
        assert not caplog.messages
        for _ in range(4):
            clock.now += 1
            task.advance(10)
    # 950 tokens are left, ten a second.
    assert caplog.messages == ["train: about 2 min at 10.0 tok/s."]


def test_hours_are_a_warning(
    shown: Progress, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with shown.task("train", total=100_000, unit="tok", is_main=True) as task:
        for _ in range(9):
            clock.now += 1
            task.advance(10)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("train: about 2.8 h at 10.0 tok/s. It may be ended")


def test_a_listing_is_counted_wherever_it_happens(shown: Progress, tmp_path: Path) -> None:
    for i in range(1500):
        (tmp_path / f"{i:04d}").touch()
    with shown.doing("list the images") as task:
        with storage.told_of_files(task.see):
            assert len(list(storage.walk(str(tmp_path)))) == 1500
        assert re.fullmatch(r"list the images: \d+ s so far, 1,500 files found", shown.line())
        list(storage.walk(str(tmp_path)))
        assert task.done == 1500, "nobody listens any more"


@pytest.mark.parametrize("n", [0, 999, 2001])
def test_a_listing_tells_of_its_files(n: int, tmp_path: Path) -> None:
    for i in range(n):
        (tmp_path / f"{i:04d}").touch()
    told: list[int] = []
    assert len(sorted(storage.walk(str(tmp_path), seen=told.append))) == n
    assert sum(told) == n
    assert max(told, default=0) <= 1000


def test_no_line_without_need(capsys: pytest.CaptureFixture) -> None:
    with Progress(quiet=True) as shown, shown.task("x", total=1, unit="y", is_main=True) as task:
        task.advance(1)
    assert capsys.readouterr() == ("", "")
