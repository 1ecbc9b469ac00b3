"""Starts work from a pod of the pipeline: objects of Kubernetes, or runs of Kubeflow.

No other package of saev sends requests to either. The package `kubernetes` takes a second to
import, so it is imported with the first request.

    pods.py      the template of a step's pod
    cluster.py   requests to the Kubernetes API, from inside a pod
    follow.py    make an object or adopt it, follow it, stop it
    lines.py     which lines of the pods' logs are passed on
    jobs.py      an Indexed Job: one pod for each slot
    runs.py      runs of Kubeflow Pipelines: list, start, retry
    explain.py   one sentence for each error of an API
    outcomes.py  reads from storage why a run failed
"""
