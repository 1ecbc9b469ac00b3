"""How much a job takes: `saev size`.

    models    widths and tokens of common vision transformers
    inputs    from flags and files to what the stages would be told
    formats   sizes of the files that the stages write
    estimate  the numbers
    rows      each with how sure it is, and in words where it comes from
    command   tables or JSON

Nothing here needs torch, except where a model is to be built.
"""

from saev.size.command import run

__all__ = ["run"]
