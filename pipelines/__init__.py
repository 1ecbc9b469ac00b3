"""The pipelines on Kubeflow: compile, submit, schedule, watch, run locally."""
