"""All parts → one complete shards folder."""

from kfp import dsl

from components.step import EXECUTOR_INPUT, GPU_IMAGE, spec


@dsl.container_component
def publish(
    root: str,
    config: dict,
    dataset: str,
    owner: str,
    shards: str,
    metrics: dsl.Output[dsl.Metrics],
    published: dsl.OutputPath(str),
):
    """Verify every part, check that the dataset is still what was recorded, and publish.

    Args:
        root: URL of the storage root.
        config: what `saev run --config` takes, as JSON.
        dataset: one of discover's datasets.
        owner: id of the pipeline run.
        shards: URL of the shards folder, as planned.
        metrics: number of examples, tokens, shards and bytes.
        published: URL of the complete shards folder.
    """
    return spec(
        GPU_IMAGE,
        "publish",
        root=root,
        config=config,
        dataset=dataset,
        owner=owner,
        shards=shards,
        to_shards=published,
        executor_input=EXECUTOR_INPUT,
    )
