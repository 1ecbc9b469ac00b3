"""The conformance suite itself: what it starts, what it says, and that it leaves nothing."""

import base64
import contextlib
import gzip
import json
import re
import subprocess
import sys
import threading
import time
import typing as tp
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from compiling import from_short_stack
from conformance import facts, inside, jobs, probes, schedules, table
from conformance.cluster import Cluster
from conformance.table import Failed, NotRun
from kfp_server import KfpServer
from kube_server import KubeServer

from pipelines import arguments, prepare, settings, submit
from pipelines.connect import connect
from saev import storage
from saev.steps import memory
from saev.steps.last_word import LastWord
from saev.steps.supervisor import MODULE, Policy, Supervisor

SUITE = Path(__file__).parents[1] / "conformance"
ENDED = {"phase": "Succeeded", "containerStatuses": []}


def prepared(kube: KubeServer) -> None:
    """Pods end at once and print `null`."""
    kube.pod_statuses, kube.pod_log = [ENDED], "null\n"
    kube.add("serviceaccounts", "saev-steps", "kubeflow")
    kube.add("serviceaccounts", "saev-schedule", "kubeflow")
    kube.add_kfp(8888)


@contextlib.contextmanager
def opened() -> Iterator[Cluster]:
    with connect(settings.load({})) as connection:
        yield Cluster(connection, threading.Event())


@pytest.fixture
def cluster(kfp: KfpServer, kube: KubeServer) -> Iterator[Cluster]:
    """The suite on a KFP and a Kubernetes API."""
    prepared(kube)
    with opened() as found:
        yield found


# --- The probe ---------------------------------------------------------------------------------


def test_the_probe_has_the_pods_of_the_product(home: Path) -> None:
    """Not one like it: what KFP is told of a pod is equal, but for the step's own command."""
    home.joinpath("cluster.toml").write_text(
        '[parameters]\ngpu_count = 0\ncpu = "250m"\nmemory = "512Mi"\n'
        'node_selector = { disk = "ssd" }\n'
    )
    cluster = settings.load({"image": "registry.test/saev:1", "root": "s3://bucket/saev"})
    spec, platform = yaml.safe_load_all(from_short_stack(lambda: probes.compiled(cluster)))
    product, of_product = yaml.safe_load_all(
        prepare.compiled("saev", cluster, prepare.pods(cluster)).text
    )

    def pods(of: dict[str, tp.Any], name: str) -> tp.Any:
        return of["platforms"]["kubernetes"]["deploymentSpec"]["executors"][name]

    assert pods(platform, "exec-first") == pods(of_product, "exec-extract")
    ours = spec["deploymentSpec"]["executors"]["exec-first"]["container"]
    theirs = product["deploymentSpec"]["executors"]["exec-extract"]["container"]
    assert ours["command"][:3] == theirs["command"][:3] == ["python", "-m", MODULE]
    for key in ("env", "image", "resources"):
        assert ours.get(key) == theirs.get(key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "word", "starts"),
    [
        ("none", None, 1),
        ("kill", None, 2),
        ("passing", None, 2),
        ("permanent", LastWord("permanent", "A mistake in the config. Correct it."), 1),
    ],
)
def test_the_probe_meets_its_fault_once(
    tmp_path: Path, fault: str, word: LastWord | None, starts: int
) -> None:
    supervised = probe(tmp_path, fault)
    assert supervised.run() == word
    assert len(storage.list_dir(tmp_path / "starts")) == starts
    assert (tmp_path / "out").exists() == (word is None)


@pytest.mark.slow
def test_the_probe_uses_memory_until_it_is_ended(tmp_path: Path) -> None:
    """The supervisor is told of a limit of 300 MB, and really looks at what the child has."""
    supervised = probe(tmp_path, "memory")

    def look() -> memory.Memory | None:
        child = supervised._child
        if child is None:
            return None
        try:
            pages = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return None
        return memory.Memory(pages * 4096, 300 << 20)

    supervised._look = look
    assert supervised.run() is None
    assert supervised.n_runs == 2


@pytest.mark.slow
def test_the_probe_writes_where_it_is_when_it_is_asked_to_end(tmp_path: Path) -> None:
    supervisor = subprocess.Popen(
        [sys.executable, "-m", MODULE, "--", *command(tmp_path, "wait")], stdout=subprocess.PIPE
    )
    assert supervisor.stdout is not None
    lines = iter(supervisor.stdout.readline, b"")
    assert any(line == b"probe: waits\n" for line in lines)
    supervisor.terminate()
    assert supervisor.wait(30) == 143
    assert (tmp_path / "starts" / "stopped.json").exists()


def probe(tmp_path: Path, fault: str) -> Supervisor:
    return Supervisor(command(tmp_path, fault), Policy(wait_s=0.01), look=lambda: None)


def command(tmp_path: Path, fault: str) -> list[str]:
    words = [fault, str(tmp_path / "starts"), str(tmp_path / "out")]
    return [sys.executable, "-c", inside.code("probe"), *words]


@pytest.mark.slow
def test_the_storages_program(tmp_path: Path) -> None:
    def run(*words: str) -> tp.Any:
        done = subprocess.run(
            [sys.executable, "-c", inside.code("storage"), *words],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1])

    folder = str(tmp_path / "data")
    assert run(folder, "list") == []
    run(folder, "pictures", "3", "2")
    assert [key for key, _ in run(folder, "list")] == ["class-0/00004.png", "class-1/00003.png"]
    run(f"{folder}/_SUCCESS", "write", "yes")
    assert run(f"{folder}/_SUCCESS", "read") == "yes"
    run(folder, "delete")
    assert run(folder, "list") == []


# --- The size of a run ------------------------------------------------------------------------


def test_the_size_of_a_runs_object_is_compared(
    cluster: Cluster, kube: KubeServer, home: Path
) -> None:
    """Also where Argo has compressed its nodes: gzip, in base64."""
    mine = jobs.Jobs(cluster)
    mine.first = "run-1"
    with pytest.raises(NotRun, match="Argo has deleted"):
        mine.size()

    def add(n_bytes: int, *, packed: bool) -> None:
        nodes = {"a": {"name": "x" * n_bytes}, "b": {"name": "y"}}
        text = gzip.compress(json.dumps(nodes).encode())
        status = (
            {"compressedNodes": base64.b64encode(text).decode()} if packed else {"nodes": nodes}
        )
        labels = {"pipeline/runid": "run-1"}
        kube.add("workflows", "saev-1", "kubeflow", labels=labels, spec={}, status=status)

    for packed in (False, True):
        add(400_000, packed=packed)
        assert re.match(r"400 kB in 2 nodes, reckoned 5\d\d kB; n_parts = [45] st", mine.size())
        found = cluster.workflow("run-1")
        assert found is not None
        assert found.is_packed == packed
        add(700_000, packed=packed)
        with pytest.raises(Failed, match="700 kB in 2 nodes, reckoned 5"):
            mine.size()


# --- The cluster -------------------------------------------------------------------------------


def test_what_it_did_not_make_stays(kfp: KfpServer, kube: KubeServer, home: Path) -> None:
    prepared(kube)
    with connect(settings.load({})) as connection:
        other = connection.settings.model_copy(update={"compile": {"parallelism": 2}})
        asked = arguments.Job(config="config.toml")
        job = prepare.job("saev", other, asked, dataset="s3://bucket/x")
        theirs = submit.start(connection, job, "theirs")
    before = kept(kfp)
    with opened() as cluster:
        pipeline = from_short_stack(lambda: probes.compiled(cluster.settings))
        values = {"fault": "none", "folder": "s3://bucket/y"}
        kfp.script = [{"state": "SUCCEEDED"}]
        probed = cluster.start("probe", pipeline, values)
        mine = jobs.Jobs(cluster)
        submitted = cluster.submit("job", "s3://bucket/x", mine.config())
        made = schedules.Incoming(cluster).make(cluster, "0 0 3 1 1 *")
        fired = kfp.add_run(
            "fired", "RUNNING", recurring_run_id=made.recurring_run_id,
            experiment_id=cluster.experiment(),
        )  # fmt: skip
        kfp.scripts[fired["run_id"]] = [{"state": "CANCELED"}]
        assert len(kfp.versions) == 3
        assert {theirs.run_id, probed, submitted} < {run["run_id"] for run in kfp.runs}
        assert cluster.clean() == []
    assert kept(kfp) == before
    assert kfp.killed == [], "a run is canceled before its schedule takes it away"
    assert [pod["metadata"]["name"] for pod in kube.created] == kube.deleted


def kept(kfp: KfpServer) -> list[list[tp.Any]]:
    collections = (kfp.runs, kfp.experiments, kfp.pipelines, kfp.versions, kfp.recurring)
    return [[json.dumps(item, sort_keys=True) for item in items] for items in collections]


def test_a_run_that_fails_is_told_with_its_last_line(
    cluster: Cluster, kfp: KfpServer, kube: KubeServer
) -> None:
    kfp.script = [{"state": "FAILED"}]
    mine = jobs.Jobs(cluster)
    run_id = cluster.submit("job", "s3://bucket/x", mine.config())
    kube.add(
        "pods", "p", "kubeflow", status={"phase": "Failed"}, spec={"containers": []},
        labels={"pipeline/runid": run_id, "app.kubernetes.io/component": "extract"},
    )  # fmt: skip
    kube.logs["p"] = "noise\nsaev: permanent error: Image 7 is broken.\n"
    with pytest.raises(table.Failed, match=r"FAILED.*Image 7 is broken"):
        cluster.succeed(run_id, 1)


def test_a_pod_that_fails_is_told(cluster: Cluster, kube: KubeServer) -> None:
    kube.pod_statuses, kube.pod_log = [{"phase": "Failed"}], "saev: error: No such bucket.\n"
    with pytest.raises(table.Failed, match="No such bucket"):
        cluster.storage("s3://bucket/x", "list")


def test_it_says_which_cluster_it_is(cluster: Cluster, kube: KubeServer) -> None:
    kube.pod_log = '"v2, memory.oom.group 1, limit 2048 MiB"\n'
    text = "\n".join(facts.lines(cluster))
    for fact in ("1.34.4", "2.17.1", "single-user", "cgroup v2", "registry.test/saev:1"):
        assert fact in text


@pytest.mark.slow
def test_without_a_cluster_nothing_is_run(home: Path) -> None:
    done = subprocess.run([sys.executable, SUITE], capture_output=True, text=True, cwd=home)
    assert done.returncode == 2
    assert "image and root are missing" in done.stdout
    assert "Traceback" not in done.stderr


# --- The table ---------------------------------------------------------------------------------


def a_table(*checks: tuple[str, Callable[[], str]], seconds: float = 60.0) -> table.Table:
    lines: list[str] = []
    made = table.Table(lines.append, lambda name: name != "unwanted", time.monotonic() + seconds)
    made.run(*(table.Check(name, do) for name, do in checks))
    assert lines == [str(outcome) for outcome in made.outcomes]
    return made


def fails() -> str:
    raise table.Failed("it is broken", "Mend it.")


def breaks() -> str:
    raise RuntimeError("oh")


def cannot() -> str:
    raise table.NotRun("there is no such thing here")


def test_one_failure_fails_the_suite_and_hides_nothing() -> None:
    made = a_table(("a", fails), ("b", breaks), ("c", lambda: "fine"), ("d", cannot))
    assert not made.is_well
    assert [outcome.level for outcome in made.outcomes] == ["FAIL", "FAIL", "ok", "not run"]
    assert "Mend it." in str(made.outcomes[0])
    assert made.summary == "1 ok, 2 FAIL, 1 not run"


def test_what_was_noted_or_not_run_is_no_failure() -> None:
    made = a_table(("a", cannot), ("b", lambda: table.Noted("odd")), ("c", lambda: "fine"))
    assert made.is_well
    assert [outcome.level for outcome in made.outcomes] == ["not run", "note", "ok"]


def test_who_checked_nothing_found_nothing() -> None:
    assert not a_table(("unwanted", lambda: "fine")).is_well
    late = a_table(("a", lambda: "fine"), seconds=-1)
    assert not late.is_well
    assert late.outcomes[0].level == "not run"
