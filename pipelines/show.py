"""Finds the page of a run, or of the storage root, for `make show`."""

from pipelines import called, runs
from pipelines.connect import connect
from pipelines.errors import ClusterError
from pipelines.settings import Settings
from saev.errors import ConfigError


def place(which: str, settings: Settings) -> str:
    """URL of the folder whose page is shown.

    Args:
        which: the URL of a page or of its folder; or a pipeline run, as `runs.find` takes it; or
            "" for the root of the settings.
        settings: the cluster.

    Raises:
        ConfigError: there is no root, or it is on the pods' volume.
        ClusterError: there is no such run.
    """
    is_run = "/runs/details/" in which or ("/" not in which and which)
    if which and not is_run:
        return which
    root = _root_of(which, settings) if which else settings.root
    if not root:
        raise ConfigError(
            "No run and no URL is named, and no root is set. Set SAEV_ROOT (root in cluster.toml), "
            f"or name one: `{called.by('show', '…')}`."
        )
    if "://" not in root and settings.storage == "pvc":
        raise ConfigError(
            f"{root} is on the pods' volume, which this machine does not see. Copy it from a pod "
            "that mounts the volume (`kubectl cp`), and open its index.html."
        )
    return root


def _root_of(which: str, settings: Settings) -> str:
    with connect(settings) as kfp:
        run = runs.find(kfp, which)
    root = runs.parameter(run, "root")
    if not root:
        raise ClusterError(f"Run {run.display_name} has no parameter root, so it is none of saev.")
    return str(root)
