"""The inference stage: run one SAE over all activations, in one pass whose memory does not grow.

:func:`run` does all of it; `saev.inference.results` reads what it wrote, and imports no torch.
"""

import typing as tp

if tp.TYPE_CHECKING:
    from saev.inference.stage import find, finish, n_pieces, plan, run, work

__all__ = ["find", "finish", "n_pieces", "plan", "run", "work"]


def __getattr__(name: str) -> tp.Any:
    # Lazily, so that `saev.inference.results` does not load torch.
    if name in __all__:
        from saev.inference import stage

        return getattr(stage, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
