"""The configs of `saev open`, `saev report` and `saev notebook`."""

import typing as tp

import pydantic
import tyro

from saev.config.base import Config


class OpenConfig(Config):
    """Show a page of saev in the browser, also one on object storage. Ctrl-C ends it."""

    url: tyro.conf.Positional[str] = "./saev-out"
    """URL of a page (index.html), or of its folder: a root, a run, results, or a report."""
    port: int = pydantic.Field(default=0, ge=0, le=65535)
    """Port on 127.0.0.1; 0 takes one that is free."""
    browser: bool = True
    """Open the browser. Without it (--no-browser), the address is printed only."""


class ReportConfig(Config):
    """Write the page that lists all SAEs of a root, measured or not."""

    root: str = "./saev-out"
    """URL of the folder that holds runs and shards; the page is root/index.html."""


class NotebookConfig(Config):
    """Write one of saev's notebooks into a folder, to be opened and changed there.

    `metrics` compares the SAEs of a root and chooses latents, `own_model` goes all the way with a
    model that timm does not have, `start` is ten lines from pictures to latents.
    """

    name: tyro.conf.Positional[tp.Literal["metrics", "own_model", "start"]]
    """Which notebook."""
    out: str = "."
    """URL of the folder that it is written to."""
