"""A launching pod's process: makes or adopts an Indexed Job of two slots, and follows it.

KUBECONFIG=… KFP_POD_NAME=… python launching.py NAMESPACE RUN_ID
"""

import sys

from kubernetes import config

from saev import interrupts
from saev.launch import follow
from saev.launch.cluster import Cluster, Me
from saev.launch.jobs import Slots
from saev.launch.pods import PodSettings
from saev.progress import Progress, log_to

ME = Me("default", None)


def slots(run_id: str, *, n: int = 2, me: Me = ME, queue: str = "") -> Slots:
    """A Job's pods that never really run."""
    settings = PodSettings(step="train", image="saev:x", gpus=1, timeout_seconds=60, retries=1)
    command = ["saev", "step", "train", '--slot={"slot": $(JOB_COMPLETION_INDEX)}']
    return Slots(
        settings, command, n_slots=n, parallelism=8, job="j", run_id=run_id, me=me, queue=queue
    )


def main(namespace: str, run_id: str) -> None:
    """Follow it to its end."""
    log_to(Progress(quiet=True))
    interrupts.unwind()
    cluster = Cluster(config.new_client_from_config(), namespace)
    follow.run(cluster, slots(run_id, me=cluster.me()), Progress(quiet=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
