"""Claims: one owner at a time, whatever happens to it."""

import datetime
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from saev import storage
from saev.errors import ConfigError, CorruptDataError
from saev.progress import Progress, Task
from saev.steps import claims

from .places import Place


def test_one_owner_at_a_time(place: Place) -> None:
    folder = storage.join(place.root, "claims")
    first = claims.take(folder, "a", 1.0)
    assert first is not None
    assert first.number == 1
    assert claims.take(folder, "b", 1.0) is None
    assert claims.release(folder, "b") is False
    assert claims.release(folder, "a") is True
    second = claims.take(folder, "b", 1.0)
    assert second is not None
    assert second.tries == 2
    assert claims.take(folder, "a", 1.0) is None


def test_a_step_that_is_retried_keeps_its_claim(place: Place) -> None:
    folder = storage.join(place.root, "claims")
    first = claims.take(folder, "a", 1.0)
    again = claims.take(folder, "a", 1.0)
    assert first is not None
    assert again is not None
    assert (again.owner, again.tries) == ("a", 1)


def test_an_expired_claim_is_taken_over_and_its_owner_told(place: Place) -> None:
    folder = storage.join(place.root, "claims")
    claims.take(folder, "dead", 1e-9)
    taken = claims.take(folder, "alive", 1.0)
    assert taken is not None
    assert taken.owner == "alive"
    with (
        pytest.raises(ConfigError, match=r"Run dead no longer has the claim .* run alive"),
        claims.held(folder, "dead"),
    ):
        pass
    with claims.held(folder, "alive"):
        pass


def test_a_run_that_ended_may_be_retried_unless_another_took_over(place: Place) -> None:
    folder = storage.join(place.root, "claims")
    claims.take(folder, "a", 1.0)
    claims.release(folder, "a")
    with claims.held(folder, "a"):
        assert claims.take(folder, "b", 1.0) is None
    claims.release(folder, "a")
    claims.take(folder, "b", 1.0)
    with pytest.raises(ConfigError, match="run b"), claims.held(folder, "a"):
        pass


def test_force_takes_from_a_holder(place: Place) -> None:
    folder = storage.join(place.root, "claims")
    claims.take(folder, "a", 1.0)
    assert claims.take(folder, "b", 1.0, force=True) is not None
    found = claims.current(folder)
    assert found is not None
    assert found.owner == "b"


def test_no_number_is_written_twice(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = storage.join(place.root, "claims")
    seen: dict[str, bytes] = {}

    def look() -> None:
        for entry in storage.list_dir(folder):
            data = storage.read_bytes(entry.url)
            assert seen.setdefault(entry.name, data) == data

    claim = claims.take(folder, "a", 1.0)
    look()
    for _ in range(15):
        claim = claims.renew(claim)
        look()
    claims.release(folder, "a")
    look()
    assert claims.take(folder, "b", 1.0).tries == 2
    look()
    assert len(storage.list_dir(folder)) <= 10


def test_a_late_heartbeat_does_not_take_a_claim_back(place: Place) -> None:
    """It has looked, then the run ends or another takes over, then it writes."""
    folder = storage.join(place.root, "claims")
    seen = claims.take(folder, "a", 1.0)
    claims.release(folder, "a")
    assert claims.renew(seen) is None
    assert claims.current(folder).released
    claims.take(folder, "b", 1.0)
    assert claims.renew(seen) is None
    assert claims.current(folder).owner == "b"


def work_on(task: Task) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        task.advance(1)
        time.sleep(0.02)


@pytest.mark.parametrize("loses", ["taken", "released"])
def test_who_lost_a_claim_stops_at_the_next_safe_point(
    place: Place, monkeypatch: pytest.MonkeyPatch, loses: str
) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.05)
    folder = storage.join(place.root, "claims")
    claims.take(folder, "a", 1.0)

    def lose() -> None:
        if loses == "released":
            claims.release(folder, "a")
        while loses == "taken" and claims.take(folder, "b", 1.0, force=True) is None:
            pass

    def hold_and_lose() -> None:
        progress = Progress(quiet=True)
        with claims.held(folder, "a") as holding, progress.task("x", total=None, unit="u") as task:
            progress.safe_point = holding.check
            task.advance(1)
            lose()
            with pytest.raises(ConfigError, match="Run a no longer has the claim"):
                work_on(task)

    with pytest.raises(ConfigError, match="Run a no longer has the claim"):  # at the end as well
        hold_and_lose()
    found = claims.current(folder)
    assert found.owner == ("b" if loses == "taken" else "a")
    assert found.released == (loses == "released")


def test_claims_of_version_0_1_0(place: Place) -> None:
    folder = storage.join(place.root, "claims")
    raw = {"owner": "old", "hours": 1.0, "released": True, "expires": "2026-01-01T00:00:00+00:00"}
    storage.write_json(storage.join(folder, "000003.json"), raw)
    taken = claims.take(folder, "a", 1.0)
    assert (taken.number, taken.tries) == (4, 4)


@pytest.mark.parametrize("state", ["free", "expired", "released"])
def test_of_many_contenders_one_wins(place: Place, state: str) -> None:
    folder = storage.join(place.root, "claims")
    if state != "free":
        claims.take(folder, "before", 1e-9 if state == "expired" else 1.0)
    if state == "released":
        claims.release(folder, "before")
    barrier = threading.Barrier(8)

    def contend(i: int) -> bool:
        barrier.wait()
        return claims.take(folder, f"run-{i}", 1.0) is not None

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(contend, range(8)))
    assert sum(won) == 1
    found = claims.current(folder)
    assert found is not None
    assert found.owner == f"run-{won.index(True)}"


def test_it_is_renewed_while_work_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = storage.join(place.root, "claims")
    claims.take(folder, "a", 1.0)
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.05)
    with claims.held(folder, "a"):
        before = claims.current(folder)
        assert before is not None
        storage.write_json(  # as if long ago
            before.url,
            {"owner": "a", "hours": 1.0, "released": False, "expires": "2026-01-01T00:00:00+00:00"},
        )
        deadline = time.monotonic() + 30
        while not (now := claims.current(folder)) or not now.is_held:
            assert time.monotonic() < deadline, "it was not renewed"
            time.sleep(0.05)
    assert now.expires > datetime.datetime.now(datetime.UTC)


def test_a_damaged_claim_is_named(place: Place) -> None:
    folder = storage.join(place.root, "claims")
    storage.write_json(storage.join(folder, "000001.json"), {"owner": "a"})
    with pytest.raises(CorruptDataError, match=r"000001\.json is no claim"):
        claims.take(folder, "b", 1.0)
