"""The training stage: many SAEs on the same batches.

``run`` does all of it. ``plan`` lists the work items (groups of SAEs that share their batches),
``work`` trains and publishes one of them, ``finish`` checks that all are there.
"""

from saev.train.stage import finish, plan, run, work

__all__ = ["finish", "plan", "run", "work"]
