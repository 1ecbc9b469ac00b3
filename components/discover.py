"""Which images there are to process."""

from kfp import dsl

from components.step import CPU_IMAGE, spec


@dsl.container_component
def discover(
    dataset: str,
    root: str,
    config: dict,
    owner: str,
    claim: dict,
    claim_hours: float,
    job: dsl.OutputPath(str),
):
    """Fingerprint the listing of a dataset, claim it, and write down the job.

    Args:
        dataset: URL of the dataset; empty: the images that the config's [data] table names.
        root: URL of the storage root.
        config: what `saev run --config` takes, as JSON. It is stored below the root, so that no
            other step has it as an input.
        owner: id of the pipeline run; the claim is made in its name.
        claim: what a firing has claimed for this run; {} claims now.
        claim_hours: how long a claim holds if its owner is not heard of.
        job: URL of the job.
    """
    return spec(
        CPU_IMAGE,
        "discover",
        dataset=dataset,
        root=root,
        config=config,
        owner=owner,
        claim=claim,
        claim_hours=claim_hours,
        to_job=job,
    )
