"""Which datasets a firing takes, and which it leaves."""

import logging
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.config
import botocore.session
import pytest
from described import other_digit

from saev import storage
from saev.config.run import RunFile
from saev.config.steps import FireStep
from saev.errors import ConfigError, CorruptDataError, StorageError
from saev.steps import discover, last_word
from saev.steps.discover import Dataset
from saev.steps.fire import Firing, NoRuns

from .places import Place

FILE = RunFile.from_dict({"train": {"n_train": 1000}})
OTHER = RunFile.from_dict({"train": {"n_train": 2000}})


def fire(
    place: Place,
    owner: str = "run",
    *,
    file: RunFile = FILE,
    marker: str = "",
    settle_minutes: float = 0.0,
    limit: int = 10,
) -> list[Dataset]:
    """What one firing takes, for a run that takes it over."""
    config = file.model_dump_json(exclude_unset=True)
    cfg = FireStep(
        root=place.root,
        dataset=place.incoming,
        config=config,
        owner=f"firing-of-{owner}",
        marker=marker,
        settle_minutes=settle_minutes,
        claim_hours=1.0,
        max_datasets=limit,
    )
    firing = Firing(cfg, NoRuns())
    firing.run()
    taken = [
        discover.take_over(place.root, run["claim"], run["dataset"], file, owner, 1.0)
        for run in firing.started
    ]
    if taken:
        discover.remember(place.root, owner, taken)
    return taken


def names(datasets: list[Dataset]) -> list[str]:
    return [dataset.name for dataset in datasets]


def process(place: Place, datasets: list[Dataset], owner: str) -> None:
    """As the last steps of a run do."""
    for dataset in datasets:
        discover.check_unchanged(dataset)
        discover.mark_processed(place.root, dataset, owner, {})
    discover.end(place.root, owner, {})


def test_a_prefix_without_objects_has_nothing_new(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """A schedule may be made before the first dataset is there; its firings are no failures."""
    with caplog.at_level(logging.INFO):
        assert fire(place) == []
    assert f"Nothing is below {storage.normalize(place.incoming)} yet." in caplog.text
    place.put("pets/a.png")
    assert names(fire(place)) == ["pets"]


def test_a_missing_bucket_stays_an_error(s3: str, tmp_path: Path) -> None:
    place = Place("s3://no-such-bucket-of-saev/incoming", str(tmp_path))
    with pytest.raises(StorageError, match="there is no bucket no-such-bucket-of-saev"):
        fire(place)


def test_a_missing_dataset_stays_an_error(place: Place) -> None:
    """Of a dataset that a person names, the name is wrong."""
    place.put("cats/a.png")
    missing = storage.join(place.incoming, "pets")
    with pytest.raises(StorageError, match="does not exist"):
        discover.one(place.root, missing, FILE, "run", 1.0)


def test_new_datasets_are_taken_once(place: Place) -> None:
    place.put("a/1.png")
    place.put("b/deep/2.png")
    place.put("README.txt")  # a file beside the datasets is none
    place.put(".hidden/3.png")
    found = fire(place, "one")
    assert names(found) == ["a", "b"]
    assert found[0].url == storage.join(place.incoming, "a")
    process(place, found, "one")
    assert fire(place, "two") == []
    place.put("c/3.png")
    assert names(fire(place, "three")) == ["c"]


def test_another_config_is_other_work(place: Place) -> None:
    place.put("a/1.png")
    process(place, fire(place, "one"), "one")
    assert fire(place, "two") == []
    assert names(fire(place, "three", file=OTHER)) == ["a"]


def test_numbers_that_became_floats_are_the_same_config(place: Place) -> None:
    place.put("a/1.png")
    process(place, fire(place, "one"), "one")
    as_float = RunFile.from_dict({"train": {"n_train": 1000.0}})
    assert fire(place, "two", file=as_float) == []


def test_a_growing_dataset_waits_until_it_has_settled(place: Place) -> None:
    place.put("a/1.png")
    assert fire(place, settle_minutes=60.0) == []
    assert names(fire(place, settle_minutes=0.0)) == ["a"]


def test_a_growing_dataset_is_new_again(place: Place) -> None:
    place.put("a/1.png")
    first = fire(place, "one")
    place.put("a/2.png")
    with pytest.raises(ConfigError, match=r"incoming/a has changed since it was discovered"):
        process(place, first, "one")
    discover.end(place.root, "one", {})
    second = fire(place, "two")
    assert names(second) == ["a"]
    assert second[0].fingerprint != first[0].fingerprint
    assert second[0].version == "", "other names have other shards anyway"


def test_old_files_that_just_arrived_have_not_settled(tmp_path: Path) -> None:
    """`cp -p` and `rsync -t` keep the time of the last write."""
    place = Place(str(tmp_path / "incoming"), str(tmp_path / "saev"))
    place.put("a/1.png")
    os.utime(tmp_path / "incoming" / "a" / "1.png", (1e9, 1e9))
    assert fire(place, settle_minutes=60.0) == []


def test_a_marker_says_that_a_dataset_is_complete(place: Place) -> None:
    place.put("a/1.png")
    place.put("b/1.png")
    place.put("b/_SUCCESS", b"")
    place.put("c/_SUCCESS", b"")  # nothing in it
    found = fire(place, "one", marker="_SUCCESS", settle_minutes=1e6)
    assert names(found) == ["b"]
    process(place, found, "one")
    time.sleep(0.01)
    place.put("b/_SUCCESS", b"again")
    assert fire(place, "two", marker="_SUCCESS") == [], "the marker is not part of the data"
    place.put("a/_SUCCESS", b"")
    assert names(fire(place, "three", marker="_SUCCESS")) == ["a"]


def test_a_replaced_file_of_the_same_size_is_new_data(place: Place) -> None:
    place.put("a/1.png", b"one")
    first = fire(place, "one")
    process(place, first, "one")
    assert first[0].version == ""
    time.sleep(0.01)  # disks tell the two apart by the time of the last write
    place.put("a/1.png", b"two")
    second = fire(place, "two")
    assert names(second) == ["a"]
    assert second[0].version, "equal names and sizes must not give equal shards"
    again = discover.take_over(
        place.root, discover.claim_for(second[0], "firing-of-two"), second[0].url, FILE, "two", 1.0
    )
    assert again == second[0], "a step that is retried finds the same"


def test_a_deleted_file_is_new_data_and_a_deleted_dataset_is_gone(place: Place) -> None:
    place.put("a/1.png")
    place.put("a/2.png")
    process(place, fire(place, "one"), "one")
    storage.delete(storage.join(place.incoming, "a", "2.png"))
    changed = fire(place, "two")
    assert names(changed) == ["a"]
    storage.delete(storage.join(place.incoming, "a"), recursive=True)
    with pytest.raises((ConfigError, StorageError)):
        discover.check_unchanged(changed[0])
    discover.end(place.root, "two", {})
    place.put("b/1.png")
    assert names(fire(place, "three")) == ["b"]


def test_two_firings_at_once_share_the_datasets(place: Place) -> None:
    for i in range(6):
        place.put(f"d{i}/1.png")
    barrier = threading.Barrier(4)

    def contend(i: int) -> list[str]:
        barrier.wait()
        return names(fire(place, f"run-{i}"))

    with ThreadPoolExecutor(4) as pool:
        taken = [name for found in pool.map(contend, range(4)) for name in found]
    assert sorted(taken) == [f"d{i}" for i in range(6)]


def test_what_is_being_processed_is_left_alone_until_its_run_ends(place: Place) -> None:
    place.put("a/1.png")
    assert names(fire(place, "one")) == ["a"]
    assert fire(place, "two") == []
    record = discover.end(place.root, "one", {"state": "FAILED"})
    assert record["failed"] == ["a"]
    assert names(fire(place, "three")) == ["a"]


def test_a_failed_run_leaves_the_others_done(place: Place) -> None:
    place.put("a/1.png")
    place.put("b/1.png")
    found = fire(place, "one")
    discover.mark_processed(place.root, found[1], "one", {})
    record = discover.end(place.root, "one", {"state": "FAILED"})
    assert (record["done"], record["failed"]) == (["b"], ["a"])
    assert names(fire(place, "two")) == ["a"]


def test_why_steps_failed_is_in_the_record_of_the_run(place: Place) -> None:
    place.put("a/1.png")
    fire(place, "one")
    word = last_word.LastWord("permanent", "a/1.png is no image")
    last_word.keep(word, place.root, "one", "extract", ["--item", "1"])
    record = discover.end(place.root, "one", {"state": "FAILED"})
    assert record["failures"] == [
        {"step": "extract", "kind": "permanent", "error": "a/1.png is no image"}
    ]
    runs = storage.list_dir(storage.join(place.root, "datasets", "runs"))
    assert [entry.name for entry in runs] == ["one.json"]
    assert discover.end(place.root, "one", {})["failures"] == [], "a retry has failures of its own"


def test_a_limit_leaves_the_rest_to_the_next_firing(place: Place) -> None:
    for name in "abc":
        place.put(f"{name}/1.png")
    assert names(fire(place, "one", limit=2)) == ["a", "b"]
    assert names(fire(place, "two", limit=2)) == ["c"]


def test_datasets_that_always_fail_do_not_starve_the_others(place: Place) -> None:
    for name in "abc":
        place.put(f"{name}/1.png")
    turns = []
    for i in range(3):
        turns += names(fire(place, f"run-{i}", limit=1))
        discover.end(place.root, f"run-{i}", {"state": "FAILED"})
    assert sorted(turns) == ["a", "b", "c"]


def test_a_root_below_the_prefix_is_no_dataset(place: Place) -> None:
    inside = place._replace(root=storage.join(place.incoming, "saev"))
    place.put("a/1.png")
    assert names(fire(inside, "one")) == ["a"]
    assert fire(inside, "two") == []


def test_a_config_without_a_folder_cannot_wait_for_folders(place: Place) -> None:
    place.put("a/1.png")
    file = RunFile.from_dict({"data": {"kind": "fake-img"}})
    with pytest.raises(ConfigError, match="fake-img, which is no folder"):
        fire(place, file=file)


@pytest.mark.slow
def test_ten_thousand_keys(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    n = 10_000
    if place.incoming.startswith("s3://"):
        n = 2_001  # three pages; moto takes minutes for more, which tests/e2e does elsewhere
        bucket, _, prefix = place.incoming.removeprefix("s3://").partition("/")
        config = botocore.config.Config(max_pool_connections=8)
        client = botocore.session.get_session().create_client("s3", config=config)
        put = [
            lambda i=i: client.put_object(Bucket=bucket, Key=f"{prefix}/big/{i:05d}.png", Body=b"x")
            for i in range(n)
        ]
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(one) for one in put]:
                done.result()
    else:
        folder = Path(place.incoming, "big")
        folder.mkdir(parents=True)
        for i in range(n):
            (folder / f"{i:05d}.png").write_bytes(b"x")
    with caplog.at_level(logging.INFO, logger="saev"):
        found = fire(place, "one")
    assert names(found) == ["big"]
    assert f"{n} files" in caplog.text
    process(place, found, "one")
    assert fire(place, "two") == []
    storage.delete(storage.join(place.incoming, "big", f"{n - 1:05d}.png"))
    assert names(fire(place, "three")) == ["big"]


def test_a_person_takes_what_she_names(place: Place) -> None:
    place.put("a/1.png")
    url = storage.join(place.incoming, "a")
    process(place, fire(place, "schedule"), "schedule")
    again = discover.one(place.root, url, FILE, "person", 1.0)
    assert again.name == "a"
    assert fire(place, "schedule-2") == []
    newest = discover.one(place.root, url, FILE, "person-2", 1.0)
    assert newest == again
    assert discover.end(place.root, "person", {})["done"] == ["a"], "it was processed before"


def test_a_named_dataset_must_hold_files(place: Place) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        discover.one(place.root, storage.join(place.incoming, "nowhere"), FILE, "run", 1.0)


def test_images_that_a_config_names_by_itself(place: Place) -> None:
    file = RunFile.from_dict({"data": {"kind": "fake-img", "n_examples": 3}})
    found = discover.one(place.root, "", file, "run", 1.0)
    assert (found.name, found.url) == ("fake-img", "")
    discover.check_unchanged(found)
    with pytest.raises(ConfigError, match="No images"):
        discover.one(place.root, "", FILE, "run", 1.0)


def test_a_damaged_record_of_a_processed_dataset_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To process it once more costs little: what is there is found."""
    place = Place(str(tmp_path / "incoming"), str(tmp_path / "out"))
    place.put("a/1.png")
    process(place, fire(place, "one"), "one")
    assert fire(place, "two") == []
    (record,) = Path(place.root).glob("datasets/*/processed/*.json")
    other_digit(record, "finished")
    found = fire(place, "three")
    assert names(found) == ["a"]
    assert "the dataset is processed once more" in caplog.text
    process(place, found, "three")
    assert fire(place, "four") == []
    shutil.copy(record, record.with_name(f"{'0' * 16}.json"))
    assert not discover.is_processed(place.root, found[0]._replace(key="0" * 16))


@pytest.mark.parametrize("kind", ["seen", "claims/*"])
def test_other_damaged_records_are_named(tmp_path: Path, kind: str) -> None:
    place = Place(str(tmp_path / "incoming"), str(tmp_path / "out"))
    place.put("a/1.png")
    assert fire(place, "one")
    record = max(Path(place.root).glob(f"datasets/*/{kind}/*.json"))  # the claim that counts
    other_digit(record, "first_seen" if kind == "seen" else "expires")
    with pytest.raises(CorruptDataError, match=rf"{record.name} is damaged: .*[Dd]elete it"):
        fire(place, "two")
