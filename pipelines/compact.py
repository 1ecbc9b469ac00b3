"""Makes a compiled pipeline smaller, and its names speak.

Kubernetes holds a run in one object of at most 1 MiB, and the backend repeats each component there
for every pod and every iteration: so components lose the descriptions of their parameters, which
the UI does not show. KFP calls loops `for-loop-1` wherever its UI shows a path; here they are
called by the names that the pipeline gives them.
"""

import typing as tp

import yaml

Tree = tp.Any

_RESOURCES = {
    "accelerator_count", "accelerator_type", "cpu_limit", "cpu_request", "memory_limit",
    "memory_request",
}  # fmt: skip


def compact(text: str) -> str:
    """The same pipeline: YAML without comments, which say nothing and differ at every compilation.

    Args:
        text: what kfp's compiler wrote.
    """
    spec, *platforms = yaml.safe_load_all(text)
    for component in spec["components"].values():
        for side in ("inputDefinitions", "outputDefinitions"):
            for kind in component.get(side, {}).values():
                for definition in kind.values():
                    definition.pop("description", None)
    for component in spec["components"].values():
        for task in component.get("dag", {}).get("tasks", {}).values():
            _drop_resources(task, spec["components"][task["componentRef"]["name"]])
    return "---\n".join(yaml.safe_dump(d) for d in (_named(spec), *platforms))


def _drop_resources(task: Tree, component: Tree) -> None:
    """Remove inputs that kfp adds for resources, and that neither component nor pod reads.

    A pod's resources name the parameters of the graph, which are inputs of the task as well.
    """
    known = component.get("inputDefinitions", {}).get("parameters", {})
    inputs = task.get("inputs", {}).get("parameters", {})
    for name in _RESOURCES & (inputs.keys() - known.keys()):
        del inputs[name]


def _named(spec: Tree) -> Tree:
    """The specification with loops and groups that are called by their names."""
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
    return _renamed(spec, components)


def _renamed(tree: Tree, names: dict[str, str]) -> Tree:
    """All keys and texts that are names, replaced."""
    if isinstance(tree, dict):
        return {names.get(k, k): _renamed(value, names) for k, value in tree.items()}
    if isinstance(tree, list):
        return [_renamed(value, names) for value in tree]
    return names.get(tree, tree) if isinstance(tree, str) else tree
