"""Which datasets there are to process."""

from kfp import dsl

from components.step import CPU_IMAGE, spec


@dsl.container_component
def discover(
    dataset: str,
    root: str,
    config: dict,
    owner: str,
    mode: str,
    marker: str,
    settle_minutes: float,
    claim_hours: float,
    max_datasets: int,
    job: dsl.OutputPath(str),
    jobs: dsl.OutputPath(list),
):
    """Find datasets, fingerprint their listings, claim what is not processed, and write down jobs.

    Args:
        dataset: URL of a dataset (mode one), or of the folder whose folders are datasets (mode
            incoming). Empty: the images that the config's [data] table names.
        root: URL of the storage root.
        config: what `saev run --config` takes, as JSON. It is stored below the root, so that no
            other step has it as an input.
        owner: id of the pipeline run; claims are made in its name.
        mode: one or incoming.
        marker: name of the object whose presence says that a dataset is complete; empty goes by
            settle_minutes.
        settle_minutes: a dataset is complete when nothing in it has changed for so long.
        claim_hours: how long a claim holds if its owner is not heard of.
        max_datasets: most datasets of one firing.
        job: URL of the first dataset's job.
        jobs: URLs of all jobs.
    """
    return spec(
        CPU_IMAGE,
        "discover",
        dataset=dataset,
        root=root,
        config=config,
        owner=owner,
        mode=mode,
        marker=marker,
        settle_minutes=settle_minutes,
        claim_hours=claim_hours,
        max_datasets=max_datasets,
        to_job=job,
        to_jobs=jobs,
    )
