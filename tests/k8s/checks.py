"""What must hold of manifests, beyond their schemas. Each check yields sentences; none is good."""

import ipaddress
import typing as tp
from collections.abc import Iterator

import k8s_schemas
from kubernetes.utils.quantity import parse_quantity

Json = dict[str, tp.Any]

VERSIONS = ("1.34", k8s_schemas.latest_version())
NO_SCHEMA = {
    # Stable from 1.36 on.
    ("1.34", "MutatingAdmissionPolicy"),
    ("1.34", "MutatingAdmissionPolicyBinding"),
}
"""Kinds that a version's schemas lack."""
JOBSET = {"jobset.sigs.k8s.io/jobset-name": "some"}
"""Label that JobSet puts on pods."""

CLUSTER_WIDE = {
    "Namespace",
    "PriorityClass",
    "MutatingAdmissionPolicy",
    "MutatingAdmissionPolicyBinding",
}
LABELS = {
    "app.kubernetes.io/name": "saev",
    "app.kubernetes.io/part-of": "saev",
    "app.kubernetes.io/managed-by": "kustomize",
}
COMPONENT = "app.kubernetes.io/component"

FROM_ELSEWHERE = {("Secret", "saev-storage"), ("Secret", "saev-explorer-storage")}
"""Referred to, and not always part of a build."""
NOT_OURS = (
    {"pipelines.kubeflow.org/v2_component": "true"},
    {"app": "ml-pipeline-ui-artifact"},
    {"app": "ml-pipeline-visualizationserver"},
)
"""Labels of KFP's pods that policies of the component dedicated choose."""
STEP = {
    "app.kubernetes.io/name": "saev",
    "app.kubernetes.io/part-of": "saev",
    COMPONENT: "train",
}
"""Labels of a step's pod; test_pipelines_use_these_names compares them."""
FIRING = {**STEP, COMPONENT: "fire"}
"""Labels of the pod of a schedule's firing."""

ENUMS: dict[str, set[tp.Any]] = {
    "accessModes": {"ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany", "ReadWriteOncePod"},
    "policyTypes": {"Ingress", "Egress"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "preemptionPolicy": {"Never", "PreemptLowerPriority"},
    "failurePolicy": {"Ignore", "Fail"},
    "reinvocationPolicy": {"Never", "IfNeeded"},
    "patchType": {"JSONPatch", "ApplyConfiguration"},
    "operator": {"In", "NotIn", "Exists", "DoesNotExist"},
    "operations": {"CREATE", "UPDATE", "DELETE", "CONNECT", "*"},
    "fsGroupChangePolicy": {"OnRootMismatch", "Always"},
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "pod-security.kubernetes.io/enforce": {"restricted"},
    "pod-security.kubernetes.io/warn": {"restricted"},
    "pod-security.kubernetes.io/audit": {"restricted"},
}
"""Values that the schemas take for any string: key → what is meant."""


def problems(objects: list[Json]) -> list[str]:
    """All that is wrong with a build."""
    return [*schemas(objects), *meaning(objects)]


def meaning(objects: list[Json]) -> list[str]:
    """All that is wrong and that schemas do not tell."""
    checks = (names, labels, enums, quantities, selectors, references)
    checks += (pods, roles, networks, numbers)
    return [problem for check in checks for problem in check(objects)]


def schemas(objects: list[Json]) -> Iterator[str]:
    """Strict schemas of two versions of Kubernetes."""
    for version in VERSIONS:
        for item in objects:
            if item["kind"] == "TrainingRuntime":  # Kubernetes' own part of it
                metadata = {"name": item["metadata"]["name"]}
                job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata}
                item = job | {"spec": _job(item)["spec"]}
            try:
                k8s_schemas.validate(item, version)
            except k8s_schemas.ValidationError as error:
                yield f"{_id(item)}, Kubernetes {version}: {error.message}"
            except k8s_schemas.SchemaNotFoundError:
                if (version, item["kind"]) not in NO_SCHEMA:
                    yield f"{_id(item)}: no schema in Kubernetes {version}"


def names(objects: list[Json]) -> Iterator[str]:
    """One object of a kind and name; cluster-wide ones have no namespace; all others agree."""
    ids = [_id(item) for item in objects]
    yield from (f"{one}: twice" for one in set(ids) if ids.count(one) > 1)
    spaces = set()
    for item in objects:
        space = item["metadata"].get("namespace")
        if item["kind"] in CLUSTER_WIDE:
            if space:
                yield f"{_id(item)}: cluster-wide, but in namespace {space}"
        else:
            spaces.add(space)
    if len(spaces) > 1:
        yield f"namespaces differ: {sorted(map(str, spaces))}"


def labels(objects: list[Json]) -> Iterator[str]:
    """The recommended labels."""
    for item in objects:
        found = item["metadata"].get("labels", {})
        wrong = {key for key, value in LABELS.items() if found.get(key) != value}
        if item["kind"] != "Namespace" and (wrong or not found.get(COMPONENT)):
            yield f"{_id(item)}: labels {sorted(wrong) or COMPONENT}"


def enums(objects: list[Json]) -> Iterator[str]:
    """Values of which there are only a few."""
    for item in objects:
        for key, value in _walk(item):
            if key not in ENUMS or isinstance(value, dict):
                continue
            for one in value if isinstance(value, list) else [value]:
                if one not in ENUMS[key]:
                    yield f"{_id(item)}: {key} {one!r}"


def quantities(objects: list[Json]) -> Iterator[str]:
    """Amounts of things."""
    for item in objects:
        for key, value in _walk(item):
            if key in ("requests", "limits", "hard", "defaultRequest") and isinstance(value, dict):
                for name, amount in value.items():
                    try:
                        parse_quantity(amount)
                    except ValueError:
                        yield f"{_id(item)}: {key} {name} {amount!r} is no quantity"


def selectors(objects: list[Json]) -> Iterator[str]:
    """Whatever chooses pods chooses some."""
    templates = [item["metadata"]["labels"] for item in _templates(objects).values()]
    templates += [labels | JOBSET for labels in templates]
    for item in objects:
        spec = item.get("spec", {})
        if item["kind"] == "Deployment":
            chosen = matches(spec["selector"], spec["template"]["metadata"]["labels"])
        elif item["kind"] == "Service":
            selector = {"matchLabels": spec["selector"]}
            chosen = any(matches(selector, one) for one in templates)
        elif item["kind"] == "NetworkPolicy":
            pods = [*templates, STEP, FIRING, *NOT_OURS]
            chosen = any(matches(spec["podSelector"], one) for one in pods)
        else:
            continue
        if not chosen:
            yield f"{_id(item)}: chooses no pod"


def references(objects: list[Json]) -> Iterator[str]:
    """Names lead somewhere."""
    there = {(item["kind"], item["metadata"]["name"]): item for item in objects}
    for item in objects:
        for kind, name, key in _references(item):
            if (kind, name) not in there:
                if (kind, name) not in FROM_ELSEWHERE:
                    yield f"{_id(item)}: there is no {kind}/{name}"
            elif key and key not in there[kind, name].get("data", {}):
                yield f"{_id(item)}: {kind}/{name} has no key {key}"
    for item in objects:
        if item["kind"] == "Service":
            ports = {
                port["name"]
                for deployment in _deployments(objects)
                for container in _containers(deployment["spec"]["template"]["spec"])
                for port in container.get("ports", [])
            }
            for port in item["spec"]["ports"]:
                if port["targetPort"] not in ports:
                    yield f"{_id(item)}: no container has port {port['targetPort']!r}"


def pods(objects: list[Json]) -> Iterator[str]:
    """The restricted Pod Security Standard, and what goes beyond it."""
    for where, template in _templates(objects).items():
        spec = template["spec"]
        context = spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
            yield f"{where}: may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{where}: no seccomp profile"
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(key):
                yield f"{where}: {key}"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{where}: has a token of the API that it does not need"
        for volume in spec.get("volumes", []):
            kind = next(key for key in volume if key != "name")
            if kind not in ("emptyDir", "persistentVolumeClaim", "secret", "configMap"):
                yield f"{where}: volume of kind {kind}"
        for container in _containers(spec):
            yield from _container(f"{where}, {container['name']}", container, spec)
    for item in _deployments(objects):
        for container in _containers(item["spec"]["template"]["spec"]):
            yield from _service(f"{_id(item)}, {container['name']}", container)


def _container(where: str, container: Json, spec: Json) -> Iterator[str]:
    context = container.get("securityContext", {})
    if context.get("privileged") or context.get("allowPrivilegeEscalation") is not False:
        yield f"{where}: may gain privileges"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{where}: has capabilities"
    if context.get("readOnlyRootFilesystem") is not True:
        yield f"{where}: root file system can be written"
    mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
    for name in mounts - {volume["name"] for volume in spec.get("volumes", [])}:
        yield f"{where}: there is no volume {name}"
    name, _, tag = container["image"].rpartition("/")[2].partition(":")
    if "@sha256:" not in container["image"] and tag in ("", "latest"):
        yield f"{where}: image {name} has no fixed version"


def _service(where: str, container: Json) -> Iterator[str]:
    """What only those have that run all the time; a job's resources come with each run."""
    for which in ("requests", "limits"):
        if set(container.get("resources", {}).get(which, {})) < {"cpu", "memory"}:
            yield f"{where}: no {which}"
    if not {"readinessProbe", "livenessProbe"} <= set(container):
        yield f"{where}: no probes"


def roles(objects: list[Json]) -> Iterator[str]:
    """No wildcards; secrets and config maps only by name; nothing that makes or changes pods."""
    for item in objects:
        for rule in item.get("rules", []) if item["kind"] in ("Role", "ClusterRole") else []:
            for key in ("apiGroups", "resources", "verbs"):
                if "*" in rule[key]:
                    yield f"{_id(item)}: {key} *"
            named = {"secrets", "configmaps", "serviceaccounts/token"} & set(rule["resources"])
            if named and not rule.get("resourceNames"):
                yield f"{_id(item)}: all {', '.join(named)}"
            most = {"get", "list"}
            if rule["resources"] == ["serviceaccounts/token"]:
                most = {"create"}
            if "" in rule["apiGroups"] and set(rule["verbs"]) - most:
                yield f"{_id(item)}: more than a look at {', '.join(rule['resources'])}"


def networks(objects: list[Json]) -> Iterator[str]:
    """Policies name ports and correct addresses, and something denies by default."""
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    denying = [item for item in policies if not {"ingress", "egress"} & set(item["spec"])]
    if not any(set(item["spec"]["policyTypes"]) == {"Ingress", "Egress"} for item in denying):
        yield "no NetworkPolicy denies by default"
    for item in policies:
        for rule in item["spec"].get("ingress", []):
            if not rule.get("from"):
                yield f"{_id(item)}: a rule from anywhere"
        for rule in item["spec"].get("egress", []):
            if not rule.get("to"):
                yield f"{_id(item)}: a rule to anywhere"
            if not rule.get("ports"):
                yield f"{_id(item)}: a rule of all ports"
            for port in rule.get("ports", []):
                if not (isinstance(port["port"], int) and 0 < port["port"] < 65536):
                    yield f"{_id(item)}: port {port['port']!r}"
        for block in (value for key, value in _walk(item) if key == "ipBlock"):
            yield from (f"{_id(item)}: {wrong}" for wrong in _block(block))


def _block(block: Json) -> Iterator[str]:
    try:
        whole = ipaddress.ip_network(block["cidr"])
        for part in map(ipaddress.ip_network, block.get("except", [])):
            if part.version != whole.version or not part.subnet_of(whole):  # type: ignore[arg-type]
                yield f"{part} is not in {whole}"
    except ValueError as error:
        yield str(error)


def numbers(objects: list[Json]) -> Iterator[str]:
    """The policy of priorities says what the class says."""
    classes = {
        item["metadata"]["name"]: item for item in objects if item["kind"] == "PriorityClass"
    }
    for item in objects:
        if item["kind"] != "MutatingAdmissionPolicy":
            continue
        (mutation,) = item["spec"]["mutations"]
        text = mutation["jsonPatch"]["expression"]
        given = classes[item["metadata"]["name"]]
        for path, value in {
            "priorityClassName": f'"{given["metadata"]["name"]}"',
            "priority": str(given["value"]),
            "preemptionPolicy": f'"{given["preemptionPolicy"]}"',
        }.items():
            if f'path: "/spec/{path}", value: {value}}}' not in text:
                yield f"{_id(item)}: {path} is not the class's {value}"


def _references(item: Json) -> Iterator[tuple[str, str, str]]:
    """Kind, name and key (or none) of what an object refers to."""
    if item["kind"] == "RoleBinding":
        yield item["roleRef"]["kind"], item["roleRef"]["name"], ""
        yield from ((one["kind"], one["name"], "") for one in item["subjects"])
    if item["kind"] == "MutatingAdmissionPolicyBinding":
        yield "MutatingAdmissionPolicy", item["spec"]["policyName"], ""
    for key, value in _walk(item):
        if key in ("configMapKeyRef", "secretKeyRef"):
            kind = {"configMapKeyRef": "ConfigMap", "secretKeyRef": "Secret"}[key]
            yield kind, value["name"], "" if value.get("optional") else value["key"]
        if key == "serviceAccountName":
            yield "ServiceAccount", value, ""
        if key == "persistentVolumeClaim" and "claimName" in value:
            yield "PersistentVolumeClaim", value["claimName"], ""


def matches(selector: Json, pod: dict[str, str]) -> bool:
    """Whether a label selector chooses a pod with these labels."""
    for key, value in selector.get("matchLabels", {}).items():
        if pod.get(key) != value:
            return False
    for term in selector.get("matchExpressions", []):
        is_in = pod.get(term["key"]) in term.get("values", [])
        if term["operator"] == "Exists" and term["key"] not in pod:
            return False
        if (term["operator"] == "In" and not is_in) or (term["operator"] == "NotIn" and is_in):
            return False
    return True


def _templates(objects: list[Json]) -> dict[str, Json]:
    """Pod templates, by what has them."""
    found = {_id(item): item["spec"]["template"] for item in _deployments(objects)}
    for item in objects:
        if item["kind"] == "TrainingRuntime":
            found[_id(item)] = _job(item)["spec"]["template"]
    return found


def _job(runtime: Json) -> Json:
    """The Job template of a TrainingRuntime."""
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return tp.cast(Json, job["template"])


def _deployments(objects: list[Json]) -> list[Json]:
    return [item for item in objects if item["kind"] == "Deployment"]


def _containers(spec: Json) -> list[Json]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def _walk(value: tp.Any) -> Iterator[tuple[str, tp.Any]]:
    """All keys and values, at whatever depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)


def _id(item: Json) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"
