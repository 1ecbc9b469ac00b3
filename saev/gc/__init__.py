"""Clean-up of a storage root: `saev gc`.

    scan      one listing of shards, runs and datasets
    facts     what the runs refer to, who holds a claim
    choose    what may be deleted, what is kept, and why
    remove    deletes the closing object first, so that a half-deleted folder is not complete
    command   prints a table or JSON, asks, deletes

Nothing here needs torch.
"""

from saev.gc.command import clean_up

__all__ = ["clean_up"]
