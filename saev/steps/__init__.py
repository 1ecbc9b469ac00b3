"""The pipeline's steps: what a pod does between two looks at storage.

Each is one `saev step` command around a stage's plan, work or finish. None of them knows Kubernetes
or KFP, but for the one file format in `outputs`.
"""
