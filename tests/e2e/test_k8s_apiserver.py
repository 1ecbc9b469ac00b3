"""k8s/ on a real API server: what it accepts, what a step's pod may be and may ask.

Nothing runs here: there is no node. Network policies are stored, not enforced.
"""

import base64
import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import typing as tp
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import compiled
import pytest
import yaml
from servers import KubernetesApi, kubernetes_server

from saev.errors import ClusterError
from saev.launch import cluster as cluster_api
from saev.launch import runs

ROOT = Path(__file__).parents[2]
Json = dict[str, tp.Any]
Done = subprocess.CompletedProcess[str]

# Stable and on by default from Kubernetes 1.36.
MUTATING_POLICIES = (
    "--feature-gates=MutatingAdmissionPolicy=true",
    "--runtime-config=admissionregistration.k8s.io/v1beta1=true",
)


class Cluster:
    """A cluster of a test's own, spoken to with kubectl and with k8s/install.py."""

    def __init__(self, api: KubernetesApi, path: str):
        self._env = {**os.environ, "KUBECONFIG": str(api.kubeconfig), "PATH": path}
        for name in ("KFP_NAMESPACE", "KFP_SYSTEM_NAMESPACE"):
            self._env.pop(name, None)

    def kubectl(self, *arguments: str, stdin: object = None) -> Done:
        """The finished command."""
        return self._run(["kubectl", *arguments], stdin)

    def get(self, *arguments: str) -> Json:
        """An object that must be there."""
        done = self.kubectl("get", *arguments, "-o", "json")
        assert done.returncode == 0, done.stderr
        return tp.cast(Json, json.loads(done.stdout))

    def create(self, content: Json) -> Done:
        """`kubectl create`, in a dry run that runs all admission."""
        return self.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=content)

    def install(self, tree: Path, *arguments: str) -> Done:
        """`make install`, or with a first word its other commands."""
        return self._run([sys.executable, str(tree / "install.py"), *arguments], None)

    def namespace(self) -> str:
        """A new one."""
        name = f"team-{uuid.uuid4().hex[:8]}"
        assert self.kubectl("create", "namespace", name).returncode == 0
        return name

    def _run(self, command: list[str], stdin: object) -> Done:
        text = None if stdin is None else json.dumps(stdin)
        return subprocess.run(
            command, input=text, env=self._env, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster with an empty namespace kubeflow."""
    path = f"{ROOT / '.cache' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    if not shutil.which("kubectl", path=path):
        pytest.skip("kubectl is not installed; tests/k8s/fetch_kubectl.py fetches it")
    with contextlib.ExitStack() as stack:
        try:
            api = stack.enter_context(kubernetes_server(MUTATING_POLICIES))
        except compiled.Unavailable as error:
            pytest.skip(str(error))
        cluster = Cluster(api, path)
        assert cluster.kubectl("create", "namespace", "kubeflow").returncode == 0
        yield cluster


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of k8s/ without anybody's private files."""
    private = shutil.ignore_patterns("config.env", "storage.env", "kfp-launcher.yaml")
    return Path(shutil.copytree(ROOT / "k8s", tmp_path / "k8s", ignore=private))


# --- make install, make uninstall --------------------------------------------------------------


@pytest.mark.parametrize("overlay", ["s3", "pvc", "local"])
def test_install_again_uninstall(cluster: Cluster, tree: Path, overlay: str) -> None:
    space = cluster.namespace()
    words = f"--overlay {overlay} --namespace {space} --image registry/saev:1.2".split()
    if overlay == "s3":
        settings = tree / "components" / "settings" / "config.env"
        settings.write_text("SAEV_ROOT=s3://bucket/saev\n")
        secret = tree / "components" / "storage-secret" / "storage.env"
        secret.write_text("AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n")
    words += ["--components", "dedicated", "explorer", "tensorboard"]

    dry = cluster.install(tree, "install", *words, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "create  Role/saev-steps" in dry.stdout
    assert cluster.kubectl("get", "role", "saev-steps", "-n", space).returncode == 1

    done = cluster.install(tree, "install", *words)
    assert done.returncode == 0, done.stderr
    assert "change  Namespace/" in done.stdout
    labels = cluster.get("namespace", space)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    pods = cluster.get("deployment", "saev-tensorboard", "-n", space)["spec"]["template"]
    assert pods["spec"]["containers"][0]["image"] == "registry/saev:1.2"
    assert (cluster.kubectl("get", "secret", "saev-storage", "-n", space).returncode == 0) == (
        overlay == "s3"
    )

    again = cluster.install(tree, "install", *words)
    assert again.returncode == 0, again.stderr
    assert not {"create", "change"} & {line.split()[0] for line in again.stdout.splitlines()[1:-2]}

    gone = cluster.install(tree, "uninstall", "--namespace", space)
    assert gone.returncode == 0, gone.stderr
    left = cluster.get("sa,role,cm,secret,netpol,quota,limits,pvc,svc", "-n", space)["items"]
    assert {item["metadata"]["name"] for item in left} - {"saev-data"} == {
        "default",
        "kube-root-ca.crt",
    }
    claims = [item for item in left if item["kind"] == "PersistentVolumeClaim"]
    assert len(claims) == (overlay != "s3")
    if claims:
        assert "keep    PersistentVolumeClaim/saev-data" in gone.stdout
        cluster.install(tree, "uninstall", "--namespace", space, "--delete-pvc", "saev-data")
        claim = cluster.kubectl("get", "pvc", "-n", space, "-o", "jsonpath={.items[*]}")
        assert "deletionTimestamp" in claim.stdout or not claim.stdout


def test_what_is_not_given_stays(cluster: Cluster, tree: Path) -> None:
    space = cluster.namespace()
    words = f"install --overlay pvc --namespace {space}".split()
    given = "--gpus 3 --size 2Ti --storage-class shared".split()
    assert cluster.install(tree, *words, *given).returncode == 0
    role = "eks.amazonaws.com/role-arn=arn:aws:iam::1:role/saev"
    assert cluster.kubectl("annotate", "sa", "saev-steps", "-n", space, role).returncode == 0
    done = cluster.install(tree, *words)
    assert done.returncode == 0, done.stderr
    assert "keep    PersistentVolumeClaim/saev-data" in done.stdout
    assert "keep    ResourceQuota/saev-gpus" in done.stdout
    account = cluster.get("sa", "saev-steps", "-n", space)
    assert role.partition("=")[0] in account["metadata"]["annotations"]
    assert cluster.install(tree, *words, "--gpus", "5").returncode == 0
    quota = cluster.get("quota", "saev-gpus", "-n", space)
    assert quota["spec"]["hard"] == {"requests.nvidia.com/gpu": "5"}


def test_settings_stay_where_no_file_says_them_anew(cluster: Cluster, tree: Path) -> None:
    """A colleague's checkout has no config.env, and runs must not lose their object store."""
    space = cluster.namespace()
    words = f"install --namespace {space} --overlay".split()
    file = tree / "components" / "settings" / "config.env"
    file.write_text("SAEV_ROOT=s3://bucket/saev\nAWS_ENDPOINT_URL=http://minio:9000\n")
    assert cluster.install(tree, *words, "s3").returncode == 0
    text = file.read_text()

    def data() -> dict[str, str]:
        return cluster.get("configmap", "saev-config", "-n", space)["data"]

    before = data()
    file.unlink()
    done = cluster.install(tree, *words, "s3")
    assert done.returncode == 0, done.stderr
    assert "keep    ConfigMap/saev-config" in done.stdout
    assert "AWS_ENDPOINT_URL, SAEV_LOG_LEVEL, SAEV_ROOT (there is no k8s/comp" in done.stdout
    assert data() == before
    assert cluster.install(tree, *words, "pvc").returncode == 0
    assert data() == {**before, "SAEV_ROOT": "/data/saev"}
    file.write_text(text.splitlines()[0] + "\n")
    assert cluster.install(tree, *words, "s3").returncode == 0
    assert data().keys() == before.keys() - {"AWS_ENDPOINT_URL"}


def test_a_component_left_out_stays_until_it_is_pruned(cluster: Cluster, tree: Path) -> None:
    """Leaving one out by mistake must not open a namespace; what others made always stays."""
    space = cluster.namespace()
    words = f"install --overlay s3 --namespace {space}".split()
    assert cluster.install(tree, *words, "--components", "dedicated", "jobs").returncode == 0
    labels = {"part-of": "saev", "managed-by": "kustomize"}
    theirs = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": "theirs",
            "namespace": space,
            "labels": {f"app.kubernetes.io/{key}": value for key, value in labels.items()},
        },
    }
    assert cluster.kubectl("create", "-f", "-", stdin=theirs).returncode == 0

    def names() -> set[str]:
        kinds = "quota,netpol,limits,cm,sa,role,rolebinding"
        return {item["metadata"]["name"] for item in cluster.get(kinds, "-n", space)["items"]}

    before = names()
    done = cluster.install(tree, *words, "--components", "jobs")
    assert done.returncode == 0, done.stderr
    says = "keep    LimitRange/saev-defaults (of component dedicated; PRUNE=1 deletes it)"
    assert says in done.stdout
    assert names() == before
    dry = cluster.install(tree, *words, "--components", "jobs", "--prune", "--dry-run")
    assert "delete  NetworkPolicy/default-deny (of component dedicated)" in dry.stdout
    assert names() == before
    done = cluster.install(tree, *words, "--components", "jobs", "--prune")
    assert done.returncode == 0, done.stderr
    gone = {"saev-defaults", "saev-compute", "default-deny", "dns", "kfp-runs", "kfp-profile"}
    assert before - names() == gone
    again = cluster.install(tree, *words, "--components", "jobs", "--prune")
    assert "  delete  " not in again.stdout


def test_what_version_0_1_0_installed_is_upgraded(cluster: Cluster, tree: Path) -> None:
    """Its objects are changed and not made a second time; what it alone has is deleted."""
    space = cluster.namespace()
    text = (Path(__file__).parent / "installed-0.1.0.yaml").read_text()
    old = [item for item in yaml.safe_load_all(text.replace("team", space)) if item]
    # In 0.1.0 and in no later version; nothing else of 0.1.0 is gone until now.
    renamed = copy.deepcopy(next(item for item in old if item["kind"] == "NetworkPolicy"))
    renamed["metadata"]["name"] = "saev-former-name"
    everything = {"apiVersion": "v1", "kind": "List", "items": [*old, renamed]}
    apply = "apply --server-side --field-manager=saev-install -f -".split()
    assert cluster.kubectl(*apply, stdin=everything).returncode == 0
    assert cluster.kubectl("get", "sa", "saev-schedule", "-n", space).returncode == 1

    words = f"install --overlay local --namespace {space} --components dedicated".split()
    done = cluster.install(tree, *words)
    assert done.returncode == 0, done.stderr
    assert "create  ServiceAccount/saev-schedule" in done.stdout
    deleted = {line.split()[1] for line in done.stdout.splitlines() if "  delete  " in line}
    assert deleted == {
        "ResourceQuota/saev-gpus", "NetworkPolicy/saev-storage", "NetworkPolicy/saev-former-name",
    }  # fmt: skip
    kinds = "netpol,quota,limits,role,rolebinding,sa"
    mine = cluster.get(kinds, "-n", space, "-l", "app.kubernetes.io/part-of=saev")["items"]
    rendered = cluster.install(tree, "render", *words[1:]).stdout
    wanted = {(item["kind"], item["metadata"]["name"]) for item in yaml.safe_load_all(rendered)}
    found = {(item["kind"], item["metadata"]["name"]) for item in mine}
    others = ("Namespace", "ConfigMap", "PersistentVolumeClaim")
    assert found == {key for key in wanted if key[0] not in others}
    again = cluster.install(tree, *words)
    verbs = {line.split()[0] for line in again.stdout.splitlines() if line.startswith("  ")}
    assert verbs == {"keep"}


def test_another_overlay_takes_back_what_the_first_made(cluster: Cluster, tree: Path) -> None:
    """Its quota and its network policies; not data, keys, components, or what others made."""
    space = cluster.namespace()
    secret = tree / "components" / "storage-secret" / "storage.env"
    secret.write_text("AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n")
    words = f"install --namespace {space} --overlay".split()
    assert cluster.install(tree, *words, "s3", "--components", "dedicated").returncode == 0
    theirs = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "theirs", "namespace": space},
        "spec": {"hard": {"pods": "100"}},
    }
    assert cluster.kubectl("create", "-f", "-", stdin=theirs).returncode == 0
    secret.unlink()

    def names(kinds: str) -> set[str]:
        return {item["metadata"]["name"] for item in cluster.get(kinds, "-n", space)["items"]}

    before = names("quota,netpol,secret,limits,cm,sa,role")
    dry = cluster.install(tree, *words, "local", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "delete  ResourceQuota/saev-gpus (of another overlay or version)" in dry.stdout
    assert "saev-gpus" in names("quota")
    done = cluster.install(tree, *words, "local")
    assert done.returncode == 0, done.stderr
    gone = before - names("quota,netpol,secret,limits,cm,sa,role")
    assert gone == {"saev-gpus", "saev-storage"} - names("secret")
    assert "saev-storage" in names("secret")
    assert "saev-storage" not in names("netpol")
    assert {"theirs", "saev-compute"} <= names("quota")
    back = cluster.install(tree, *words, "s3")
    assert back.returncode == 0, back.stderr
    assert "  delete  " not in back.stdout
    assert "saev-data" in names("pvc")
    assert "saev-gpus" in names("quota")


def test_what_cannot_change_changes_nothing(cluster: Cluster, tree: Path) -> None:
    space = cluster.namespace()
    words = f"install --overlay pvc --namespace {space}".split()
    assert cluster.install(tree, *words, "--storage-class", "one").returncode == 0
    done = cluster.install(tree, *words, "--storage-class", "two", "--gpus", "5")
    assert done.returncode == 1
    assert "existing object cannot be changed" in done.stderr
    quota = cluster.get("quota", "saev-gpus", "-n", space)
    assert quota["spec"]["hard"] == {"requests.nvidia.com/gpu": "8"}


def test_kfp_launcher_of_somebody_else_stays(cluster: Cluster, tree: Path) -> None:
    space = cluster.namespace()
    theirs = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "kfp-launcher", "namespace": space},
        "data": {"defaultPipelineRoot": "minio://mlpipeline/v2/artifacts"},
    }
    assert cluster.kubectl("apply", "-f", "-", stdin=theirs).returncode == 0
    folder = tree / "components" / "kfp-launcher"
    shutil.copy(folder / "kfp-launcher.example.yaml", folder / "kfp-launcher.yaml")
    words = f"install --overlay s3 --namespace {space} --components kfp-launcher".split()
    done = cluster.install(tree, *words)
    assert done.returncode == 1
    assert "Somebody else has set what this would change" in done.stderr
    assert cluster.get("cm", "kfp-launcher", "-n", space)["data"] == theirs["data"]
    assert cluster.kubectl("get", "role", "saev-steps", "-n", space).returncode == 1


def test_refusals_are_sentences(cluster: Cluster, tree: Path) -> None:
    done = cluster.install(tree, "install", "--overlay", "s3", "--namespace", "nowhere")
    assert done.returncode == 1
    assert "Namespace 'nowhere' does not exist" in done.stderr

    space = cluster.namespace()
    pod = cluster.kubectl("create", "-f", "-", stdin=step_pod(space, account="default"))
    assert pod.returncode == 0, pod.stderr
    done = cluster.install(tree, "uninstall", "--namespace", space)
    assert done.returncode == 1
    assert "1 pods of saev's runs are still there" in done.stderr
    assert cluster.install(tree, "uninstall", "--namespace", space, "--force").returncode == 0


# --- A step's pod ------------------------------------------------------------------------------


def step_pod(space: str, account: str = "saev-steps") -> Json:
    """A step's pod as KFP 2.17 and Argo make it of pipelines/definition.py.

    KFP: seccomp for the pod, all but runAsNonRoot for the step, all for its own init container
    (argocompiler/security_context.go). Argo: its two containers (MinimalCtrSC).
    """
    argo = {
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "runAsNonRoot": True,
        "runAsUser": 8737,
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    kfp = {
        "allowPrivilegeEscalation": False,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    resources = {"cpu": "4", "memory": "32Gi", "nvidia.com/gpu": "1"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": "saev-",
            "namespace": space,
            "labels": {
                "app.kubernetes.io/name": "saev",
                "app.kubernetes.io/part-of": "saev",
                "app.kubernetes.io/component": "train",
                "pipelines.kubeflow.org/v2_component": "true",
            },
        },
        "spec": {
            "serviceAccountName": account,
            "restartPolicy": "Never",
            "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
            "initContainers": [
                {"name": "init", "image": "argoexec:x", "securityContext": argo},
                {
                    "name": "kfp-launcher",
                    "image": "kfp-launcher:x",
                    "securityContext": kfp,
                    "resources": {"requests": {"cpu": "100m"}, "limits": {"memory": "192Mi"}},
                },
            ],
            "containers": [
                {
                    "name": "main",
                    "image": "saev:x",
                    "securityContext": kfp,
                    "resources": {"requests": {**resources}, "limits": {**resources}},
                    "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
                },
                {"name": "wait", "image": "argoexec:x", "securityContext": argo},
            ],
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
        },
    }


@pytest.fixture(scope="module")
def dedicated(cluster: Cluster) -> str:
    """A namespace with the component dedicated."""
    space = cluster.namespace()
    words = f"install --overlay s3 --namespace {space} --components dedicated".split()
    done = cluster.install(ROOT / "k8s", *words)
    assert done.returncode == 0, done.stderr
    return space


def test_a_step_is_restricted(cluster: Cluster, dedicated: str) -> None:
    done = cluster.create(step_pod(dedicated))
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)["spec"]
    wait = next(one for one in made["containers"] if one["name"] == "wait")
    assert wait["resources"] == {"requests": {"cpu": "100m", "memory": "128Mi"}}


def privileged(pod: Json) -> None:
    more = {"privileged": True, "allowPrivilegeEscalation": True}
    pod["spec"]["containers"][0]["securityContext"].update(more)


def escalating(pod: Json) -> None:
    del pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"]


def root(pod: Json) -> None:
    pod["spec"]["containers"][0]["securityContext"]["runAsUser"] = 0


def maybe_root(pod: Json) -> None:
    del pod["spec"]["containers"][0]["securityContext"]["runAsNonRoot"]


def on_the_host(pod: Json) -> None:
    pod["spec"]["volumes"][0] = {"name": "shm", "hostPath": {"path": "/"}}


def capable(pod: Json) -> None:
    pod["spec"]["initContainers"][1]["securityContext"]["capabilities"]["add"] = ["NET_ADMIN"]


@pytest.mark.parametrize("change", [privileged, escalating, root, maybe_root, on_the_host, capable])
def test_more_is_refused(cluster: Cluster, dedicated: str, change: Callable[[Json], None]) -> None:
    pod = copy.deepcopy(step_pod(dedicated))
    change(pod)
    done = cluster.create(pod)
    assert done.returncode == 1
    assert 'violates PodSecurity "restricted:latest"' in done.stderr


def test_quotas(cluster: Cluster, dedicated: str) -> None:
    pod = step_pod(dedicated)
    for kind in ("requests", "limits"):
        pod["spec"]["containers"][0]["resources"][kind]["nvidia.com/gpu"] = "9"
    done = cluster.create(pod)
    assert "exceeded quota: saev-gpus" in done.stderr
    for kind in ("requests", "limits"):
        del pod["spec"]["containers"][0]["resources"][kind]["nvidia.com/gpu"]
        pod["spec"]["containers"][0]["resources"][kind]["memory"] = "2Ti"
    assert "exceeded quota: saev-compute" in cluster.create(pod).stderr


def test_shared_namespace_leaves_other_pods_alone(cluster: Cluster) -> None:
    """Such as KFP's own: no requests, no labels, and more privileges than restricted allows."""
    space = cluster.namespace()
    done = cluster.install(ROOT / "k8s", "install", "--overlay", "s3", "--namespace", space)
    assert done.returncode == 0, done.stderr
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "mysql", "namespace": space},
        "spec": {"containers": [{"name": "mysql", "image": "mysql:8"}]},
    }
    done = cluster.create(pod)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert json.loads(done.stdout)["spec"]["containers"][0]["resources"] == {}


# --- What a step may ask of the API ------------------------------------------------------------

ALLOWED = [
    ("create", "argoproj.io", "workflowtaskresults", ""),
    ("patch", "argoproj.io", "workflowtaskresults", ""),
    ("get", "", "pods", ""),
    ("get", "", "configmaps", "kfp-launcher"),
    ("get", "", "secrets", "mlpipeline-minio-artifact"),
]
DENIED = [
    ("list", "", "secrets", ""),
    ("get", "", "secrets", "saev-storage"),
    ("get", "", "configmaps", "saev-config"),
    ("create", "", "pods", ""),
    ("list", "", "pods", ""),
    ("create", "", "pods/exec", ""),
    ("delete", "", "persistentvolumeclaims", "saev-data"),
    ("create", "batch", "jobs", ""),
    ("create", "argoproj.io", "workflows", ""),
    ("get", "argoproj.io", "workflows", ""),
    ("create", "rbac.authorization.k8s.io", "rolebindings", ""),
]
SCHEDULE = [
    ("create", "pipelines.kubeflow.org", "runs", ""),
    ("get", "pipelines.kubeflow.org", "runs", "saev-x7k2p"),
    ("list", "pipelines.kubeflow.org", "runs", ""),
    ("retry", "pipelines.kubeflow.org", "runs", "saev-x7k2p"),
    ("create", "", "serviceaccounts/token", "saev-schedule"),
]
OF_NEITHER = [
    ("delete", "pipelines.kubeflow.org", "runs", "saev-x7k2p"),
    ("create", "", "serviceaccounts/token", "saev-steps"),
    ("create", "", "serviceaccounts/token", "default"),
]
STEPS_ACCOUNT, SCHEDULE_ACCOUNT = "saev-steps", "saev-schedule"


def may(cluster: Cluster, space: str, account: str, *asked: str) -> bool:
    """What the API server says of a service account."""
    verb, group, resource, name = asked
    kind, _, part = resource.partition("/")
    attributes = {"namespace": space, "verb": verb, "group": group, "resource": kind}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": account,
            "resourceAttributes": {**attributes, "subresource": part, "name": name},
        },
    }
    done = cluster.kubectl("create", "-o", "json", "-f", "-", stdin=review)
    return json.loads(done.stdout)["status"]["allowed"]


@pytest.mark.parametrize("name", [STEPS_ACCOUNT, SCHEDULE_ACCOUNT])
def test_roles(cluster: Cluster, dedicated: str, name: str) -> None:
    """A firing may start runs; a step may not, nor become what may."""
    account = f"system:serviceaccount:{dedicated}:{name}"
    found = {a: may(cluster, dedicated, account, *a) for a in (*ALLOWED, *DENIED, *OF_NEITHER)}
    assert found == {a: a in ALLOWED for a in found}
    starting = {a: may(cluster, dedicated, account, *a) for a in SCHEDULE}
    assert starting == dict.fromkeys(SCHEDULE, name == SCHEDULE_ACCOUNT)
    assert not any(may(cluster, "kube-system", account, *a) for a in (*ALLOWED, *SCHEDULE))


@pytest.fixture
def in_a_pod(
    cluster: Cluster, dedicated: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Gives this process the token, certificate and variables of a pod of a service account."""

    def enter(account: str) -> None:
        done = cluster.kubectl("create", "token", account, "-n", dedicated)
        assert done.returncode == 0, done.stderr
        view = cluster.kubectl("config", "view", "--raw", "--flatten", "-o", "json")
        server = json.loads(view.stdout)["clusters"][0]["cluster"]
        address = urllib.parse.urlsplit(server["server"])
        (tmp_path / "token").write_text(done.stdout)
        (tmp_path / "ca.crt").write_bytes(base64.b64decode(server["certificate-authority-data"]))
        monkeypatch.setattr(cluster_api, "ACCOUNT", tmp_path)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", address.hostname or "")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(address.port))

    return enter


def test_a_firing_gets_the_token_that_kubeflow_wants(
    dedicated: str, in_a_pod: Callable[[str], None]
) -> None:
    in_a_pod(SCHEDULE_ACCOUNT)
    namespace, token = runs._own_token()
    payload = token.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert namespace == dedicated
    assert claims["aud"] == [runs.AUDIENCE]
    assert claims["sub"] == f"system:serviceaccount:{dedicated}:{SCHEDULE_ACCOUNT}"


def test_a_step_does_not_get_it(in_a_pod: Callable[[str], None]) -> None:
    in_a_pod(STEPS_ACCOUNT)
    with pytest.raises(ClusterError, match="gives saev-steps this permission"):
        runs._own_token()


def test_an_editor_lacks_permissions(cluster: Cluster, tree: Path, tmp_path: Path) -> None:
    space = cluster.namespace()
    cluster.kubectl("create", "rolebinding", "a", "--clusterrole=edit", "--user=a", "-n", space)
    config = json.loads(cluster.kubectl("config", "view", "--raw", "-o", "json").stdout)
    config["users"][0]["user"]["as"] = "a"
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    editor = copy.copy(cluster)
    editor._env = {**cluster._env, "KUBECONFIG": str(tmp_path / "kubeconfig")}
    done = editor.install(tree, "install", "--overlay", "s3", "--namespace", space)
    assert done.returncode == 1
    assert "You lack a permission" in done.stderr
    assert cluster.kubectl("get", "sa", "saev-steps", "-n", space).returncode == 1


# --- Priority ----------------------------------------------------------------------------------


def test_steps_get_the_priority(cluster: Cluster, tree: Path) -> None:
    # This server has the interface of before 1.36.
    policy = tree / "components" / "priority" / "policy.yaml"
    beta = policy.read_text().replace("k8s.io/v1\n", "k8s.io/v1beta1\n")
    policy.write_text(beta)
    space = cluster.namespace()
    words = f"install --overlay s3 --namespace {space} --components priority".split()
    done = cluster.install(tree, *words)
    assert done.returncode == 0, done.stderr

    def priority(pod: Json) -> tuple[str, int, str]:
        made = json.loads(cluster.create(pod).stdout)["spec"]
        return made.get("priorityClassName", ""), made["priority"], made["preemptionPolicy"]

    step, other = step_pod(space), step_pod(space)
    other["metadata"]["labels"] = {}
    for _ in range(100):  # until the server has noticed the policy
        if priority(step)[0]:
            break
    assert priority(step) == ("saev-batch", -1000, "Never")
    assert priority(other) == ("", 0, "PreemptLowerPriority")
