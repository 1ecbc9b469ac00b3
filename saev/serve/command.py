"""`saev serve`: starts the server, says where it is, and ends it."""

import logging
import os
import socket
import sys
import webbrowser

import uvicorn

from saev import interrupts, opened, storage
from saev.config.pages import OpenConfig, ServeConfig
from saev.errors import ConfigError
from saev.parquet import TABLES
from saev.serve import access, app, notes
from saev.serve.catalogue import Catalogue
from saev.serve.explorer import Explorer

logger = logging.getLogger(__name__)

TOKEN = "SAEV_TOKEN"
"""Environment variable: the token, if it is not to be a new one."""
_GRACE_SECONDS = 3
_MAX_CONNECTIONS = 512


def run(cfg: ServeConfig, catalogue: Catalogue | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM. Prints the address on standard output.

    Args:
        cfg: what and where.
        catalogue: the SAEs; by default those of the config's root.

    Raises:
        ConfigError: the root is none, or the address cannot be used.
        StorageError: the storage cannot be read, or notes cannot be written.
    """
    catalogue = catalogue or Catalogue.of(cfg.root)
    if not catalogue.entries():
        logger.warning(
            "%s has no complete SAE yet. They appear when `saev train` has written them.", cfg.root
        )
    kept = notes.check(cfg.notes) if cfg.notes else None
    explorer = Explorer(catalogue, cfg.memory_mb, kept, cfg.ckpt)
    prefix = cfg.prefix.rstrip("/")
    rules = access.Rules.of(cfg.host, cfg.behind_proxy, prefix, os.environ.get(TOKEN, ""))
    with _listening(cfg.host, cfg.port) as listener:
        address = address_of(cfg, listener.getsockname()[1])
        shown = f"{address}?token={rules.token}" if rules.token else address
        sys.stdout.write(f"{shown}\n")
        sys.stdout.flush()
        logger.info("Serving %s. Ctrl-C ends it.", cfg.root)
        if cfg.browser and not webbrowser.open(shown):
            logger.info("No browser was found: open %s.", address)
        _serve(app.make(explorer, rules, prefix), listener)
    logger.info("Ended.")


def open_one(cfg: OpenConfig) -> None:
    """Show a root or a run in the live explorer; or a page, and also what has no tables but pages.

    Raises:
        ConfigError: there is neither.
        StorageError: the storage cannot be read.
    """
    catalogue = _with_tables(cfg.url)
    if catalogue is None:
        return opened.run(cfg)
    return run(ServeConfig(root=cfg.url, port=cfg.port, browser=cfg.browser), catalogue)


def _with_tables(url: str) -> Catalogue | None:
    """The SAEs of a root, a run or results, if the live explorer can show one of them."""
    url = storage.normalize(url).rstrip("/")
    if storage.name(url) == opened.INDEX:
        return None
    try:
        found = Catalogue.of(url)
    except ConfigError:
        return None
    has_tables = any(
        entry.results and storage.exists(storage.join(entry.results, TABLES))
        for entry in found.entries()
    )
    return found if has_tables else None


def _serve(application: app.ASGIApp, listener: socket.socket) -> None:
    """Answer requests until a signal comes."""
    server = uvicorn.Server(
        uvicorn.Config(
            application, log_config=None, access_log=False, server_header=False,
            timeout_graceful_shutdown=_GRACE_SECONDS, limit_concurrency=_MAX_CONNECTIONS,
            proxy_headers=False, ws="none",
        )
    )  # fmt: skip
    try:
        server.run(sockets=[listener])
    except (KeyboardInterrupt, interrupts.Terminated):
        return  # uvicorn has ended, and then raised the signal again


def address_of(cfg: ServeConfig, port: int) -> str:
    """Where a browser on this machine finds the server."""
    host = cfg.host if access.bare(cfg.host) not in ("0.0.0.0", "::") else socket.gethostname()
    named = f"[{host}]" if ":" in host else host
    return f"http://{named}:{port}{cfg.prefix.rstrip('/')}/"


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends without delay (TCP_NODELAY) only if the protocol is named.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError as err:
        listener.close()
        raise ConfigError(
            f"--port {port} on --host {host} cannot be used ({err.strerror}). Choose another one, "
            "or leave the flag out."
        ) from err
    return listener
