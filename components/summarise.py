"""What one SAE learned: its figures and its picture book."""

from kfp import dsl

from components.step import EXECUTOR_INPUT, GPU_IMAGE, spec


@dsl.container_component
def summarise(
    root: str,
    config: dict,
    dataset: str,
    owner: str,
    shards: str,
    run: str,
    metrics: dsl.Output[dsl.Metrics],
    page: dsl.Output[dsl.HTML],
):
    """Merge the parts of one SAE's pass exactly, and draw what its latents respond to.

    Args:
        root: URL of the storage root.
        config: what `saev run --config` takes, as JSON.
        dataset: one of discover's datasets.
        owner: id of the pipeline run.
        shards: URL of the shards folder.
        run: URL of the SAE's run folder.
        metrics: NMSE, L0, dead and dense latents, and concept alignment where there are labels.
        page: the first latents of the picture book, in one self-contained file.
    """
    return spec(
        GPU_IMAGE,
        "summarise",
        root=root,
        config=config,
        dataset=dataset,
        owner=owner,
        shards=shards,
        run=run,
        to_page=page.path,
        executor_input=EXECUTOR_INPUT,
    )
