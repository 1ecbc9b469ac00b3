"""What there is to do: the lists that the pipeline fans out over."""

from kfp import dsl

from components.step import GPU_IMAGE, spec


@dsl.container_component
def plan_shards(
    root: str,
    config: dict,
    dataset: str,
    owner: str,
    n_parts: int,
    shards: dsl.OutputPath(str),
    items: dsl.OutputPath(list),
):
    """Name the shards folder of a dataset, and cut what is not recorded yet into parts.

    Loads the model (on the CPU) for its shapes and the checksum of its weights.

    Args:
        root: URL of the storage root.
        config: what `saev run --config` takes, as JSON.
        dataset: one of discover's datasets.
        owner: id of the pipeline run.
        n_parts: most parts, that is pods.
        shards: URL of the shards folder.
        items: the parts, a list of JSON texts {name, part}; empty if all is recorded.
    """
    return spec(
        GPU_IMAGE,
        "plan-shards",
        root=root,
        config=config,
        dataset=dataset,
        owner=owner,
        n_parts=n_parts,
        to_shards=shards,
        to_items=items,
    )


@dsl.container_component
def plan_training(
    root: str,
    config: dict,
    dataset: str,
    owner: str,
    shards: str,
    items: dsl.OutputPath(list),
):
    """Resolve the sweep into groups of SAEs that share their batches.

    Args:
        root: URL of the storage root.
        config: what `saev run --config` takes, as JSON.
        dataset: one of discover's datasets.
        owner: id of the pipeline run.
        shards: URL of the shards folder.
        items: the groups that are not trained yet, a list of JSON
            texts {name, group}.
    """
    return spec(
        GPU_IMAGE,
        "plan-training",
        root=root,
        config=config,
        dataset=dataset,
        owner=owner,
        shards=shards,
        to_items=items,
    )


@dsl.container_component
def plan_inference(
    root: str,
    config: dict,
    dataset: str,
    owner: str,
    shards: str,
    n_parts: int,
    runs: dsl.OutputPath(list),
    items: dsl.OutputPath(list),
):
    """List the trained SAEs, and cut the passes that are not done yet into parts.

    Args:
        root: URL of the storage root.
        config: what `saev run --config` takes, as JSON.
        dataset: one of discover's datasets.
        owner: id of the pipeline run.
        shards: URL of the shards folder.
        n_parts: most parts of one SAE's pass.
        runs: URLs of all runs of the sweep, in its order.
        items: the parts, a list of JSON texts {name, run, part}.
    """
    return spec(
        GPU_IMAGE,
        "plan-inference",
        root=root,
        config=config,
        dataset=dataset,
        owner=owner,
        shards=shards,
        n_parts=n_parts,
        to_runs=runs,
        to_items=items,
    )
