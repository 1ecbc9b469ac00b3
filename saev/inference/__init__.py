"""The inference stage: runs SAEs over all activations, in one pass with bounded memory.

:func:`run` measures one SAE. :func:`run_all` measures several SAEs and reads the activations once.
`saev.inference.results` reads what they wrote, without torch.
"""

import typing as tp

if tp.TYPE_CHECKING:
    from saev.inference.stage import find, finish, n_pieces, plan, run, run_all, work

__all__ = ["find", "finish", "n_pieces", "plan", "run", "run_all", "work"]


def __getattr__(name: str) -> tp.Any:
    # Lazily, so that `saev.inference.results` does not load torch.
    if name in __all__:
        from saev.inference import stage

        return getattr(stage, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
