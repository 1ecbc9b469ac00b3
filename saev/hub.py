"""The model hub of Hugging Face: whether it answers.

The hub's client tries every file six times, which takes half a minute, and prints two lines each
time. So the hub is asked once, before the first file; if it does not answer, the client uses its
cache alone.
"""

import functools
import logging
import threading

logger = logging.getLogger(__name__)

_SECONDS = 4.0
"""Longest wait for an answer. A computer without a network knows at once."""


@functools.cache
def problem() -> Exception | None:
    """Why the hub does not answer; None if it does, or if its client is offline on purpose.

    Asks once per process. A hub that does not answer is said in one line of the log, and the hub's
    client is switched to its cache (``HF_HUB_OFFLINE``) until the process ends.
    """
    try:
        from huggingface_hub import constants, get_session
    except ImportError:  # whoever needs it says so
        return None
    if constants.HF_HUB_OFFLINE:
        return None
    found: list[Exception] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_SECONDS)
        except Exception as err:  # of requests, httpx or its successor, by the client's version
            found.append(err)

    thread = threading.Thread(target=ask, name="saev-hub", daemon=True)
    thread.start()
    thread.join(_SECONDS)  # looking up a name has no time limit of its own
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
