"""Log messages that are written once per process, even if several stages or SAEs cause them."""

import logging

_said: set[tuple[str, str]] = set()


def say_once(
    logger: logging.Logger, message: str, *, level: int = logging.WARNING, key: str = ""
) -> None:
    """Log a message, unless this process has logged it already.

    Args:
        logger: the logger.
        message: the whole sentence.
        level: level of the log record.
        key: messages with equal keys count as the same; by default the text.
    """
    said = (logger.name, key or message)
    if said not in _said:
        _said.add(said)
        logger.log(level, "%s", message)


def forget() -> None:
    """Allow all messages to be logged again, as in a new process."""
    _said.clear()
