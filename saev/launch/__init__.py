"""Work that a pod of the pipeline starts, as objects of Kubernetes or as runs of Kubeflow.

This is the only place of saev that speaks to either. `kubernetes`, which takes a second to
import, is imported when the first request is made.

    pods.py      a step's pod, as KFP makes it
    cluster.py   requests to the Kubernetes API, from inside a pod
    follow.py    make an object or adopt it, follow it, stop it
    lines.py     what is passed on of the logs of its pods
    jobs.py      an Indexed Job: one pod for each slot
    runs.py      runs of Kubeflow Pipelines: list, start, retry
    explain.py   one sentence for what an API answers
    outcomes.py  why a run failed, from storage
"""
