"""SAE and activations → codes and statistics."""

from kfp import dsl

from components.step import GPU_IMAGE, spec


@dsl.container_component
def infer(root: str, config: dict, dataset: str, owner: str, shards: str, item: str):
    """Run one SAE over one part of the activations.

    Args:
        root: URL of the storage root.
        config: what `saev run --config` takes, as JSON.
        dataset: one of discover's datasets.
        owner: id of the pipeline run.
        shards: URL of the shards folder.
        item: one of plan_inference's parts.
    """
    return spec(
        GPU_IMAGE,
        "infer",
        root=root,
        config=config,
        dataset=dataset,
        owner=owner,
        shards=shards,
        item=item,
    )
