"""Finds secrets in URLs, and hides them in texts that are shown.

A URL can contain a secret in two places: before the host (`https://user:password@host`,
`s3://KEY:SECRET@bucket`) and in its query (`?X-Amz-Signature=…`). saev takes secrets from the
environment only, so :func:`saev.storage.normalize` and all configs refuse such URLs.
:class:`saev.errors.SaevError` and the loggers hide secrets in messages, because messages of other
libraries may contain URLs.
"""

import logging
import re
import sys
from collections.abc import Iterable

HIDDEN = "***"

# A password may contain a slash, as keys of AWS do. In `host:9000/path@2x.png`, 9000 is a port.
_USER_AND_PASSWORD = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/@:'\"]*:(?!:|\d+/)[^\s@'\"]+@")
# A user name alone is not secret, except for services that take a token instead of it.
_TOKEN = re.compile(r"(?i)\b((?:https?|s3a?)://)[^\s/@:'\"]+@")
_QUERY = re.compile(
    r"(?i)([?&;](?:[\w.-]*(?:signature|credential|token|secret|passw(?:or)?d|pwd|api[-_]?key"
    r"|access[-_]?key(?:[-_]?id)?|accessid)|sig|key|auth|policy|key-pair-id)=)[^&;\s'\"]*[^&;\s'\".,:)]"
)


def redact(text: str) -> str:
    """``text`` with all secrets in URLs replaced by ``***``."""
    if "://" not in text:
        return text
    text = _USER_AND_PASSWORD.sub(rf"\g<1>{HIDDEN}@", text)
    text = _TOKEN.sub(rf"\g<1>{HIDDEN}@", text)
    return _QUERY.sub(rf"\g<1>{HIDDEN}", text)


def holds_key(text: str) -> bool:
    """Whether a text contains a URL with a secret that is not hidden yet."""
    return redact(text) != text


def refusal(text: str) -> str:
    """The error message for a URL with a secret. The secret is hidden in it."""
    return (
        f"{redact(text)} has a key in it ({HIDDEN} here). saev takes no keys in URLs, because URLs "
        "are shown and stored. Put keys into the environment (for s3:// AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or a profile), or copy the file to a place that needs none."
    )


def refuse_in(argv: Iterable[str]) -> None:
    """Exit with status 2 if a word of a command contains a secret, before a parser prints it."""
    for word in argv:
        if holds_key(word):
            sys.stderr.write(f"error: {refusal(word)}\n")
            sys.exit(2)


class RedactingFilter(logging.Filter):
    """Hides secrets of URLs in all records of a handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the text of a record by one without secrets."""
        text = record.getMessage()
        if holds_key(text):
            record.msg, record.args = redact(text), ()
        return True
