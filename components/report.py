"""All SAEs of a dataset beside each other."""

from kfp import dsl

from components.step import CPU_IMAGE, EXECUTOR_INPUT, spec


@dsl.container_component
def report(
    root: str,
    config: dict,
    dataset: str,
    owner: str,
    shards: str,
    runs: list,
    metrics: dsl.Output[dsl.Metrics],
    page: dsl.Output[dsl.HTML],
):
    """Compare the SAEs, write the root's index.html, and mark the dataset as processed.

    Args:
        root: URL of the storage root.
        config: what `saev run --config` takes, as JSON.
        dataset: one of discover's datasets.
        owner: id of the pipeline run.
        shards: URL of the shards folder.
        runs: plan_inference's runs.
        metrics: number of SAEs, lowest NMSE.
        page: a table of all SAEs, and NMSE against L0 with the Pareto front.
    """
    return spec(
        CPU_IMAGE,
        "report",
        root=root,
        config=config,
        dataset=dataset,
        owner=owner,
        shards=shards,
        runs=runs,
        to_page=page.path,
        executor_input=EXECUTOR_INPUT,
    )
