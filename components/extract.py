"""Images → activations."""

from kfp import dsl

from components.step import GPU_IMAGE, spec


@dsl.container_component
def extract(root: str, config: dict, dataset: str, owner: str, shards: str, item: str):
    """Record the activations of one part of a dataset.

    Args:
        root: URL of the storage root.
        config: what `saev run --config` takes, as JSON.
        dataset: one of discover's datasets.
        owner: id of the pipeline run.
        shards: URL of the shards folder, as planned; another one means that the dataset changed.
        item: one of plan_shards' parts.
    """
    return spec(
        GPU_IMAGE,
        "extract",
        root=root,
        config=config,
        dataset=dataset,
        owner=owner,
        shards=shards,
        item=item,
    )
