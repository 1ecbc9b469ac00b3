"""All SAEs of a dataset beside each other."""

from kfp import dsl

from components.step import CPU_IMAGE, EXECUTOR_INPUT, spec


@dsl.container_component
def report(
    job: str,
    metrics: dsl.Output[dsl.Metrics],
    sae_table: dsl.Output[dsl.Markdown],
    sae_overview: dsl.Output[dsl.HTML],
):
    """Compare the SAEs, write the root's index.html, and mark the dataset as processed.

    Args:
        job: one of discover's jobs.
        metrics: the best SAE: its name, NMSE, L0.
        sae_table: all SAEs, best first, and where everything is.
        sae_overview: the same SAEs, and NMSE against L0 with the Pareto front.
    """
    return spec(
        CPU_IMAGE,
        "report",
        job=job,
        to_page=sae_overview.path,
        to_table=sae_table.path,
        executor_input=EXECUTOR_INPUT,
    )
