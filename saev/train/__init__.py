"""The training stage: many SAEs on the same batches.

``plan`` → work items (groups of SAEs that share their batches), ``work`` trains and publishes one
group, ``finish`` checks that all are there. ``run`` is all three.
"""

from saev.train.stage import finish, plan, run, work

__all__ = ["finish", "plan", "run", "work"]
