"""The configs of `saev open`, `saev serve`, `saev report` and `saev notebook`."""

import re
import typing as tp

import pydantic
import tyro

from saev.config.base import Config, refuse
from saev.config.images import ImageData

_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*/?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[?[0-9a-fA-F:]+\]?")


class OpenConfig(Config):
    """Show a root, a run, or a page of saev in the browser, also one on object storage. Ctrl-C
    ends it."""

    url: tyro.conf.Positional[str] = "./saev-out"
    """URL of a root, a run, or results, for the live explorer; or of a page (index.html), or of the
    folder of a page, such as a report."""
    port: int = pydantic.Field(default=0, ge=0, le=65535)
    """Port on 127.0.0.1; 0 takes one that is free."""
    browser: bool = True
    """Open the browser. Without it (--no-browser), the address is printed only."""


class ServeConfig(Config):
    """Look at the SAEs of a root in the browser: all latents, images and classes, live. Ctrl-C
    ends it."""

    root: str = "./saev-out"
    """URL of the folder that holds runs and shards, or of one run."""
    host: str = "127.0.0.1"
    """Address to listen on. Every other one than 127.0.0.1 needs the token that is printed, unless
    --behind-proxy is given."""
    port: int = pydantic.Field(default=0, ge=0, le=65535)
    """Port; 0 takes one that is free."""
    prefix: str = ""
    """Path below which a proxy shows the explorer, such as /explorer."""
    behind_proxy: tuple[str, ...] = ()
    """Names under which a proxy shows the explorer, such as explorer.example.org. The proxy says
    who may look, so no token is needed; requests for other names are refused."""
    browser: bool = True
    """Open the browser. Without it (--no-browser), the address is printed only."""
    notes: str = ""
    """URL of a JSON file for notes on latents, which all who look share. Without it, each browser
    keeps its own."""
    ckpt: str = ""
    """Where the weights of the model are now, if they have moved, such as vits14@URL. Images of
    your own need them."""
    memory_mb: float = pydantic.Field(default=1024.0, ge=512.0, allow_inf_nan=False)
    """Most megabytes of memory that the server takes, without torch and models, which images of
    your own and matches of latents need."""

    @pydantic.model_validator(mode="after")
    def _is_sound(self) -> tp.Self:
        if not _PREFIX.fullmatch(self.prefix):
            refuse(f"--prefix {self.prefix} is no path such as /explorer")
        for name in self.behind_proxy:
            if not _HOST.fullmatch(name):
                refuse(f"--behind-proxy {name} is no name of a host, such as explorer.example.org")
        return self


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
