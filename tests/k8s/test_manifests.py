"""Every overlay builds, and what it makes is right; and the checks that say so can fail."""

import copy
import importlib
import os
import re
import shutil
import subprocess
import typing as tp
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from k8s.checks import FIRING, JOBSET, STEP, VERSIONS, Json, matches, meaning, problems, schemas
from k8s.conftest import FETCHED, ROOT, Render

K8S = ROOT / "k8s"
EVERYTHING = (
    "dedicated", "explorer", "jobs", "tensorboard", "priority", "kfp-launcher", "trainer",
)  # fmt: skip
IMAGE = "registry.example.com:5000/team/saev:1.2"
UNREACHABLE = """\
apiVersion: v1
kind: Config
clusters: [{name: a, cluster: {server: "http://127.0.0.1:9"}}]
contexts: [{name: a, context: {cluster: a}}]
current-context: a
"""


@pytest.mark.parametrize("overlay", ["s3", "pvc", "local"])
def test_overlays_build_as_they_are(build: Render, overlay: str) -> None:
    assert problems(build(K8S / "overlays" / overlay)) == []


@pytest.mark.parametrize("overlay", ["s3", "pvc", "local"])
def test_all_components(render: Render, overlay: str) -> None:
    objects = render(
        *f"--overlay {overlay} --namespace team-a --image {IMAGE} --components".split(), *EVERYTHING
    )
    assert problems(objects) == []
    assert {item["metadata"].get("namespace", "team-a") for item in objects} == {"team-a"}
    assert find(objects, "Namespace")["metadata"]["name"] == "team-a"
    assert not find(objects, "Namespace")["metadata"]["labels"].get("app.kubernetes.io/part-of")


def test_versions_are_two() -> None:
    old, new = ([int(part) for part in version.split(".")[:2]] for version in VERSIONS)
    assert old < new


def test_variables(render: Render) -> None:
    objects = render(
        *f"--overlay pvc --namespace team-a --kfp-namespace kfp --image {IMAGE} --gpus 3".split(),
        *"--size 2Ti --storage-class efs --components dedicated tensorboard".split(),
    )
    claim = find(objects, "PersistentVolumeClaim")["spec"]
    assert claim["storageClassName"] == "efs"
    assert claim["resources"]["requests"]["storage"] == "2Ti"
    quota = find(objects, "ResourceQuota", "saev-gpus")
    assert quota["spec"]["hard"] == {"requests.nvidia.com/gpu": "3"}
    pod = find(objects, "Deployment")["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == IMAGE
    claims = [volume.get("persistentVolumeClaim") for volume in pod["volumes"]]
    assert {"claimName": "saev-data", "readOnly": True} in claims
    policies = yaml.safe_dump([item for item in objects if item["kind"] == "NetworkPolicy"])
    assert "kubernetes.io/metadata.name: kfp\n" in policies
    assert "kubernetes.io/metadata.name: kubeflow\n" not in policies


def test_private_files(render: Render, tree: Path) -> None:
    objects = render("--overlay", "s3", "--components", "kfp-launcher")
    assert find(objects, "ConfigMap", "saev-config")["data"] == {
        "SAEV_LOG_LEVEL": "INFO",
        "SAEV_ROOT": "s3://my-bucket/saev",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    secret = find(objects, "Secret", "saev-storage")
    assert secret["data"]["AWS_SECRET_ACCESS_KEY"] == "c2VjcmV0Lys9"  # secret/+=
    reads = [rule.get("resourceNames") for rule in find(objects, "Role", "saev-steps")["rules"]]
    assert ["saev-storage"] in reads

    (tree / "components" / "storage-secret" / "storage.env").unlink()
    objects = render("--overlay", "s3")
    assert not [item for item in objects if item["kind"] == "Secret"]
    assert ["saev-storage"] not in [
        rule.get("resourceNames") for rule in find(objects, "Role", "saev-steps")["rules"]
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("AWS_ACCESS_KEY_ID='x'", "line 1: quotes would become part of AWS_ACCESS_KEY_ID's value"),
        ("AWS_ACCESS_KEY_ID", "line 1 is not KEY=VALUE"),
        ("AWS_ACCESS_KEY_ID= x", "line 1: AWS_ACCESS_KEY_ID's value has spaces"),
        ("AWS_ACCESS_KEY_ID=x", "no value for AWS_SECRET_ACCESS_KEY"),
        ("aws_key=x", "line 1 is not KEY=VALUE"),
    ],
)
def test_wrong_private_files(tree: Path, installer: Callable, line: str, says: str) -> None:
    (tree / "components" / "storage-secret" / "storage.env").write_text(line + "\n")
    done = installer(tree, "render", "--overlay", "s3")
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "OVERLAY is not set"),
        ("--overlay nfs", "'nfs' is unknown"),
        (
            "--overlay s3 --components dedicated",
            "'kubeflow' is where Kubeflow Pipelines itself runs",
        ),
        ("--overlay s3 --components dedicate", "no component 'dedicate'"),
        ("--overlay pvc --components tensorboard", "IMAGE=registry/saev:…"),
        ("--overlay pvc --components tensorboard --image saev", "no fixed version"),
        ("--overlay pvc --components tensorboard --image a:5/saev:latest", "no fixed version"),
        ("--overlay s3 --gpus -1", "less than 0"),
        ("--overlay pvc --components explorer", "The explorer runs in saev's image"),
    ],
)
def test_refusals(tree: Path, installer: Callable, arguments: str, says: str) -> None:
    done = installer(tree, "render", *arguments.split())
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stdout == ""


def test_tensorboard_on_s3_needs_the_root(tree: Path, installer: Callable) -> None:
    (tree / "components" / "settings" / "config.env").unlink()
    words = f"render --overlay s3 --components tensorboard --image {IMAGE}".split()
    assert "set SAEV_ROOT in k8s/components/settings/config.env" in installer(tree, *words).stderr


@pytest.mark.parametrize("overlay", ["s3", "pvc"])
def test_keys_are_read_as_a_yaml_parser_reads_them(
    tree: Path, installer: Callable, monkeypatch: pytest.MonkeyPatch, overlay: str
) -> None:
    monkeypatch.syspath_prepend(str(K8S))
    manifests = importlib.import_module("manifests")
    words = f"render --overlay {overlay} --namespace team-a --image {IMAGE}".split()

    def keys(*components: str) -> tuple[set, set]:
        text = installer(tree, *words, "--components", *components).stdout
        objects = yaml.load_all(text, yaml.CSafeLoader)
        parsed = [(item["kind"], item["metadata"]["name"]) for item in objects]
        read = manifests.keys_in(text)
        assert sorted(read) == sorted(parsed)
        return set(read), manifests.keys_of_component(components[-1]) if components else set()

    plain = keys()[0] | {("Namespace", "saev")}
    for name in EVERYTHING:
        more, of_component = keys(name)
        made = more - plain - {("Namespace", "team-a")}  # its name is not that of the file
        assert made == of_component - plain, name
        assert made


@pytest.mark.parametrize("config", ["", UNREACHABLE], ids=["no kubeconfig", "no server"])
def test_a_dry_run_without_a_cluster_is_a_preview(
    tree: Path, installer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    (tmp_path / "kubeconfig").write_text(config)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    if not shutil.which("kubectl", path=f"{FETCHED}{os.pathsep}{os.environ['PATH']}"):
        pytest.skip("kubectl is not installed")
    words = "--overlay pvc --namespace team-a --components dedicated".split()
    done = installer(tree, "install", *words, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "The cluster cannot be reached" in done.stdout
    objects = yaml.safe_load_all(installer(tree, "render", *words).stdout)
    listed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  apply ")]
    assert listed == sorted(f"{item['kind']}/{item['metadata']['name']}" for item in objects)
    assert "Nothing was changed" in done.stdout

    real = installer(tree, "install", *words)
    assert real.returncode == 1
    assert "The cluster cannot be reached" in real.stderr
    for said in (done.stdout, real.stderr):
        assert "memcache.go" not in said  # of the libraries of kubectl
        assert len(said.splitlines()[0]) < 100


def test_the_explorer_reads_and_lets_nobody_in(render: Render) -> None:
    """Its keys and its account are its own, its volume is read-only, and no policy names it."""
    for overlay in ("s3", "pvc"):
        words = f"--overlay {overlay} --namespace team-a --image {IMAGE} --components explorer"
        objects = render(*words.split())
        template = find(objects, "Deployment")["spec"]["template"]
        pod, (container,) = template["spec"], template["spec"]["containers"]
        assert pod["serviceAccountName"] == "saev-explorer"
        bound = [item for item in objects if item["kind"] == "RoleBinding"]
        assert "saev-explorer" not in {one["name"] for item in bound for one in item["subjects"]}
        keys = [entry["valueFrom"]["secretKeyRef"]["name"] for entry in container["env"]
                if "secretKeyRef" in entry.get("valueFrom", {})]  # fmt: skip
        assert set(keys) == {"saev-explorer-storage"}
        claims = [
            v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v
        ]
        assert claims == [{"claimName": "saev-data", "readOnly": True}] * (overlay == "pvc")
        labels = template["metadata"]["labels"]
        policies = {
            item["metadata"]["name"]: item["spec"]
            for item in objects
            if item["kind"] == "NetworkPolicy" and matches(item["spec"]["podSelector"], labels)
        }
        assert "saev-default-deny" in policies
        assert not any(spec.get("ingress") for spec in policies.values())
        assert not {"saev-kfp", "saev-schedule"} & set(policies)


def test_its_command_is_one(render: Render) -> None:
    """The flags are those that `saev serve` takes."""
    cli = pytest.importorskip("saev.cli")
    objects = render("--overlay", "pvc", "--image", IMAGE, "--components", "explorer")
    (container,) = find(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["command"][0] == "saev"
    cfg = cli.parse([w.replace("$(SAEV_ROOT)", "s3://b/saev") for w in container["command"][1:]])
    assert (cfg.root, cfg.host, cfg.browser, cfg.notes) == ("s3://b/saev", "0.0.0.0", False, "")
    assert cfg.port == container["ports"][0]["containerPort"]


def test_the_gateway_s_example_changes_the_component(build: Render) -> None:
    cli = pytest.importorskip("saev.cli")
    objects = build(K8S / "examples" / "explorer-gateway")
    template = find(objects, "Deployment")["spec"]["template"]
    assert template["metadata"]["annotations"]["sidecar.istio.io/inject"] == "true"
    (container,) = template["spec"]["containers"]
    cfg = cli.parse(container["command"][1:])
    assert cfg.behind_proxy == ("kubeflow.example.com",)
    (match,) = find(objects, "VirtualService")["spec"]["http"][0]["match"]
    assert match["uri"]["prefix"] == f"{cfg.prefix}/"
    (route,) = find(objects, "VirtualService")["spec"]["http"][0]["route"]
    assert route["destination"]["port"]["number"] == cfg.port
    labels = template["metadata"]["labels"]
    for kind, key in (("AuthorizationPolicy", "selector"), ("NetworkPolicy", "podSelector")):
        assert matches(find(objects, kind)["spec"][key], labels)


def test_digests_stay(render: Render) -> None:
    image = f"registry.example.com/saev@sha256:{'a' * 64}"
    objects = render(*f"--overlay pvc --image {image} --components tensorboard".split())
    pod = find(objects, "Deployment")["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == image


def test_nothing_remote_and_nothing_secret() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "k8s"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in listed:
        assert not name.endswith((".env", "kfp-launcher.yaml")), name
        if name.endswith(".env.example"):
            for line in (ROOT / name).read_text().splitlines():
                assert not re.match(r"AWS_(ACCESS|SECRET|SESSION)\w*=.", line), f"{name}: {line}"
    for path in K8S.rglob("kustomization.yaml"):
        content = yaml.safe_load(path.read_text())
        for base in (*content.get("resources", ()), *content.get("components", ())):
            is_private = base == "kfp-launcher.yaml"
            assert is_private or (path.parent / base).exists(), f"{path}: {base}"


def test_pipelines_use_these_names(build: Render) -> None:
    pods = pytest.importorskip("saev.launch.pods")
    options = pytest.importorskip("pipelines.options").PodOptions()
    environment = pytest.importorskip("saev.config.environment")
    objects = build(K8S / "overlays" / "pvc")
    assert find(objects, "ConfigMap")["metadata"]["name"] == options.config_map
    assert find(objects, "PersistentVolumeClaim")["metadata"]["name"] == options.pvc_name
    generator = yaml.safe_load((K8S / "components/storage-secret/kustomization.yaml").read_text())
    assert generator["secretGenerator"][0]["name"] == options.storage_secret
    assert pods.LABELS.items() <= STEP.items()
    example = (K8S / "components" / "settings" / "config.env.example").read_text()
    keys = set(re.findall(r"^#?([A-Z][A-Z0-9_]*)=", example, re.MULTILINE))
    assert keys - {"SAEV_ROOT"} <= set(environment.CONFIG_ENV)
    example = (K8S / "components" / "storage-secret" / "storage.env.example").read_text()
    keys = set(re.findall(r"^#?([A-Z][A-Z0-9_]*)=", example, re.MULTILINE))
    assert keys == set(environment.SECRET_ENV)


def test_ranks_reach_each_other_and_nobody_else(render: Render) -> None:
    objects = render("--overlay", "s3", "--components", "trainer")
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    inward = [item for item in policies if item["spec"].get("ingress")]
    assert [item["metadata"]["name"] for item in inward] == ["saev-ranks"]
    spec = inward[0]["spec"]
    (come,), (go,) = spec["ingress"], spec["egress"]
    assert come["from"] == go["to"] == [{"podSelector": spec["podSelector"]}]
    rank = STEP | JOBSET
    assert matches(spec["podSelector"], rank)
    assert not matches(spec["podSelector"], STEP)  # a step that is no rank, and what launches ranks
    assert not matches(spec["podSelector"], JOBSET)
    assert not matches(spec["podSelector"], rank | {"app.kubernetes.io/component": "infer"})


# --- The checks can fail -----------------------------------------------------------------------


def set_to(kind: str, name: str, where: str, value: object) -> Callable[[list[Json]], None]:
    """A change of one value, or with ... its removal."""

    def change(objects: list[Json]) -> None:
        *parents, last = (int(key) if key.isdigit() else key for key in where.split("|"))
        inner: tp.Any = find(objects, kind, name)
        for key in parents:
            inner = inner[key]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value

    return change


POD = "spec|template|spec"
JOB = "spec|template|spec|replicatedJobs|0|template"
BOARD = ("Deployment", "saev-tensorboard")
MUTATIONS = {
    "'replica' was unexpected": (*BOARD, "spec|replica", 1),
    "'one' is not of type": (*BOARD, "spec|replicas", "one"),
    "namespaces differ": ("ServiceAccount", "saev-steps", "metadata|namespace", "other"),
    "cluster-wide, but in": ("PriorityClass", "saev-batch", "metadata|namespace", "team-a"),
    "labels": ("Role", "saev-steps", "metadata|labels|app.kubernetes.io/part-of", ...),
    "accessModes": ("PersistentVolumeClaim", "saev-data", "spec|accessModes|0", "ReadWriteAll"),
    "enforce": (
        "Namespace", "team-a", "metadata|labels|pod-security.kubernetes.io/enforce", "strict",
    ),
    "no quantity": ("ResourceQuota", "saev-compute", "spec|hard|requests.memory", "16GB"),
    "chooses no pod": ("Service", "saev-tensorboard", "spec|selector|app.kubernetes.io/name", "x"),
    "saev-dns: chooses no pod": (
        "NetworkPolicy", "saev-dns", "spec|podSelector|matchLabels|app.kubernetes.io/part-of", "x",
    ),
    "no container has port": ("Service", "saev-tensorboard", "spec|ports|0|targetPort", "web"),
    "no Role/saev-step": ("RoleBinding", "saev-steps", "roleRef|name", "saev-step"),
    "no key SAEV_ROOT": ("ConfigMap", "saev-config", "data|SAEV_ROOT", ...),
    "no ServiceAccount/x": (*BOARD, f"{POD}|serviceAccountName", "x"),
    "may run as root": (*BOARD, f"{POD}|securityContext|runAsNonRoot", False),
    "may gain privileges": (*BOARD, f"{POD}|containers|0|securityContext|privileged", True),
    "has capabilities": (*BOARD, f"{POD}|containers|0|securityContext|capabilities|drop", []),
    "no fixed version": (*BOARD, f"{POD}|containers|0|image", "saev:latest"),
    "no limits": (*BOARD, f"{POD}|containers|0|resources|limits|memory", ...),
    "volume of kind hostPath": (*BOARD, f"{POD}|volumes|1", {"name": "tmp", "hostPath": {}}),
    "no volume tmp": (*BOARD, f"{POD}|volumes|1|name", "temp"),
    "verbs *": ("Role", "saev-steps", "rules|0|verbs", ["*"]),
    "all secrets": ("Role", "saev-steps", "rules|3|resourceNames", []),
    "all serviceaccounts/token": ("Role", "saev-schedule", "rules|1|resourceNames", ...),
    "more than a look at pods": ("Role", "saev-steps", "rules|1|verbs", ["get", "create"]),
    "port 'http'": ("NetworkPolicy", "saev-kfp", "spec|egress|0|ports|0|port", "http"),
    "rule of all ports": ("NetworkPolicy", "saev-kfp", "spec|egress|0|ports", ...),
    "saev-ranks: chooses no pod": (
        "NetworkPolicy", "saev-ranks", "spec|podSelector|matchExpressions|0|key", "x",
    ),
    "TrainingRuntime/saev-train: may run as root": (
        "TrainingRuntime", "saev-train", f"{JOB}|{POD}|securityContext|runAsNonRoot", False,
    ),
    "'backoffLimits' was unexpected": (
        "TrainingRuntime", "saev-train", f"{JOB}|spec|backoffLimits", 0,
    ),
    "a rule from anywhere": ("NetworkPolicy", "saev-ranks", "spec|ingress|0|from", []),
    "is not in 0.0.0.0/0": (
        "NetworkPolicy", "saev-https", "spec|egress|0|to|0|ipBlock|except|0", "fe80::/10",
    ),
    "priority is not the class's": ("PriorityClass", "saev-batch", "value", -1),
}  # fmt: skip


def test_only_firings_reach_the_api_that_starts_runs(objects: list[Json]) -> None:
    """A single-user KFP lets everybody start runs, as any service account of the namespace."""

    def ports(pod: dict[str, str]) -> set[int]:
        """To the namespace of KFP."""
        return {
            port["port"]
            for item in objects
            if item["kind"] == "NetworkPolicy" and matches(item["spec"]["podSelector"], pod)
            for rule in item["spec"].get("egress", [])
            if any("namespaceSelector" in place for place in rule["to"])
            for port in rule["ports"]
        }

    kfp = {"pipelines.kubeflow.org/v2_component": "true"}
    assert ports({**FIRING, **kfp}) - ports({**STEP, **kfp}) == {8888}


@pytest.fixture
def objects(render: Render) -> list[Json]:
    return render(
        *f"--overlay pvc --namespace team-a --image {IMAGE} --components".split(), *EVERYTHING
    )


def test_each_mutation_is_found(objects: list[Json]) -> None:
    missed = {}
    for says, mutation in MUTATIONS.items():
        changed = copy.deepcopy(objects)
        set_to(*mutation)(changed)
        found = [*schemas([find(changed, *mutation[:2])]), *meaning(changed)]
        if not any(says in sentence for sentence in found):
            missed[says] = found
    assert missed == {}


def find(objects: list[Json], kind: str, name: str | None = None) -> Json:
    """The one object of a kind, and of a name if there are several."""
    (found,) = (
        item
        for item in objects
        if item["kind"] == kind and name in (None, item["metadata"]["name"])
    )
    return found
