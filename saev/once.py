"""Messages that several stages or SAEs of one process come upon, and that are said once."""

import logging

_said: set[tuple[str, str]] = set()


def say_once(
    logger: logging.Logger, message: str, *, level: int = logging.WARNING, key: str = ""
) -> None:
    """Log a message unless this process has logged it already.

    Args:
        logger: whose message it is.
        message: the whole sentence.
        level: of the log record.
        key: what makes two messages the same one; by default their text.
    """
    said = (logger.name, key or message)
    if said not in _said:
        _said.add(said)
        logger.log(level, "%s", message)


def forget() -> None:
    """Say everything once more, as in a new process."""
    _said.clear()
