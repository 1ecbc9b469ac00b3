"""`saev size`: estimates storage, memory and time of a job.

    models    widths and tokens of common vision transformers
    inputs    converts flags and files to the configs of the stages
    formats   sizes of the files that the stages write
    estimate  computes the numbers
    rows      a number with its certainty and an explanation
    command   prints tables or JSON

Only --load-model needs torch.
"""

from saev.size.command import print_sizes

__all__ = ["print_sizes"]
