"""Activations → SAEs."""

from kfp import dsl

from components.step import GPU_IMAGE, spec


@dsl.container_component
def train(root: str, config: dict, dataset: str, owner: str, shards: str, item: str):
    """Train one group of SAEs on the same batches; continues from its newest resume point.

    Args:
        root: URL of the storage root.
        config: what `saev run --config` takes, as JSON.
        dataset: one of discover's datasets.
        owner: id of the pipeline run.
        shards: URL of the shards folder.
        item: one of plan_training's groups.
    """
    return spec(
        GPU_IMAGE,
        "train",
        root=root,
        config=config,
        dataset=dataset,
        owner=owner,
        shards=shards,
        item=item,
    )
