"""The objects of an installation."""

from __future__ import annotations

import json
import os
import re
import tempfile
import typing as tp
from pathlib import Path

from kubectl import InstallError, Json, Key, kustomize

HERE = Path(__file__).resolve().parent
OVERLAYS = sorted(path.parent.name for path in HERE.glob("overlays/*/kustomization.yaml"))
COMPONENTS = (
    "dedicated", "explorer", "jobs", "kfp-launcher", "priority", "tensorboard", "trainer",
)  # fmt: skip
"""Components that a user can name. The others are added where their files exist."""
SERVERS = {"explorer": "The explorer", "tensorboard": "TensorBoard"}
"""Components that run all the time in saev's image, and read the storage root."""

CONFIG_ENV = HERE / "components" / "settings" / "config.env"
STORAGE_ENV = HERE / "components" / "storage-secret" / "storage.env"
LAUNCHER = HERE / "components" / "kfp-launcher" / "kfp-launcher.yaml"


class Plan(tp.NamedTuple):
    """What to install where."""

    overlay: str
    namespace: str
    components: tuple[str, ...]
    kfp_namespace: str
    image: str
    gpus: int | None
    size: str
    storage_class: str
    settings: tp.Mapping[str, str] = {}
    """The steps' environment as the cluster has it, if this checkout has no config.env."""

    @property
    def has_volume(self) -> bool:
        """Whether the data is on a volume."""
        return self.overlay in ("pvc", "local")


def check(plan: Plan) -> None:
    """Refuse a plan that cannot work.

    Raises:
        InstallError: the message names the remedy.
    """
    if plan.overlay not in OVERLAYS:
        found = f"{plan.overlay!r} is unknown" if plan.overlay else "OVERLAY is not set"
        raise InstallError(f"{found}; say where data is kept: OVERLAY={'|'.join(OVERLAYS)}.")
    for name in plan.components:
        if name not in COMPONENTS:
            raise InstallError(
                f"There is no component {name!r}; there are {', '.join(COMPONENTS)}."
            )
    if plan.gpus is not None and plan.gpus < 0:
        raise InstallError(f"GPUS={plan.gpus} is less than 0.")
    if "dedicated" in plan.components and plan.namespace == plan.kfp_namespace:
        raise InstallError(
            f"Component dedicated denies by default to every pod of the namespace, and "
            f"{plan.namespace!r} is where Kubeflow Pipelines itself runs; leave it out, or install "
            f"into a profile's namespace with NAMESPACE=…."
        )
    if "kfp-launcher" in plan.components and not LAUNCHER.exists():
        raise InstallError(
            f"Component kfp-launcher needs {shown(LAUNCHER)}, which is missing; copy "
            f"kfp-launcher.example.yaml beside it and edit the copy."
        )
    for name, title in SERVERS.items():
        if name not in plan.components:
            continue
        if not plan.image:
            raise InstallError(f"{title} runs in saev's image; say which: IMAGE=registry/saev:…")
        if not plan.has_volume and "SAEV_ROOT" not in read_env(CONFIG_ENV):
            raise InstallError(
                f"{title} needs to know the storage root; set SAEV_ROOT in "
                f"{shown(CONFIG_ENV)} (example beside it)."
            )
    keys = read_env(STORAGE_ENV)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        if STORAGE_ENV.exists() and not keys.get(key):
            raise InstallError(f"{shown(STORAGE_ENV)} has no value for {key}; set it.")


def read_env(path: Path) -> dict[str, str]:
    """The KEY=VALUE lines of a file; none if the file is missing.

    Raises:
        InstallError: another line is no comment and not empty.
    """
    values = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, sign, value = line.partition("=")
        where = f"{shown(path)}, line {number}"
        if not sign or not re.fullmatch(r"[A-Z][A-Z0-9_]*", key):
            raise InstallError(f"{where} is not KEY=VALUE.")
        if value[:1] in "'\"" and value:
            raise InstallError(f"{where}: quotes would become part of {key}'s value; remove them.")
        if value != value.strip():
            raise InstallError(f"{where}: {key}'s value has spaces around it; remove them.")
        values[key] = value
    return values


def kustomizations(plan: Plan, folder: Path) -> dict[str, Json]:
    """The kustomizations of a plan: sub-folder of ``folder`` → content of its kustomization.yaml.

    There are two. In a single one, kustomize would write the namespace into cluster-wide objects of
    kinds that it does not know.
    """
    inner = folder / "namespaced"

    def path(*parts: str) -> str:
        return os.path.relpath(HERE.joinpath(*parts), inner)

    components = [name for name in plan.components if name != "priority"]
    if CONFIG_ENV.exists():
        components.insert(0, "settings")
    if STORAGE_ENV.exists():
        components.append("storage-secret")
    if plan.has_volume:
        components += [f"{name}-volume" for name in SERVERS if name in components]
    head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    namespaced: Json = {
        **head,
        "namespace": plan.namespace,
        "resources": [path("overlays", plan.overlay)],
        "components": [path("components", name) for name in components],
        "patches": patches(plan, components),
    }
    if plan.image:
        name, tag, digest = split_image(plan.image)
        image = {"name": "saev", "newName": name}
        namespaced["images"] = [image | ({"digest": digest} if digest else {"newTag": tag})]
    everything: Json = {**head, "resources": [inner.name]}
    if "priority" in plan.components:
        everything["components"] = [os.path.relpath(HERE / "components" / "priority", folder)]
    return {".": everything, inner.name: namespaced}


def patches(plan: Plan, components: tp.Sequence[str]) -> list[Json]:
    """The patches for the variables of `make install`."""
    made = []

    def replace(kind: str, name: str, path: str, value: str, operation: str = "replace") -> None:
        patch = json.dumps([{"op": operation, "path": path, "value": value}])
        made.append({"target": {"kind": kind, "name": name}, "patch": patch})

    if plan.gpus is not None and plan.overlay != "local":
        key = "/spec/hard/requests.nvidia.com~1gpu"
        replace("ResourceQuota", "saev-gpus", key, str(plan.gpus))
    if plan.has_volume and plan.size:
        key = "/spec/resources/requests/storage"
        replace("PersistentVolumeClaim", "saev-data", key, plan.size)
    if plan.has_volume and plan.storage_class:
        key = "/spec/storageClassName"
        replace("PersistentVolumeClaim", "saev-data", key, plan.storage_class, "add")
    if plan.settings:
        merged = {"data": dict(plan.settings)}
        target = {"kind": "ConfigMap", "name": "saev-config"}
        head = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "saev-config"}}
        made.append({"target": target, "patch": json.dumps({**head, **merged})})
    if plan.kfp_namespace != "kubeflow":
        selector = "namespaceSelector/matchLabels/kubernetes.io~1metadata.name"
        for policy in ("saev-kfp", "saev-schedule"):
            key = f"/spec/egress/0/to/0/{selector}"
            replace("NetworkPolicy", policy, key, plan.kfp_namespace)
        if "dedicated" in components:
            for policy in ("kfp-runs", "kfp-profile"):
                key = f"/spec/egress/0/to/0/{selector}"
                replace("NetworkPolicy", policy, key, plan.kfp_namespace)
            key = f"/spec/ingress/0/from/0/{selector}"
            replace("NetworkPolicy", "kfp-profile", key, plan.kfp_namespace)
    return made


def split_image(image: str) -> tuple[str, str, str]:
    """Name, tag and digest of an image's address.

    Raises:
        InstallError: it has no digest, and no tag but latest.
    """
    name, _, digest = image.partition("@")
    slash = name.rfind("/")
    name, _, tag = (name, "", "") if ":" not in name[slash + 1 :] else name.rpartition(":")
    if not digest and tag in ("", "latest"):
        raise InstallError(f"IMAGE={image} names no fixed version; give a tag or @sha256:….")
    return name, tag, digest


def render(plan: Plan) -> str:
    """All objects of a plan, as YAML.

    Raises:
        InstallError: kubectl refuses a kustomization.
    """
    with tempfile.TemporaryDirectory(prefix="saev-") as made:
        folder = Path(made).resolve()
        for name, content in kustomizations(plan, folder).items():
            (folder / name).mkdir(exist_ok=True)
            text = json.dumps(content, indent=1)
            (folder / name / "kustomization.yaml").write_text(text, encoding="utf-8")
        return kustomize(folder)


def keys_in(text: str) -> list[Key]:
    """Kind and name of each object in YAML that is laid out as kustomize and k8s/ do it.

    Python's standard library cannot read YAML, and kubectl needs a cluster to convert it.
    """
    found = []
    for one in text.split("\n---\n"):
        kind = re.search(r"^kind: (\S+)$", one, re.MULTILINE)
        name = re.search(r"^metadata:\n(?: .*\n)*?  name: (\S+)$", one, re.MULTILINE)
        if kind and name:
            found.append((kind[1], name[1]))
    return found


def keys_of_component(name: str) -> set[Key]:
    """Kind and name of each object that a component has or changes."""
    files = (HERE / "components" / name).glob("*.yaml")
    return {key for path in files for key in keys_in(path.read_text(encoding="utf-8"))}


def shown(path: Path) -> str:
    """A path as it is called in the documentation."""
    return f"k8s/{path.relative_to(HERE)}"
