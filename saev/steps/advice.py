"""Replaces flags in error messages by keys of the config file.

A stage's errors name flags of its command. Users of the pipeline give no flags to steps: the same
values are keys in the tables of their config file.
"""

import re
import typing as tp

from saev import chain
from saev.config.base import Config
from saev.errors import SaevError

_FLAG = re.compile(r"--(no-)?([a-z][a-z0-9]*(?:[.-][a-z0-9]+)*)")
_TABLES: dict[str, type[Config]] = {stage.name: stage.config for stage in chain.STAGES}
_SET_BY_STEPS = frozenset({"part", "shards", "out", "run", "runs", "device"})
"""Keys that a step sets itself. Their values in the config do not count."""


def for_config(err: SaevError, *tables: str) -> None:
    """Change an error's message in place.

    Args:
        err: the error of a stage.
        tables: the tables of the config that the step reads, the most likely first.
    """
    if err.args and isinstance(err.args[0], str):
        err.args = (_FLAG.sub(lambda flag: _key(flag, tables), err.args[0]), *err.args[1:])


def _key(flag: re.Match[str], tables: tp.Sequence[str]) -> str:
    """The key of a flag; the flag itself if no table has such a key."""
    path = flag[2].replace("-", "_").split(".")
    for table in tables:
        field = _TABLES[table].model_fields.get(path[0])
        if field is None or path[-1] in _SET_BY_STEPS:
            continue
        value = ("false" if flag[1] else "true") if field.annotation is bool else ""
        *parents, name = path if [table, path[0]] == ["shards", "data"] else [table, *path]
        return f"`{name}{f' = {value}' if value else ''}` under [{'.'.join(parents)}] in the config"
    return flag[0]
