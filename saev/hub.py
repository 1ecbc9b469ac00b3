"""Checks whether the model hub of Hugging Face answers.

The hub's client tries every file six times, which takes half a minute, and prints two lines each
time. So saev asks the hub once, before the first file. If the hub does not answer, the client is
told to use only its cache.
"""

import functools
import logging
import threading

logger = logging.getLogger(__name__)

_SECONDS = 4.0
"""Longest wait for an answer. Without a network, the error comes at once."""


@functools.cache
def problem() -> Exception | None:
    """The error if the hub does not answer; None if it does, or if the client is set to offline.

    Asks once per process. If the hub does not answer, this logs one line and switches the hub's
    client to its cache (``HF_HUB_OFFLINE``) until the process ends.
    """
    try:
        from huggingface_hub import constants, get_session
    except ImportError:  # code that needs the client raises a clear error
        return None
    if constants.HF_HUB_OFFLINE:
        return None
    found: list[Exception] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_SECONDS)
        except Exception as err:  # of requests or httpx, depending on the client's version
            found.append(err)

    thread = threading.Thread(target=ask, name="saev-hub", daemon=True)
    thread.start()
    thread.join(_SECONDS)  # a name lookup has no timeout
    if thread.is_alive():
        found.append(TimeoutError(f"no answer within {_SECONDS:g} s"))
    if not found:
        return None
    constants.HF_HUB_OFFLINE = True
    logger.warning(
        "The model hub %s cannot be reached (%s). Only its cache is used.",
        constants.ENDPOINT,
        found[0],
    )
    return found[0]
