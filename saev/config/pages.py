"""The configs of `saev open`, `saev report` and `saev notebook`."""

import typing as tp

import pydantic
import tyro

from saev.config.base import Config, refuse
from saev.config.images import ImageData


class OpenConfig(Config):
    """Show a page of saev in the browser, also one on object storage. Ctrl-C ends it."""

    url: tyro.conf.Positional[str] = "./saev-out"
    """URL of a page (index.html), or of its folder: a root, a run, results, or a report."""
    port: int = pydantic.Field(default=0, ge=0, le=65535)
    """Port on 127.0.0.1; 0 takes one that is free."""
    browser: bool = True
    """Open the browser. Without it (--no-browser), the address is printed only."""


class ReportConfig(Config):
    """Write the page that lists all SAEs of a root, measured or not; or, with --run and --out, one
    HTML file to look at all latents of SAEs, which needs no other file and no server."""

    root: str = "./saev-out"
    """URL of the folder that holds runs and shards; the page is root/index.html."""
    run: tuple[str, ...] = ()
    """URLs of run folders that were measured: write the file of all their latents instead."""
    out: str = ""
    """With --run: URL of the HTML file."""
    shards: str = ""
    """With --run: URL of the shards folder that inference ran on; by default that of training."""
    max_mb: float = pydantic.Field(default=15.0, gt=0.0, allow_inf_nan=False)
    """With --run: most megabytes that the file may have. As many pictures are taken as fit."""
    allow_other_model: bool = False
    """With --run: show SAEs even if the activations are of another model, preprocessing or image
    size than those that they were trained on. The file then says so."""
    data: ImageData | None = None
    """With --run: the images, if they have moved since they were recorded or the shards do not say
    where they are (protocol 2.1); by default the dataset that the shards name."""

    @pydantic.model_validator(mode="after")
    def _is_complete(self) -> tp.Self:
        if self.run and not self.out:
            refuse("--run writes one HTML file: say where with --out FILE")
        for flag in ("out", "shards", "data"):
            if getattr(self, flag) and not self.run:
                refuse(f"--{flag} is of the file of all latents: say of which SAE with --run URL")
        return self


class NotebookConfig(Config):
    """Write one of saev's notebooks into a folder, to be opened and changed there.

    `metrics` compares the SAEs of a root and chooses latents, `own_model` goes all the way with a
    model that timm does not have, `start` is ten lines from pictures to latents.
    """

    name: tyro.conf.Positional[tp.Literal["metrics", "own_model", "start"]]
    """Which notebook."""
    out: str = "."
    """URL of the folder that it is written to."""
