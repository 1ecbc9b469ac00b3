"""The steps of the pipeline. Each step is one `saev step` command, which a pod runs.

A step reads its work from storage, does it, and writes the results to storage. For example, a step
does some items of a stage, or publishes the stage's result. Steps do not know KFP, except for one
file format in `outputs`. Only `launching` and `fire` start work on the cluster, through
`saev.launch`.
"""
