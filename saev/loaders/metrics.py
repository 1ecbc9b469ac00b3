"""How well a batch is mixed: entropy and coverage of its examples and tokens.

Names and definitions are those of docs/metrics.md. Logarithms are natural. A normalised entropy is
divided by the entropy of the uniform distribution over the support. Coverage is the share of the
support that occurs. For B rows drawn uniformly from K values, the expected normalised entropy is
about 1 - (K - 1) / (2 B ln K) if B > K, and at most ln B / ln K.
"""

import math

import torch
from jaxtyping import Int64
from torch import Tensor

from saev.loaders.batches import Batch


def batch_metrics(batch: Batch, *, n_examples: int, content_tokens: int) -> dict[str, float]:
    """``loader/…`` entropies and coverages of one batch.

    Args:
        batch: the batch.
        n_examples: examples that may occur (of the dataset, or of the selected split).
        content_tokens: content tokens per example.

    Returns:
        loader/example_{entropy,entropy_normalized,coverage} and, if the batch has content tokens,
        loader/token_{…}. Class tokens have no position and are not counted for the latter. The
        normalised entropy over a support of one value is 1.
    """
    # Sorting thousands of rows is cheaper than counters for millions of examples.
    examples = torch.unique(batch.example_idx, return_counts=True)[1]
    metrics = _metrics("example", examples, n_examples)
    tokens = batch.token_idx[batch.token_idx >= 0]
    if len(tokens):
        counts = torch.bincount(tokens, minlength=content_tokens)
        metrics |= _metrics("token", counts[counts > 0], content_tokens)
    return metrics


def entropy(counts: Int64[Tensor, "values"]) -> float:
    """Shannon entropy in nats of a distribution given by positive counts."""
    p = counts.double() / counts.sum()
    return max(0.0, float(-(p * p.log()).sum()))


def _metrics(name: str, counts: Tensor, support: int) -> dict[str, float]:
    value = entropy(counts)
    return {
        f"loader/{name}_entropy": value,
        f"loader/{name}_entropy_normalized": value / math.log(support) if support > 1 else 1.0,
        f"loader/{name}_coverage": len(counts) / support,
    }
