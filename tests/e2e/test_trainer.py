"""Training on several machines: Trainer's and JobSet's controllers make the pods, and those run.

A Kubernetes without nodes, in which the processes of this machine stand for pods. Ranks meet
through gloo at the loopback address, as nothing here knows the names of pods.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import typing as tp
import uuid
from collections.abc import Iterator
from pathlib import Path

import compiled
import pytest
from kubelet import DISRUPTED, RUNNING, SUCCEEDED, Kubelet, exited, until
from kubernetes import client, config
from machines import NODE, Machines, ranks
from servers import KubernetesApi, kubernetes_server
from trainer_server import install_crds, trainer_controllers

from pipelines.doctor import machines as doctor
from pipelines.kube import Kube
from pipelines.options import PodOptions
from pipelines.settings import Settings
from saev.errors import LaunchError
from saev.launch import follow, pods, trainjobs
from saev.launch.cluster import Cluster, Me
from saev.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[1]))
from walk import Walk

Json = dict[str, tp.Any]
ROOT = Path(__file__).parents[2]

FAKE = {
    "data": {"kind": "fake-img", "n_examples": 32, "image_size": 64},
    "shards": {"family": "timm", "ckpt": "test_vit/random", "image_size": 64, "layers": [-1]},
    "train": {
        "n_train": 300 * 64, "batch_size": 64, "checkpoint_every": 20, "log_every": 20, "n_val": 16,
        "sae": {"d_sae": 64},
    },
}  # fmt: skip


class Place(tp.NamedTuple):
    """A namespace where saev is installed."""

    admin: client.ApiClient
    namespace: str
    cluster: Cluster
    """As the steps' account sees it."""

    def machines(self, words: tp.Sequence[str] = (), **more: tp.Any) -> trainjobs.Machines:
        """Two machines with a rank each, without GPUs."""
        settings = pods.PodSettings(
            step="train", image="saev:x", gpus=0, cpu="1", memory="1Gi", timeout_seconds=3600
        )
        command = ["python", "-m", "saev.steps.supervisor", "--ranks", "1", *words]
        more = {"work": [*words], "run_id": "run-1", "me": Me("saev-steps", None)} | more
        return trainjobs.Machines(settings, command, n_machines=2, **more)

    def objects(self, kind: str = "jobset") -> list[Json]:
        """What there is of a kind."""
        places = {
            "jobset": ("jobset.x-k8s.io", "v1alpha2", "jobsets"),
            "trainjob": ("trainer.kubeflow.org", "v1alpha1", "trainjobs"),
            "trainingruntime": ("trainer.kubeflow.org", "v1alpha1", "trainingruntimes"),
        }
        group, version, plural = places[kind]
        custom = client.CustomObjectsApi(self.admin)
        return custom.list_namespaced_custom_object(group, version, self.namespace, plural)["items"]


@pytest.fixture(scope="module")
def api() -> Iterator[KubernetesApi]:
    """A Kubernetes with the controllers of Trainer and JobSet, and one node."""
    with contextlib.ExitStack() as stack:
        try:
            api = stack.enter_context(kubernetes_server(prepare=install_crds))
            stack.enter_context(trainer_controllers(api))
        except compiled.Unavailable as error:
            pytest.skip(str(error))
        core = client.CoreV1Api(admin_of(api))
        core.create_node(client.V1Node(metadata=client.V1ObjectMeta(name=NODE)))
        yield api


def admin_of(api: KubernetesApi) -> client.ApiClient:
    return config.new_client_from_config(str(api.kubeconfig))


def installer(api: KubernetesApi, *words: str) -> subprocess.CompletedProcess[str]:
    """`make install` and its like."""
    path = f"{compiled.find(compiled.KUBECTL).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "KUBECONFIG": str(api.kubeconfig), "PATH": path}
    command = [sys.executable, str(ROOT / "k8s" / "install.py"), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def place(api: KubernetesApi) -> Place:
    """A namespace of its own, whose pods have to satisfy the restricted standard."""
    admin, namespace = admin_of(api), f"team-{uuid.uuid4().hex[:8]}"
    core = client.CoreV1Api(admin)
    core.create_namespace({"metadata": {"name": namespace}})
    done = installer(api, "install", "--namespace", namespace, "--overlay", "s3", "--components",
                     "dedicated", "trainer")  # fmt: skip
    assert done.returncode == 0, done.stderr
    token = core.create_namespaced_service_account_token(
        "saev-steps", namespace, {"spec": {"audiences": []}}
    )
    steps = client.Configuration()
    steps.host, steps.ssl_ca_cert = api.url, str(api.ca)
    steps.api_key = {"authorization": f"Bearer {token.status.token}"}
    return Place(admin, namespace, Cluster(client.ApiClient(steps), namespace))


def follow_in_background(place: Place, machines: trainjobs.Machines) -> tuple:
    """Returns the thread, and a list that gets the error with which following ends."""
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            trainjobs.run(place.cluster, machines, Progress(quiet=True))
        except BaseException as err:
            ended.append(err)
        else:
            ended.append(None)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended


# --- The pods, as the controllers make them ---


def test_a_rank_that_is_killed_starts_all_anew_and_the_sae_is_that_of_two_ranks_here(
    place: Place, tmp_path: Path
) -> None:
    walk = Walk(str(tmp_path / "machines"), json.dumps(FAKE), tmp_path / "kfp", owner="run-1")
    walk.until("train")
    (slot,) = walk.slots("train")
    words = ["step", "train", "--job", walk.job, "--slot", slot]
    machines = place.machines(words)
    node = Machines(place.admin, place.namespace, tmp_path)
    with node.working():
        thread, ended = follow_in_background(place, machines)
        until(lambda: points(walk.root) > 2, 180)
        first, second = sorted(node.pods, key=lambda pod: pod.index)
        (rank,) = ranks(second)
        os.kill(rank, signal.SIGKILL)
        until(lambda: restarts(place) == (1, 1))
        thread.join(300)
        assert ended == [None], "\n".join(pod.log.read_text() for pod in node.pods)
        until(lambda: not place.objects("trainjob"))  # what has succeeded is deleted
    for pod in node.pods:
        hostname = machines.manifest["metadata"]["name"]
        want = {
            "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(pod.index),
            "PET_MASTER_ADDR": f"{hostname}-node-0-0.{hostname}", "SAEV_RETRIES": "0",
        }  # fmt: skip
        assert {key: pod.env[key] for key in want} == want
        assert pod.command[-len(words) :] == words
        assert "RANK" not in pod.env
    assert len(node.pods) == 4  # each machine twice
    assert "Continuing at step" in node.pods[2].log.read_text() + node.pods[3].log.read_text()
    # The machine that was not hit did not go on alone either.
    assert first.process.returncode != 0

    more = {**FAKE, "train": {**FAKE["train"], "n_ranks": 2}}
    here = Walk(str(tmp_path / "here"), json.dumps(more), tmp_path / "kfp-here", owner="run-2")
    here.until("train")
    here.all_of("train")
    assert results(walk.root) == results(here.root)


def restarts(place: Place) -> tuple[int, int]:
    """How often all machines began anew, and how often because something failed."""
    status = place.objects()[0].get("status", {})
    return status.get("restarts", 0), status.get("restartsCountTowardsMax", 0)


def points(root: str) -> int:
    """The number of resume points that were written, as the newest one is the last."""
    steps = [int(p.stem.split("-")[1]) for p in Path(root).glob("runs/resume/*/step-*.json")]
    return max(steps, default=0) // 20


def results(root: str) -> dict[str, bytes]:
    """The files of the run but those that hold times or places."""
    (run,) = (path.parent for path in Path(root).glob("runs/*/run.json"))
    left_out = {"config.json", "timings.jsonl", "run.json"}
    found = {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name not in left_out and "tb" not in path.parts
    }
    assert "checkpoint/sae.safetensors" in found
    return found


def test_a_machine_gets_what_a_pod_of_a_run_gets(place: Place) -> None:
    """But for what saev/launch/trainjobs.py says: no retries, and its volumes beside these."""
    settings = pods.PodSettings(
        step="train", image="saev:x", gpus=2, cpu="8", memory="64Gi", timeout_seconds=100,
        node_selector={"gpu": "a100"}, tolerations=[{"key": "gpu", "operator": "Exists"}],
        storage_secret="keys", config_map="settings", image_pull_secret="pull", pvc_name="data",
        shm_size="9Gi",
    )  # fmt: skip
    me = Me("saev-steps", None)
    machines = trainjobs.Machines(
        settings, ["python", "x"], n_machines=3, work=["job"], run_id="run-1", me=me
    )
    client.CustomObjectsApi(place.admin).create_namespaced_custom_object(
        "trainer.kubeflow.org", "v1alpha1", place.namespace, "trainjobs",
        machines.manifest, field_validation="Strict",
    )  # fmt: skip
    until(lambda: len(place.cluster.pods(machines.selector)) == 3)
    (made,) = (p for p in place.cluster.pods(machines.selector) if machines.who(p) == "machine 2")
    want = pods.template(settings, ["python", "x"], "run-1", "saev-steps")
    spec, (container,), (wanted,) = (
        made["spec"],
        made["spec"]["containers"],
        want["spec"]["containers"],
    )
    assert want["metadata"]["labels"].items() <= made["metadata"]["labels"].items()
    assert want["metadata"]["annotations"].items() <= made["metadata"]["annotations"].items()
    for key in ("image", "command"):
        assert container[key] == wanted[key]
    assert container["resources"]["limits"] == wanted["resources"]["limits"]
    both = spec["securityContext"] | container["securityContext"]
    assert {key: both[key] for key in wanted["securityContext"]} == wanted["securityContext"]
    env = {one["name"]: one for one in container["env"]}
    retries = {"name": "SAEV_RETRIES", "value": "0"}
    assert {one["name"]: one for one in wanted["env"]} | {"SAEV_RETRIES": retries} == {
        name: one
        for name, one in env.items()
        if name != "JOB_COMPLETION_INDEX" and "PET" not in name
    }
    for key, name in (("volumes", "name"), ("volumeMounts", "name"), ("tolerations", "key")):
        of_both = [(spec, want["spec"]), (container, wanted)]
        (found, right), *_ = ((a[key], b[key]) for a, b in of_both if key in b)
        there = {one.get(name): one for one in found}
        assert all(is_part(one, there[one[name]]) for one in right)
    for key in ("nodeSelector", "imagePullSecrets", "serviceAccountName", "restartPolicy"):
        assert spec[key] == want["spec"][key]
    assert spec["automountServiceAccountToken"] is False
    assert place.objects("trainjob")[0]["spec"]["activeDeadlineSeconds"] == 100


def is_part(want: tp.Any, found: tp.Any) -> bool:
    """Whether it is the same but for what Kubernetes has filled in."""
    if isinstance(want, dict):
        return all(is_part(value, found.get(key)) for key, value in want.items())
    return bool(want == found)


# --- What becomes of them ---


@contextlib.contextmanager
def playing(place: Place, *statuses: Json) -> Iterator[Kubelet]:
    """Give pods these statuses, in the order in which they are made; the last to all others."""
    given = itertools.chain(statuses, itertools.repeat(statuses[-1]))
    kubelet = Kubelet(place.admin, place.namespace, lambda pod: next(given))
    with kubelet.working():
        yield kubelet


def run(place: Place, machines: trainjobs.Machines) -> None:
    trainjobs.run(place.cluster, machines, Progress(quiet=True))


def test_a_failure_for_good_is_not_begun_anew(place: Place) -> None:
    said = "saev: permanent error: there is no layer 99"
    with (
        playing(place, exited(65, said, "node"), RUNNING) as kubelet,
        pytest.raises(
            LaunchError, match=r"machine \d \(permanent\): there is no layer 99"
        ) as caught,
    ):
        run(place, place.machines())
    assert not caught.value.passing
    assert len(kubelet.started) == 2
    assert restarts(place) == (0, 0)


def test_a_failure_that_may_pass_is_begun_anew_three_times_and_the_next_try_replaces_it(
    place: Place,
) -> None:
    machines = place.machines()
    with (
        playing(place, exited(1, "saev: passing error, tried once: no answer", "node")) as kubelet,
        pytest.raises(LaunchError, match=r"\(passing\): no answer") as caught,
    ):
        run(place, machines)
    assert (caught.value.passing, caught.value.spent) == (True, True)
    assert len(kubelet.started) == 2 * (1 + 3)
    (failed,) = place.objects("trainjob")
    with playing(place, SUCCEEDED):
        run(place, machines)
    assert failed["metadata"]["uid"] not in [
        one["metadata"]["uid"] for one in place.objects("trainjob")
    ]


def test_what_is_evicted_begins_anew_and_does_not_count(place: Place) -> None:
    """The others see a rank that is lost, or are asked to stop."""
    lost, stopped = [DISRUPTED, RUNNING], [exited(143, "saev: stopped: …", "node"), RUNNING]
    with playing(place, *lost, *stopped, *lost, *stopped, *lost, RUNNING):
        thread, ended = follow_in_background(place, place.machines())
        until(lambda: place.objects() and restarts(place) == (5, 0), 120)
        place.cluster.delete(trainjobs.TRAIN_JOBS, place.objects("trainjob")[0]["metadata"]["name"])
        thread.join(60)
    assert isinstance(ended[0], LaunchError)
    assert "deleted by somebody else" in str(ended[0])


def test_a_queue_starts_it(place: Place) -> None:
    machines = place.machines(queue="team-queue")
    with playing(place, SUCCEEDED) as kubelet:
        thread, ended = follow_in_background(place, machines)
        until(lambda: bool(place.objects("trainjob")))
        (found,) = place.objects("trainjob")
        assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-queue"
        assert machines.state(found).phase == "waiting"
        until(lambda: bool(place.objects()))
        assert kubelet.started == []
        client.CustomObjectsApi(place.admin).patch_namespaced_custom_object(
            "trainer.kubeflow.org", "v1alpha1", place.namespace, "trainjobs",
            found["metadata"]["name"], {"spec": {"suspend": False}},
        )  # fmt: skip
        thread.join(60)
    assert ended == [None]
    assert len(kubelet.started) == 2


def test_it_is_adopted_and_the_exit_handler_finds_it_by_the_run(place: Place) -> None:
    first, second = place.machines(), place.machines()
    with playing(place, RUNNING):
        made = place.cluster.create(trainjobs.TRAIN_JOBS, first.manifest)
        assert made is not None
        thread, ended = follow_in_background(place, second)
        until(lambda: second.state(place.objects("trainjob")[0]).text == "2 machines train")
        assert [one["metadata"]["uid"] for one in place.objects("trainjob")] == [
            made["metadata"]["uid"]
        ]
        assert follow.stop_all(place.cluster, [trainjobs.TRAIN_JOBS], "run-2", 0) == []
        (name,) = follow.stop_all(place.cluster, [trainjobs.TRAIN_JOBS], "run-1", 60)
        thread.join(60)
    assert name == made["metadata"]["name"]
    assert place.objects("trainjob") == place.objects() == place.cluster.pods(first.selector) == []
    assert isinstance(ended[0], LaunchError)


def test_uninstalling_takes_the_runtime_away(place: Place, api: KubernetesApi) -> None:
    done = installer(api, "uninstall", "--namespace", place.namespace)
    assert done.returncode == 0, done.stderr
    assert "delete  TrainingRuntime/saev-train" in done.stdout
    until(lambda: place.objects("trainingruntime") == [])


def test_the_doctor_finds_it(place: Place, api: KubernetesApi) -> None:
    kube = Kube(Settings(kubeconfig=str(api.kubeconfig)))
    found = list(doctor.findings(kube, place.namespace, PodOptions(train_nodes="2")))
    assert [one.level for one in found] == ["ok", "ok", "ok"]
    elsewhere = list(doctor.findings(kube, "default", PodOptions(train_nodes="2")))
    assert [one.level for one in elsewhere] == ["ok", "fail", "fail"]
    assert "create trainjobs.trainer.kubeflow.org" in elsewhere[2].found
