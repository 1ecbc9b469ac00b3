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
TABLES = "tables.json"
"""The list of the tables. saev.parquet has the same name, and needs pyarrow."""
PARTS = "parts"
"""Folder of intermediate files: work items write them, `finish` merges and deletes them."""

REMEDY = (
    "Restore it from a copy, or delete the folder and run the same `saev inference` command again."
)
"""The remedy in errors about damaged files."""
