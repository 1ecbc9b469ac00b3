"""Names of the objects in an inference folder."""

CONFIG = "config.json"
METRICS = "metrics.json"
"""Written last."""
SPARSITY = "sparsity.safetensors"
MEAN_VALUES = "mean_values.safetensors"
TOP_EXAMPLES = "top_examples.safetensors"
DISTRIBUTIONS = "distributions.npz"
TOKEN_ACTS = "token_acts.npz"
CONCEPTS = "concepts.json"
PARTS = "parts"
"""Folder of what work items leave for `finish`; gone once the result is published."""

REMEDY = (
    "Restore it from a copy, or delete the folder and run the same `saev inference` command again."
)
"""What to do about damage."""
