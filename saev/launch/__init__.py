"""Work that a pod of the pipeline starts as objects of Kubernetes, and follows to its end.

This is the only place of saev that speaks to Kubernetes. `kubernetes`, which takes a second to
import, is imported when the first request is made.

    pods.py      a step's pod, as KFP makes it
    cluster.py   requests to the Kubernetes API, from inside a pod
    follow.py    make an object or adopt it, follow it, stop it
    lines.py     what is passed on of the logs of its pods
    jobs.py      an Indexed Job: one pod for each slot
"""
