"""Pictures of what latents respond to, and a page to leaf through them: `saev visuals`."""

import typing as tp

from saev.visuals.pasted import command

if tp.TYPE_CHECKING:
    from saev.visuals.stage import book, find, finish, plan, run, run_all, work

__all__ = ["book", "command", "find", "finish", "plan", "run", "run_all", "work"]


def __getattr__(name: str) -> tp.Any:
    # Lazily, so that `saev.visuals.overview` and the like do not load torch.
    if name in __all__:
        from saev.visuals import stage

        return getattr(stage, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
