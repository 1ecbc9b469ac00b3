"""The command line of a config of `saev visuals`, for people to paste."""

import shlex
from collections.abc import Iterator

from saev.config.base import Config
from saev.config.visuals import VisualsConfig

_KIND = "kind"


def command(cfg: VisualsConfig) -> str:
    """The shell command of a config: `saev visuals` with each flag that is not at its default.

    Args:
        cfg: what to draw, for example the ``latents`` that were chosen in a notebook.
    """
    return shlex.join(["saev", "visuals", *_words(cfg)])


def _words(cfg: Config, prefix: str = "") -> Iterator[str]:
    for key, field in sorted(type(cfg).model_fields.items(), key=lambda pair: pair[0] != "run"):
        value = getattr(cfg, key)
        flag = prefix + key.replace("_", "-")
        if key == _KIND or value == field.get_default(call_default_factory=True):
            continue
        if isinstance(value, Config):  # a subcommand, behind which other flags may follow
            yield f"{flag}:{getattr(value, _KIND)}"
            yield from _words(value, f"{flag}.")
        elif isinstance(value, bool):
            yield f"--{flag}" if value else f"--{prefix}no-{key.replace('_', '-')}"
        elif isinstance(value, tuple):
            yield from (f"--{flag}", *map(str, value))
        else:
            yield from (f"--{flag}", str(value))
