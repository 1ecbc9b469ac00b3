"""`saev notebook`: writes a notebook that comes with saev to where a person can change it."""

import importlib.resources
import importlib.util
import shlex

from saev import distributions, storage
from saev.config.pages import NotebookConfig
from saev.errors import ConfigError

_FOLDER = storage.join(str(importlib.resources.files("saev")), "notebooks")


def write(cfg: NotebookConfig) -> str:
    """Write a notebook. Returns its URL.

    Raises:
        ConfigError: another file is in its place.
        StorageError: the folder cannot be written to.
    """
    name = f"{cfg.name}.py"
    text = storage.read_text(storage.join(_FOLDER, name))
    place = storage.join(storage.normalize(cfg.out), name)
    if storage.exists(place) and storage.read_text(place) != text:
        raise ConfigError(
            f"{place} is there already, and is not the notebook as saev has it. Move it away, or "
            "name another folder with --out."
        )
    storage.write_text(place, text)
    return place


def how_to_open(cfg: NotebookConfig) -> str:
    """The shell command that opens the notebook that :func:`write` has written."""
    place = storage.join(cfg.out, f"{cfg.name}.py") if cfg.out != "." else f"{cfg.name}.py"
    if cfg.name == "start":
        return shlex.join(["python", place])
    command = ["marimo", "edit", place]
    if cfg.name == "metrics":
        command += ["--", "--root", "./saev-out"]
    first = (
        "" if importlib.util.find_spec("marimo") else f"{distributions.install('notebooks')} && "
    )
    return first + shlex.join(command)
