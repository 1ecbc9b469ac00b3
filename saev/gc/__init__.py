"""Clean-up of a storage root: `saev gc`.

    scan      one listing of shards, runs and datasets
    facts     what the runs refer to, who holds a claim
    choose    what may go, and what is kept for which reason
    remove    closing object first, so that what is half deleted never looks complete
    command   table or JSON, question, deletion

Nothing here needs torch.
"""

from saev.gc.command import clean_up

__all__ = ["clean_up"]
