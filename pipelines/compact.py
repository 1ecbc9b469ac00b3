"""Makes a compiled pipeline smaller, and gives its loops and inputs readable names.

Kubernetes keeps a run in one object of at most 1 MiB. The backend repeats each component and each
task in it for every pod and every iteration (docs/pipeline.md has the figures). So everything that
the backend does not read is removed: descriptions, which the UI does not show either, and entries
that kfp writes twice. KFP's UI shows loops as `for-loop-1` and their inputs as
`pipelinechannel--plan-extract-loop-item`. Here, loops get the names that the pipeline gives them,
and their inputs are called `slot`.
"""

import typing as tp

import yaml

Tree = tp.Any

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Reads YAML ten times as fast where PyYAML was built with libyaml, which its wheels are.

Texts are still written by the slow one: libyaml breaks long lines elsewhere, which would make a new
version of every pipeline.
"""

_CHANNEL = "pipelinechannel--"
_ITEM = "-loop-item"

_RESOURCES = {
    "accelerator_count", "accelerator_type", "cpu_limit", "cpu_request", "memory_limit",
    "memory_request",
}  # fmt: skip
_OLD_RESOURCES = ("cpuLimit", "cpuRequest", "memoryLimit", "memoryRequest")
"""Duplicates of `resourceCpuLimit` and so on, for backends before KFP 2.4."""
_OLD_ACCELERATOR = ("count", "type")
"""Duplicates of `resourceCount` and `resourceType` of an accelerator, for the same backends."""
_OLD_NAMES = ("secretName", "configMapName")
"""Duplicates of `secretNameParameter` and `configMapNameParameter`, for older backends."""


def compact(text: str) -> str:
    """The same pipeline, smaller. YAML comments are dropped: they differ at every compilation.

    Args:
        text: the YAML of kfp's compiler.
    """
    spec, *platforms = yaml.load_all(text, LOADER)
    for component in spec["components"].values():
        for side in ("inputDefinitions", "outputDefinitions"):
            for kind in component.get(side, {}).values():
                for definition in kind.values():
                    definition.pop("description", None)
        for task in component.get("dag", {}).get("tasks", {}).values():
            _drop_resources(task, spec["components"][task["componentRef"]["name"]])
    for component in (spec["root"], *spec["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            if task.get("cachingOptions") == {}:  # means the same as a missing key
                del task["cachingOptions"]
    for executor in spec["deploymentSpec"]["executors"].values():
        resources = executor["container"].get("resources", {})
        for key in _OLD_RESOURCES:
            resources.pop(key, None)
        for key in _OLD_ACCELERATOR:
            resources.get("accelerator", {}).pop(key, None)
    for platform in platforms:
        _drop_old_names(platform)
    names = {**_loops(spec), **_inputs(spec)}
    return "---\n".join(yaml.safe_dump(_renamed(d, names)) for d in (spec, *platforms))


def _drop_resources(task: Tree, component: Tree) -> None:
    """Remove a task's inputs that kfp adds for resources. Neither component nor pod reads them.

    A pod's resources refer to parameters of the graph, and kfp makes these inputs of the task.
    """
    known = component.get("inputDefinitions", {}).get("parameters", {})
    inputs = task.get("inputs", {}).get("parameters", {})
    for name in _RESOURCES & (inputs.keys() - known.keys()):
        del inputs[name]


def _drop_old_names(tree: Tree) -> None:
    if isinstance(tree, dict):
        for key in _OLD_NAMES:
            if f"{key}Parameter" in tree:
                tree.pop(key, None)
    for inner in (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    ):
        _drop_old_names(inner)


def _loops(spec: Tree) -> dict[str, str]:
    """kfp's names of loops and groups → the names that the pipeline gives them.

    This also renames the tasks, because their keys are unique only within their graph.
    """
    components: dict[str, str] = {}
    dags = [spec["root"], *spec["components"].values()]
    for dag in (d["dag"] for d in dags if "dag" in d):
        keys = {}
        for key, task in dag["tasks"].items():
            if key.startswith(("for-loop-", "exit-handler-")):
                keys[key] = task["taskInfo"]["name"]
                components[task["componentRef"]["name"]] = f"comp-{keys[key]}"
        dag["tasks"] = _renamed(dag["tasks"], keys)
    assert len(set(components.values())) == len(components), "two loops of one name"
    assert not set(components.values()) & spec["components"].keys(), "a loop named like a step"
    return components


def _inputs(spec: Tree) -> dict[str, str]:
    """kfp's names of the inputs of graphs → readable names.

    `slot` is the item of a loop, and `slots` is the list that the loop runs over. Inputs of the
    pipeline and outputs of steps keep their own names.
    """
    names: dict[str, str] = {}
    for component in spec["components"].values():
        found = component.get("inputDefinitions", {}).get("parameters", {})
        channels = [name for name in found if name.startswith(_CHANNEL)]
        items = {name for name in channels if name.endswith(_ITEM)}
        lists = {name.removesuffix(_ITEM) for name in items}
        for name in channels:
            own = name.removeprefix(_CHANNEL).rpartition("-")[2]  # without the producer's name
            short = "slot" if name in items else "slots" if name in lists else own
            assert names.setdefault(name, short) == short, f"{name} is a list here, and not there"
        assert len({names.get(name, name) for name in found}) == len(found), (
            "two inputs of one name"
        )
    return names


def _renamed(tree: Tree, names: dict[str, str]) -> Tree:
    """The tree with all names replaced, in keys, in texts and in placeholders."""
    if isinstance(tree, dict):
        return {names.get(k, k): _renamed(value, names) for k, value in tree.items()}
    if isinstance(tree, list):
        return [_renamed(value, names) for value in tree]
    return _text(tree, names) if isinstance(tree, str) else tree


def _text(text: str, names: dict[str, str]) -> str:
    if text in names:
        return names[text]
    for name, short in names.items() if _CHANNEL in text else ():
        text = text.replace(f"['{name}']", f"['{short}']")
    return text
