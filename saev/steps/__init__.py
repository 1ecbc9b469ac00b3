"""The pipeline's steps: what a pod does between two looks at storage.

Each is one `saev step` command, around the items of a stage or their publishing for instance. None
of them knows Kubernetes or KFP, but for the one file format in `outputs`.
"""
