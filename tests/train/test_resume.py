"""Resume points by themselves: which one is taken, what is kept, and what an error means."""

import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3_proxy
import s3fs
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from saev import storage
from saev.errors import StorageError
from saev.train import curves, earlier, resume
from saev.train.point import CurveRows, ResumePoint
from saev.train.resume import Patience, Points


def rows(n: int) -> CurveRows:
    steps = range(2, 2 * n + 1, 2)
    return CurveRows(
        [{"step": s, "train/loss": 1 / s, "train/lr": None} for s in steps],
        [{"step": s, "wall_time": 100.0 + s, "loader/wait_s": 0.1} for s in steps],
    )


def point(step: int) -> ResumePoint:
    gen = torch.Generator().manual_seed(step)
    tensors = {
        "a.weight": torch.randn(3, 5, generator=gen),
        "half": torch.randn(7, generator=gen).bfloat16(),
        "count": torch.arange(4) * step,
        "flag": torch.tensor([True, False]),
        "state": torch.randint(0, 255, (16,), dtype=torch.uint8, generator=gen),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "view": torch.randn(4, 6, generator=gen).T,
    }
    meta = {"loader": {"epoch": step}, "run_ids": ["one", "two"], "rules": 2}
    return ResumePoint(step, tensors, meta, {"one": rows(step), "two": rows(step)})


def assert_equal(a: ResumePoint | None, b: ResumePoint) -> None:
    assert a is not None
    assert (a.step, a.meta, a.curves) == (b.step, b.meta, b.curves)
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        assert torch.equal(a.tensors[name], b.tensors[name]), name
        assert a.tensors[name].dtype == b.tensors[name].dtype


def names(url: str) -> list[str]:
    return [entry.name for entry in storage.list_dir(url, missing_ok=True)]


def of_steps(*steps: int) -> list[str]:
    kinds = ("curves.jsonl", "json", "safetensors")
    return [f"step-{s:012d}.{kind}" for s in steps for kind in kinds]


# --- What is kept ---


@pytest.mark.parametrize("root", ["local", "memory://resume-test", "s3"])
def test_the_last_two_are_kept(tmp_path, root, request):
    base = str(tmp_path) if root == "local" else root
    base = request.getfixturevalue("s3") + "/kept" if root == "s3" else base
    url = storage.join(base, "resume/g")
    points = Points(url)
    assert points.load() is None
    for step in (5, 20, 100):
        points.save(point(step))
    assert names(url) == of_steps(20, 100)
    assert_equal(Points(url).load(), point(100))
    assert points.history() == {"generation": 1}
    resume.clear(points.url)
    assert not storage.exists(storage.join(base, "resume"))
    assert points.load() is None
    resume.clear(points.url)


def test_a_folder_with_other_groups_stays(tmp_path):
    for group in "ab":
        Points(str(tmp_path / "resume" / group)).save(point(1))
    resume.clear(str(tmp_path / "resume/a"))
    assert names(str(tmp_path / "resume")) == ["b"]


def test_a_lower_point_is_not_deleted_as_it_is_saved(tmp_path):
    """The newer point was damaged, so training went on from the older one and saves lower ones."""
    url = str(tmp_path / "resume")
    for step in (60, 80):
        Points(url).save(point(step))
    flip(tmp_path / "resume" / of_steps(80)[2], -3)
    points = Points(url)
    assert_equal(points.load(), point(60))
    points.save(point(65))
    assert names(url) == of_steps(60, 65)
    assert_equal(Points(url).load(), point(65))
    points.save(point(70))
    assert names(url) == of_steps(65, 70)


def test_what_killed_writers_left_goes(tmp_path):
    points = Points(str(tmp_path))
    for step in (10, 20):
        points.save(point(step))
    for name in (of_steps(15)[2], of_steps(25)[0]):  # without a pointer
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / f"{storage.TMP_PREFIX}0-step").write_bytes(b"x")
    assert_equal(Points(str(tmp_path)).load(), point(20))
    points.save(point(30))
    assert sorted(p.name for p in tmp_path.iterdir()) == of_steps(20, 30)


# --- Damage ---


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, Path, Path], object]] = {
    "a bit of the tensors": lambda curve, pointer, tensors: flip(tensors, -3),
    "a bit of the curves": lambda curve, pointer, tensors: flip(curve, 40),
    "a short end": lambda curve, pointer, tensors: tensors.write_bytes(tensors.read_bytes()[:-8]),
    "lost tensors": lambda curve, pointer, tensors: tensors.unlink(),
    "lost curves": lambda curve, pointer, tensors: curve.unlink(),
    "half a pointer": lambda curve, pointer, tensors: pointer.write_text('{"step": 2'),
    "no object": lambda curve, pointer, tensors: pointer.write_text("[1]"),
    "another step": lambda curve, pointer, tensors: replace(pointer, '"step": 20', '"step": 28'),
    "another run": lambda curve, pointer, tensors: replace(pointer, '"two"', '"twp"'),
    "another key": lambda curve, pointer, tensors: replace(pointer, '"files"', '"filez"'),
}


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_point_is_passed_over(tmp_path, damage, caplog):
    points = Points(str(tmp_path))
    points.save(point(10))
    points.save(point(20))
    DAMAGE[damage](*(tmp_path / name for name in of_steps(20)))
    assert_equal(points.load(), point(10))
    assert "passed over" in caplog.text
    assert points.generation == 1


def test_every_flipped_bit_of_a_pointer_is_seen(tmp_path):
    """One bit in each byte; a point is as it was, or it is passed over."""
    Points(str(tmp_path)).save(point(20))
    place = tmp_path / of_steps(20)[1]
    data = place.read_bytes()
    for i in range(len(data)):
        changed = bytearray(data)
        changed[i] ^= 1 << i % 8
        place.write_bytes(changed)
        found, damaged = resume._newest(str(tmp_path))
        assert (found is None) == bool(damaged)
        if found is not None:  # white space
            assert json.loads(changed) == json.loads(data)
            assert_equal(found, point(20))


def test_a_kill_before_the_pointer_is_no_damage(tmp_path, caplog):
    points = Points(str(tmp_path))
    points.save(point(10))
    points.save(point(20))
    (tmp_path / of_steps(20)[1]).unlink()
    assert_equal(points.load(), point(10))
    assert "passed over" not in caplog.text


def test_a_new_generation_begins_if_all_points_are_damaged(tmp_path, caplog):
    url, run = str(tmp_path / "runs/resume/g"), str(tmp_path / "runs/one")
    points = Points(url)
    for step in (10, 20):
        points.save(point(step))
        flip(tmp_path / "runs/resume/g" / of_steps(step)[2], -1)
    curves.Curves(run, rows(25))  # ahead of the points
    before = storage.read_bytes(storage.join(run, "metrics.jsonl"))
    again = Points(url)
    assert again.load([run, str(tmp_path / "runs/two")]) is None
    assert "set aside" in caplog.text
    assert storage.read_bytes(storage.join(url, "set-aside-1/one/metrics.jsonl")) == before
    assert names(url) == ["generation-2.json", "set-aside-1", *of_steps(10, 20)]
    # So it stays, however often it is killed before its first point.
    for _ in range(2):
        fresh = Points(url)
        assert fresh.load([run]) is None
        history = fresh.history()
        assert history == again.history()
    assert history["generation"] == 2
    (aside,) = history["set_aside"]
    assert [p["point"] for p in aside["points"]] == [f"step-{s:012d}" for s in (20, 10)]
    assert all("is damaged" in p["reason"] for p in aside["points"])
    fresh.save(point(4))
    assert_equal(Points(url).load([run]), point(4))
    assert resume.flight(url).run_ids == ("one", "two")
    flip(tmp_path / "runs/resume/g/generation-2" / of_steps(4)[0], 3)
    third = Points(url)
    assert third.load([run]) is None
    assert [a["generation"] for a in third.history()["set_aside"]] == [1, 2]
    resume.clear(url)
    assert not (tmp_path / "runs/resume").exists()


# --- A storage that fails ---


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_proxy.Proxy]:
    monkeypatch.setenv("SAEV_PATIENCE_S", "0.2")
    with s3_proxy.before(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def two(s3: str) -> str:
    """A folder with two intact points."""
    url = f"{s3}/{uuid.uuid4().hex}/resume/g"
    for step in (10, 20):
        Points(url).save(point(step))
    return url


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time goes by while waiting only; holds all waits."""
    waits: list[float] = []
    monkeypatch.setattr(resume, "monotonic", lambda: sum(waits))
    monkeypatch.setattr(resume, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("what", [".json", ".safetensors", ".curves.jsonl", "list"])
def test_a_denied_read_changes_nothing(two, proxy, what, clock, caplog):
    """A 403 says nothing about the bytes: nothing is passed over, nothing begins anew."""
    before = names(two)
    on = [True]

    def deny(request: s3_proxy.Request) -> s3_proxy.Fault:
        listing = request.method == "GET" and "list-type=2" in request.path
        hit = listing if what == "list" else request.path.endswith(what) and "/step" in request.path
        return "403" if on[0] and hit else ""

    proxy.fault = deny
    with pytest.raises(StorageError, match="Nothing is lost: the same command"):
        Points(two, Patience(60, 30)).load()
    assert clock == [30, 30]
    assert len(re.findall("Waiting for", caplog.text)) == 2
    assert "passed over" not in caplog.text
    on[0] = False
    assert names(two) == before
    assert_equal(Points(two).load(), point(20))


def runs_in_flight(two: str) -> tuple[str, ...]:
    """As planning sees the group whose folder is ``two``, which may be of another sweep."""
    return earlier._Root(storage.parent(storage.parent(two))).in_flight("g").run_ids


def test_planning_waits_for_a_group_in_flight(two, proxy, clock, caplog):
    left = [3]

    def deny(request: s3_proxy.Request) -> s3_proxy.Fault:
        hit = request.path.endswith("20.json") and left[0] > 0
        left[0] -= hit
        return "403" if hit else ""

    proxy.fault = deny
    assert runs_in_flight(two) == ("one", "two")
    assert clock
    assert "Waiting for" in caplog.text


@pytest.mark.parametrize("what", [".json", "list"])
def test_planning_does_not_pass_over_a_group_that_it_cannot_read(two, proxy, clock, what):
    """Its SAEs would be trained from the start, beside those in flight."""

    def deny(request: s3_proxy.Request) -> s3_proxy.Fault:
        hit = "list-type=2" in request.path if what == "list" else ".json" in request.path
        return "403" if hit else ""

    proxy.fault = deny
    with pytest.raises(
        StorageError, match=r"tried for 10 minutes\. Nothing is lost: the same comm"
    ):
        runs_in_flight(two)
    assert sum(clock) == 600


def test_an_outage_is_waited_for(two, proxy, clock, caplog):
    left = [7]

    def fail(request: s3_proxy.Request) -> s3_proxy.Fault:
        left[0] -= 1
        return "403" if left[0] >= 0 else ""

    proxy.fault = fail
    assert_equal(Points(two).load(), point(20))
    assert 1 <= len(clock) <= 7
    assert "up to 10.0 minutes more" in caplog.text


@pytest.mark.slow
def test_an_outage_longer_than_the_retries(two, proxy, caplog):
    """Connections break until nobody waits any more; then all is as it was."""
    proxy.fault = lambda request: "reset"
    with pytest.raises(StorageError, match="the same command continues from the last"):
        Points(two, Patience(0.0, 0.0)).load()
    proxy.fault = lambda request: ""
    assert_equal(Points(two).load(), point(20))


def test_waiting_is_said_every_half_minute_for_ten(clock, caplog):
    def fail() -> None:
        raise StorageError("Cannot read x: permission denied.")

    with pytest.raises(StorageError, match=r"permission denied\. It was tried for 10 minutes"):
        resume.patiently(fail, "x")
    assert clock == [30] * 20
    assert len(caplog.records) == 20


def test_tensors_that_a_listing_misses_once_are_there(two, monkeypatch):
    """Only what is missing from a second listing too is lost."""
    calls, original = [0], storage.list_dir

    def list_dir(url: str, **kwargs: bool) -> list[storage.Entry]:
        entries = original(url, **kwargs)
        calls[0] += 1
        return [e for e in entries if calls[0] != 2 or not e.name.endswith(".safetensors")]

    monkeypatch.setattr(storage, "list_dir", list_dir)
    found, damaged = resume._newest(two)
    assert calls[0] == 3
    assert not damaged
    assert_equal(found, point(20))


# --- Curves ---


@pytest.mark.parametrize("root", ["local", "memory://curves-test"])
@pytest.mark.parametrize("n_there", [0, 3, 8])
def test_curves_are_those_of_the_point(tmp_path, root, n_there):
    """Whether the run folder was ahead of the point (of 5 rows) or behind it."""
    url = storage.join(str(tmp_path) if root == "local" else root, str(n_there))
    wrong = rows(n_there)
    wrong.metrics[-1:] = [{"step": 77, "train/loss": 0.0}] if n_there else []
    old = curves.Curves(url, wrong)
    if n_there:
        old.add({"step": 99, "train/loss": 5.0}, {})
    old.flush()
    second = curves.Curves(url, rows(5))
    assert lines(url, "metrics.jsonl") == rows(5).metrics
    assert lines(url, "timings.jsonl") == rows(5).timings
    second.add({"step": 12, "train/loss": 0.5}, {"loader/wait_s": 0.2})
    second.flush()
    second.flush()
    assert lines(url, "metrics.jsonl")[5:] == [{"step": 12, "train/loss": 0.5}]
    if root == "local":
        events = EventAccumulator(storage.join(url, "tb"))
        events.Reload()
        found = [(e.step, pytest.approx(e.value)) for e in events.Scalars("train/loss")]
        assert found == [*((s, 1 / s) for s in (2, 4, 6, 8, 10)), (12, 0.5)]
    curves.Curves(url)  # a new generation
    assert not storage.exists(storage.join(url, "metrics.jsonl"))
    assert names(storage.join(url, "tb")) == []


def lines(url: str, name: str) -> list[dict]:
    return [json.loads(line) for line in storage.read_text(storage.join(url, name)).splitlines()]


@pytest.mark.parametrize(("n_there", "n_found"), [(8, 5), (5, 5), (3, 3), (0, 0)])
def test_curves_of_a_point_of_version_0_1_0(tmp_path, n_there, n_found, caplog):
    url = str(tmp_path)
    curves.Curves(url, rows(n_there)).flush()
    assert curves.of_run_folder(url, 5) == rows(n_found)
    assert ("has a gap" in caplog.text) == (n_found < 5)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"st')
    with caplog.at_level(logging.WARNING):
        assert len(curves.of_run_folder(url, 5).metrics) == min(1, n_found)
    assert "is damaged after 1 rows" in caplog.text
