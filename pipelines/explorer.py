"""Shows the explorer that runs in the cluster (`make install … COMPONENTS=explorer`)."""

import logging
import sys
import threading
import webbrowser

from pipelines import forward
from pipelines.kube import Kube
from pipelines.settings import Settings

logger = logging.getLogger(__name__)

SERVICE = "saev-explorer"
PORT = 8080


def show(settings: Settings, *, port: int = 0, browser: bool = True) -> None:
    """Print the explorer's address and open it. A forwarded port stays open until Ctrl-C.

    Args:
        settings: the cluster. If they name a URL of the explorer, no port is forwarded.
        port: local port; 0 takes one that is free.
        browser: whether to open the browser.

    Raises:
        ClusterError: there is no explorer, or no port may be forwarded to it.
        ConfigError: the local port is taken, or there is no kubeconfig.
    """
    if settings.explorer:
        _open(f"{settings.explorer}/", browser=browser)
        return
    namespace = settings.namespace or settings.kfp_namespace
    remedy = (
        "install it (`make install … COMPONENTS=explorer`), or set KFP_NAMESPACE to the namespace "
        "that it is in."
    )
    target = forward.Target(SERVICE, PORT, namespace, remedy)
    with forward.to_service(Kube(settings), target, port) as address:
        _open(f"{address.replace('127.0.0.1', 'localhost')}/", browser=browser)
        logger.info("Forwarding to service %s. Ctrl-C ends it.", SERVICE)
        _wait()


def _open(address: str, *, browser: bool) -> None:
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()
    if browser and not webbrowser.open(address):
        logger.info("No browser was found: open %s.", address)


def _wait() -> None:
    """Wait for Ctrl-C."""
    try:
        while not threading.Event().wait(3600):
            pass
    except KeyboardInterrupt:
        logger.info("Ended.")
