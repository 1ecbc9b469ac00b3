"""What a schedule does each time: one run for each dataset that is complete and new."""

from kfp import dsl

from components.step import CPU_IMAGE, spec


@dsl.container_component
def fire(
    dataset: str,
    root: str,
    config: dict,
    owner: str,
    marker: str,
    settle_minutes: float,
    claim_hours: float,
    max_datasets: int,
    max_retries: int,
    start: dict,
    runs: dsl.OutputPath(list),
):
    """Find datasets, claim those that are complete and not processed, and start a run of each.

    Args:
        dataset: URL of the folder whose folders are datasets.
        root: URL of the storage root.
        config: what `saev run --config` takes, as JSON.
        owner: id of the pipeline run; claims are made in its name.
        marker: name of the object whose presence says that a dataset is complete; empty goes by
            settle_minutes.
        settle_minutes: a dataset is complete when nothing in it has changed for so long.
        claim_hours: how long a claim holds if its owner is not heard of.
        max_datasets: most runs of datasets below the prefix that are unfinished at a time.
        max_retries: how often a failed run is retried.
        start: which pipeline's version is started, and where; {} starts nothing.
        runs: id, dataset and claim of each run that was started.
    """
    return spec(
        CPU_IMAGE,
        "fire",
        dataset=dataset,
        root=root,
        config=config,
        owner=owner,
        marker=marker,
        settle_minutes=settle_minutes,
        claim_hours=claim_hours,
        max_datasets=max_datasets,
        max_retries=max_retries,
        start=start,
        to_runs=runs,
    )
