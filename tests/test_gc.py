"""saev gc: what is listed, what is kept and why, and that a deletion may stop at any instant."""

import datetime
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from described import list_again

from saev import cli, gc, run, storage
from saev.config.gc import GcConfig
from saev.config.run import RunConfig
from saev.errors import ConfigError, StorageError
from saev.gc import facts, remove
from saev.gc.choose import Item, choose
from saev.gc.scan import scan
from saev.steps import claims, discover

DAY = 86_400.0

FILE = """
[data]
kind = "fake-img-seg"
n_examples = 12
image_size = 32

[shards]
family = "timm"
ckpt = "test_vit/random"
image_size = 32
layers = [-1]
max_tokens_per_shard = 30

[train]
tag = "first"
n_train = 60
sae.d_sae = 32
checkpoint_every = 1
train_data.val_fraction = 0.25

[visuals]
n_latents = 1

[sweep.sae.activation]
top_k = [2, 4]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root in which everything is complete."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "run.toml").write_text(FILE)
    run.run(RunConfig(config=str(folder / "run.toml"), root=str(folder / "root")))
    return folder / "root"


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "root"))


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def anywhere(request: pytest.FixtureRequest, root: Path) -> str:
    """A copy of it on each kind of storage."""
    if request.param == "local":
        return str(root)
    bucket = "memory://" if request.param == "memory" else request.getfixturevalue("s3")
    url = storage.join(bucket, uuid.uuid4().hex)
    for o in sorted(storage.walk(root)):
        storage.write_bytes(storage.join(url, o.key), (root / o.key).read_bytes())
    return url


def look(root: Path | str, *, days: float = 3, **flags: object) -> list[Item]:
    """What the command would find in some days."""
    cfg = GcConfig.from_dict({"root": str(root), **flags})
    return choose(cfg, facts.gather(scan(cfg.root)), time.time() + days * DAY)


def going(root: Path | str, **kwargs: object) -> dict[str, str]:
    """Kind by path below the root, of what may be deleted."""
    base = storage.normalize(root)
    items = look(root, **kwargs)  # type: ignore[arg-type]
    return {i.url.removeprefix(base + "/"): i.kind for i in items if not i.kept}


def kept(root: Path | str, **kwargs: object) -> dict[str, str]:
    """Reason by path below the root, of what is kept."""
    base = storage.normalize(root)
    items = look(root, **kwargs)  # type: ignore[arg-type]
    return {i.url.removeprefix(base + "/"): i.kept for i in items if i.kept}


def the_shards(root: Path | str) -> str:
    """Name of the one shards folder."""
    (entry,) = storage.list_dir(storage.join(root, "shards"))
    return entry.name


def the_runs(root: Path | str) -> list[str]:
    """Names of the run folders."""
    return [e.name for e in storage.list_dir(storage.join(root, "runs")) if e.name != "resume"]


def forget(root: Path | str, *keys: str) -> None:
    """Delete files."""
    for key in keys:
        storage.delete(storage.join(root, key))


def keys(root: Path | str) -> list[str]:
    """All files."""
    return [o.key for o in sorted(storage.walk(root, temporary=True))]


def interrupted(root: Path | str, name: str) -> None:
    """Make a run one that was stopped while it trained, with a resume point."""
    for o in sorted(storage.walk(storage.join(root, "runs", name))):
        if o.key not in ("metrics.jsonl", "timings.jsonl"):
            forget(root, f"runs/{name}/{o.key}")
    point = storage.join(root, "runs/resume/0123456789ab/step-000000000001")
    storage.write_bytes(f"{point}.safetensors", b"x" * 100)
    storage.write_json(f"{point}.json", {"step": 1, "meta": {"run_ids": [name]}})


# --- What is listed ------------------------------------------------------------------------


def test_nothing_is_wrong_with_what_is_complete(anywhere: str) -> None:
    assert look(anywhere) == []
    assert look(anywhere, incomplete=True) == []


def test_what_unfinished_work_leaves(anywhere: str) -> None:
    complete = the_shards(anywhere)
    first, second = the_runs(anywhere)
    (results,) = storage.list_dir(storage.join(anywhere, "runs", first, "inference"))
    begun = "0" * 16
    for key in (
        f"shards/{begun}/metadata.json",
        f"shards/{begun}/acts000000.bin",
        f"shards/{begun}/parts/acts000000.bin.part",
        f"shards/{complete}/parts/acts000000.bin.part",
        f"runs/{first}/inference/{results.name}/parts/000000.json",
        f"runs/{first}/inference/{begun}/config.json",
        "runs/notes/mine.txt",  # not ours
        "shards/README",
    ):
        storage.write_text(storage.join(anywhere, key), "{}")
    interrupted(anywhere, second)
    found = going(anywhere)
    assert found == {
        f"shards/{begun}": "shards",
        f"shards/{complete}/parts": "parts",
        f"runs/{first}/inference/{results.name}/parts": "parts",
        f"runs/{first}/inference/{begun}": "inference",
        f"runs/{second}": "run",
        "runs/resume/0123456789ab": "resume",
    }
    order = list(found)
    assert order.index("runs/resume/0123456789ab") < order.index(f"runs/{second}")
    assert going(anywhere, days=0) == {}  # a writer may be at work
    assert set(kept(anywhere, days=0)) == set(found)
    assert "within the grace of 24h" in kept(anywhere, days=0)[f"shards/{begun}"]
    assert look(anywhere, older_than="5d", incomplete=True) == []

    gc.clean_up(GcConfig(root=anywhere, grace="0m", delete=True, incomplete=True, yes=True))
    assert look(anywhere) == []
    assert {"runs/notes/mine.txt", "shards/README"} <= set(keys(anywhere))
    assert storage.exists(storage.join(anywhere, "runs", first, "run.json"))


def test_resume_points_of_complete_runs_are_left_over(root: Path) -> None:
    runs = the_runs(root)
    point = root / "runs" / "resume" / "0123456789ab" / "step-000000000001.json"
    storage.write_json(point, {"step": 1, "meta": {"run_ids": runs}})
    assert going(root) == {"runs/resume/0123456789ab": "resume"}
    storage.write_json(point, {"step": 1, "meta": {"run_ids": [*runs, "f" * 12]}})
    (item,) = look(root)
    assert (item.state, item.reason) == ("incomplete", "of 1 unfinished runs")


def test_a_run_is_as_fresh_as_its_resume_points_and_the_other_way_round(root: Path) -> None:
    first = the_runs(root)[0]
    interrupted(root, first)
    now = time.time()
    for fresh in (
        "runs/resume/0123456789ab/step-000000000001.json",
        f"runs/{first}/metrics.jsonl",
    ):
        facts_ = facts.gather(_aged(scan(str(root)), fresh, now))
        items = choose(GcConfig(root=str(root)), facts_, now)
        assert {i.kind for i in items} == {"run", "resume"}
        assert all(i.kept for i in items)


def _aged(snapshot, fresh: str, now: float):
    """A snapshot in which everything is three days old, but for one file."""

    def age(folder):
        objects = [
            o._replace(changed=now if f"{folder.url}/{o.key}".endswith(fresh) else now - 3 * DAY)
            for o in folder.objects
        ]
        return type(folder).of(folder.url, objects)

    return snapshot._replace(
        **{
            kind: {name: age(folder) for name, folder in getattr(snapshot, kind).items()}
            for kind in ("shards", "runs", "resume")
        }
    )


# --- What a complete run refers to ---------------------------------------------------------


def test_shards_of_a_complete_run_are_kept(anywhere: str) -> None:
    name = the_shards(anywhere)
    reason = f"run {min(the_runs(anywhere))} refers to it"
    assert going(anywhere, shards=(name,)) == {}
    assert kept(anywhere, shards=(name,)) == {f"shards/{name}": reason}
    forget(anywhere, f"shards/{name}/shards.json")  # even if they look unfinished
    assert going(anywhere) == going(anywhere, incomplete=True) == {}
    assert kept(anywhere) == {f"shards/{name}": reason}


def test_old_shards_of_a_run_that_stays_are_kept(root: Path) -> None:
    first, second = the_runs(root)
    now = time.time()
    snapshot = _aged(scan(str(root)), f"runs/{first}/run.json", now)
    items = choose(GcConfig(root=str(root), older_than="2d"), facts.gather(snapshot), now)
    assert [(i.kind, storage.name(i.url), i.kept) for i in items] == [
        ("run", second, ""),
        ("shards", the_shards(root), f"run {first} refers to it"),
    ]


@pytest.mark.parametrize("side", ["train_data", "val_data", "inference", "hash"])
def test_every_reference_counts(root: Path, side: str) -> None:
    name, other = the_shards(root), "a" * 16
    first = the_runs(root)[0]
    shutil.copytree(root / "shards" / name, root / "shards" / other)
    (results,) = (root / "runs" / first / "inference").iterdir()
    place = (
        results / "config.json"
        if side in ("inference", "hash")
        else root / "runs" / first / "config.json"
    )
    raw = json.loads(place.read_text())
    if side == "hash":
        raw["shards_hash"] = other
    else:
        target = raw["config"]["data"] if side == "inference" else raw[side]
        target["shards"] = f"s3://elsewhere/mirror/{other}"  # the same content at another URL
    place.write_text(json.dumps(raw))
    list_again(place, "metrics.json" if side in ("inference", "hash") else "run.json")
    assert kept(root, shards=(other,)) == {f"shards/{other}": f"run {first} refers to it"}
    assert going(root, shards=(other,)) == {}


def other_shards(text: str) -> str:
    """A config that names other shards, as after a flipped bit."""
    assert "/shards/" in text
    return text.replace("/shards/", "/shards/0")


@pytest.mark.parametrize("broken", [lambda text: "{", other_shards])
def test_shards_are_kept_while_a_complete_run_cannot_be_read(
    root: Path, broken: Callable[[str], str]
) -> None:
    other = "a" * 16
    shutil.copytree(root / "shards" / the_shards(root), root / "shards" / other)
    assert going(root, shards=(other,)) == {f"shards/{other}": "shards"}
    place = root / "runs" / the_runs(root)[0] / "config.json"
    place.write_text(broken(place.read_text()))
    assert "does not say which shards" in kept(root, shards=(other,))[f"shards/{other}"]


def test_shards_are_kept_while_something_may_be_training_on_them(root: Path) -> None:
    other, first = "a" * 16, the_runs(root)[0]
    shutil.copytree(root / "shards" / the_shards(root), root / "shards" / other)
    interrupted(root, first)
    now = time.time()
    snapshot = _aged(scan(str(root)), f"runs/{first}/metrics.jsonl", now)
    cfg = GcConfig(root=str(root), shards=(other,))
    (item,) = choose(cfg, facts.gather(snapshot), now)
    assert item.kept == f"run {first} may be training on it"


def test_old_runs_go_before_their_shards(anywhere: str) -> None:
    name, runs = the_shards(anywhere), the_runs(anywhere)
    assert going(anywhere, older_than="5d") == {}
    found = going(anywhere, older_than="2d")
    assert found == {**{f"runs/{r}": "run" for r in runs}, f"shards/{name}": "shards"}
    assert list(found)[-1] == f"shards/{name}"
    gc.clean_up(GcConfig(root=anywhere, older_than="0m", grace="0m", delete=True, yes=True))
    left = keys(anywhere)
    assert [key for key in left if key.startswith(("runs/", "shards/"))] == []
    assert "index.html" in left
    assert runs[0] not in storage.read_text(storage.join(anywhere, "index.html"))


def test_another_programs_page_is_not_replaced(root: Path) -> None:
    (root / "index.html").write_text("<title>My site</title>")
    gc.clean_up(GcConfig(root=str(root), older_than="0m", grace="0m", delete=True, yes=True))
    assert not list((root / "runs").glob("*/run.json"))
    assert (root / "index.html").read_text() == "<title>My site</title>"


def test_a_run_that_cannot_be_deleted_keeps_its_shards(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    first, second = the_runs(root)
    delete = storage.delete

    def refuse(url: str, **kwargs: bool) -> None:
        if first not in str(url):
            delete(url, **kwargs)

    monkeypatch.setattr(storage, "delete", refuse)  # as a bulk deletion that S3 denies
    with pytest.raises(StorageError, match=rf"{first}/run.json is still there .* permission"):
        gc.clean_up(GcConfig(root=str(root), older_than="0m", grace="0m", delete=True))
    assert not (root / "runs" / second).exists()
    assert (root / "shards" / the_shards(root) / "shards.json").exists()
    assert "in use" in capsys.readouterr().out


def test_by_tag(root: Path) -> None:
    second = the_runs(root)[1]
    place = root / "runs" / second / "config.json"
    place.write_text(place.read_text().replace('"first"', '"second"'))
    list_again(place, "run.json")
    storage.write_text(root / "shards" / ("0" * 16) / "metadata.json", "{}")
    assert going(root, tag="second") == {f"runs/{second}": "run"}
    assert going(root, tag="second", incomplete=True) == {}
    assert going(root, tag="none") == {}


def test_shards_that_are_not_there(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"no shards folder ffff .* 16 hexadecimal digits"):
        look(root, shards=("ffff",))


# --- Claims --------------------------------------------------------------------------------


def test_what_a_claim_may_be_about_is_kept(root: Path) -> None:
    first = the_runs(root)[0]
    interrupted(root, first)
    images = str(root / "images")
    metadata = {"data": {"kind": "img-folder", "root": images}}
    storage.write_json(root / "shards" / ("0" * 16) / "metadata.json", metadata)
    storage.write_json(
        root / "shards" / ("1" * 16) / "metadata.json", {"data": {"root": "s3://b/x"}}
    )
    every = set(going(root))
    assert {f"shards/{'0' * 16}", f"shards/{'1' * 16}"} <= every

    digest = hashlib.sha256(images.encode()).hexdigest()[:8]
    folder = str(root / "datasets" / f"images-{digest}" / "claims" / "key")
    assert claims.take(folder, "owner", hours=999) is not None
    assert set(going(root)) == {f"shards/{'1' * 16}"}
    assert "claimed" in kept(root)[f"shards/{'0' * 16}"]
    assert "claim" in kept(root)["runs/resume/0123456789ab"]
    claims.release(folder, "owner")
    assert set(going(root)) == every

    storage.write_text(storage.join(folder, "000002.json"), "{")
    assert set(going(root)) == {f"shards/{'1' * 16}"}, "a claim that cannot be read is no claim"


def test_the_claims_folder_is_the_one_that_discovery_uses() -> None:
    base = f"memory://{uuid.uuid4().hex}"
    empty = discover.Dataset(*[""] * len(discover.Dataset._fields))
    dataset = empty._replace(name="images", url="s3://bucket/images", key="k")
    place = discover.claims_of(base, dataset)
    assert claims.take(place, "owner", hours=1) is not None
    storage.write_text(storage.join(base, "runs", "notes"), "")
    held = facts.gather(scan(base)).held
    assert held.of_dataset("s3://bucket/images/")
    assert not held.of_dataset("s3://bucket/other")
    assert held.of_dataset("")
    assert claims.release(place, "owner")
    assert facts.gather(scan(base)).held == facts.Held(frozenset())
    expired = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    claim = {"owner": "x", "expires": expired.isoformat(), "hours": 1, "released": False}
    storage.write_json(storage.join(place, "000002.json"), claim)
    assert facts.gather(scan(base)).held == facts.Held(frozenset())


# --- Deleting ------------------------------------------------------------------------------


def test_nothing_is_deleted_without_delete(root: Path) -> None:
    storage.write_text(root / "shards" / ("0" * 16) / "metadata.json", "{}")
    before = keys(root)
    gc.clean_up(GcConfig(root=str(root), grace="0m", older_than="0m"))
    assert keys(root) == before


def test_what_changed_since_it_was_listed_stays(anywhere: str) -> None:
    place = storage.join(anywhere, "shards", "0" * 16)
    storage.write_text(storage.join(place, "metadata.json"), "{}")
    (item,) = look(anywhere)
    storage.write_text(storage.join(place, "acts000000.bin"), "someone went on")
    assert remove.remove(item) == "changed"
    assert storage.exists(storage.join(place, "metadata.json"))
    storage.delete(place, recursive=True)
    assert remove.remove(item) == "gone"


def test_a_link_and_what_it_leads_to_stay(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    storage.write_text(outside / "metadata.json", "{}")
    (root / "shards" / ("0" * 16)).symlink_to(outside)
    assert kept(root) == {f"shards/{'0' * 16}": "a symbolic link"}
    (root / "shards" / ("1" * 16)).mkdir()
    (root / "shards" / ("1" * 16) / "data").symlink_to(outside)
    gc.clean_up(GcConfig(root=str(root), grace="0m", delete=True))
    assert not (root / "shards" / ("1" * 16)).exists()
    assert (outside / "metadata.json").exists()


WRITER = """
import sys
from saev import storage
with storage.open_write(sys.argv[1]) as out:
    out.write(b"x")
    out.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_temporary_files_go_when_they_are_old_and_their_writer_is_dead(root: Path) -> None:
    name = the_shards(root)
    place = root / "shards" / name / "labels.bin"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    assert list(going(root).values()) == ["temporary"]
    assert going(root, days=0) == {}
    cfg = GcConfig(root=str(root), grace="0m", delete=True)
    gc.clean_up(cfg)
    assert list(going(root).values()) == ["temporary"], "its writer lives"
    writer.kill()
    writer.communicate()
    gc.clean_up(cfg)
    assert going(root) == {}
    assert place.exists()


@pytest.mark.slow
def test_an_interruption_at_any_instant_leaves_nothing_that_looks_complete(
    root: Path, tmp_path: Path, forker
) -> None:
    """Kill the command before each name that it removes; then run it again."""
    command = ["gc", "--root", "?", "--older-than", "0m", "--grace", "0m", "--delete"]
    n = 0
    while True:
        victim = Path(shutil.copytree(root, tmp_path / f"victim{n}"))
        command[2] = str(victim)
        ended = forker.run(command, die_at=n)
        if ended.status == 0:
            break
        assert ended.status == -9
        whole = set(keys(root))
        for closing in ("shards.json", "run.json"):
            for found in victim.rglob(closing):
                below = str(found.parent.relative_to(victim)) + "/"
                assert {k for k in whole if k.startswith(below)} <= set(keys(victim)), below
        # Shards that a complete run refers to are whole.
        if any(victim.glob("runs/*/run.json")):
            assert any(victim.glob("shards/*/shards.json"))
        again = forker.run(command)
        assert again.status == 0, again.stderr
        assert [k for k in keys(victim) if k.startswith(("runs/", "shards/"))] == []
        shutil.rmtree(victim)
        n += 1 if n < 4 else 12
    assert n > 20


# --- As a command --------------------------------------------------------------------------


def command(*argv: str, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    """Status, standard output and standard error of `saev gc`."""
    capsys.readouterr()
    try:
        cli.main(["gc", *argv])
        status = 0
    except SystemExit as err:
        status = err.code if isinstance(err.code, int) else 1
    out, err = capsys.readouterr()
    return status, out, " ".join(err.split())


def test_table_and_json(root: Path, capsys: pytest.CaptureFixture) -> None:
    storage.write_text(root / "shards" / ("0" * 16) / "metadata.json", "{}")
    status, out, _ = command("--root", str(root), "--grace", "0m", capsys=capsys)
    assert status == 0
    assert f"shards/{'0' * 16}" in out
    assert "no shards.json" in out
    status, out, _ = command("--root", str(root), "--json", capsys=capsys)
    assert status == 0
    raw = json.loads(out)
    (item,) = raw["items"]
    assert item["kept"].startswith("changed")
    assert raw["n_bytes"] == 0
    _, out, _ = command("--root", str(root), "--grace", "0m", "--json", "--delete", capsys=capsys)
    raw = json.loads(out)
    assert (raw["items"][0]["outcome"], raw["n_bytes"]) == ("deleted", 2)
    _, out, _ = command("--root", str(root), capsys=capsys)
    assert out.startswith("Nothing to delete")


@pytest.mark.parametrize("answer", ["y\n", "n\n", ""])
def test_a_person_is_asked(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, answer: str
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    place = root / "shards" / ("0" * 16) / "metadata.json"
    storage.write_text(place, "{}")
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    status, out, err = command("--root", str(root), "--grace", "0m", "--delete", capsys=capsys)
    assert status == 0
    assert "Delete these 1 (2 B)?" in err
    assert place.exists() == (answer != "y\n")
    assert ("Nothing was deleted" in out) == (answer != "y\n")


def test_a_root_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, _, err = command("--root", str(tmp_path / "no"), capsys=capsys)
    assert (status, "it does not exist" in err) == (1, True)
    status, _, err = command("--root", str(tmp_path), capsys=capsys)
    assert (status, "holds neither shards nor runs" in err) == (1, True)
    (tmp_path / "shards").write_text("")
    status, _, err = command("--root", str(tmp_path), capsys=capsys)
    assert (status, "a file stands where a folder is needed" in err) == (1, True)
    status, _, err = command("--root", str(tmp_path / "shards"), capsys=capsys)
    assert (status, "shards" in err) == (1, True)


def test_no_permission(root: Path, tmp_path: Path) -> None:
    """A folder that may not be deleted is one clear error, and the others go all the same."""
    for name in ("0" * 16, "1" * 16):
        storage.write_text(root / "shards" / name / "parts" / "x", "{}")
    locked = root / "shards" / ("0" * 16) / "parts"
    locked.chmod(0o500)
    argv = [sys.executable, "-m", "saev", "gc", "--root", str(root), "--grace", "0m", "--delete"]
    if os.getuid() == 0:  # root may do everything, unless it gives that up
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and there is no setpriv to give that up")
        argv = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *argv]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    locked.chmod(0o700)
    assert done.returncode == 1
    assert "permission denied" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (root / "shards" / ("1" * 16)).exists()
    assert (locked / "x").exists()


def test_it_needs_no_torch(root: Path) -> None:
    storage.write_text(root / "shards" / ("0" * 16) / "metadata.json", "{}")
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, *args):\n"
        "        if name.partition('.')[0] == 'torch': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from saev import cli\n"
        f"cli.main(['gc', '--root', {str(root)!r}, '--grace', '0m', '--older-than', '0m', "
        "'--delete'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Deleted 4" in done.stdout
