"""Keys inside URLs: found, and hidden wherever a text is shown.

A URL can carry a key in two places: before the host (`https://user:password@host`,
`s3://KEY:SECRET@bucket`) and in its query (`?X-Amz-Signature=…`). saev takes keys from the
environment only, so :func:`saev.storage.normalize` and every config refuse such URLs.
:class:`saev.errors.SaevError` and the loggers hide keys in what they show, because other
libraries put URLs into their messages too.
"""

import logging
import re
import sys
from collections.abc import Iterable

HIDDEN = "***"

# A password may hold a slash, as keys of AWS do. `host:9000/path@2x.png` is a port, no password.
_USER_AND_PASSWORD = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/@:'\"]*:(?!:|\d+/)[^\s@'\"]+@")
# A user's name alone is no key, except for services that take a token in its place.
_TOKEN = re.compile(r"(?i)\b((?:https?|s3a?)://)[^\s/@:'\"]+@")
_QUERY = re.compile(
    r"(?i)([?&;](?:[\w.-]*(?:signature|credential|token|secret|passw(?:or)?d|pwd|api[-_]?key"
    r"|access[-_]?key(?:[-_]?id)?|accessid)|sig|key|auth|policy|key-pair-id)=)[^&;\s'\"]*[^&;\s'\".,:)]"
)


def redact(text: str) -> str:
    """``text`` with the keys of every URL in it replaced by ``***``."""
    if "://" not in text:
        return text
    text = _USER_AND_PASSWORD.sub(rf"\g<1>{HIDDEN}@", text)
    text = _TOKEN.sub(rf"\g<1>{HIDDEN}@", text)
    return _QUERY.sub(rf"\g<1>{HIDDEN}", text)


def holds_key(text: str) -> bool:
    """Whether a text has a URL with a key in it (one that is not hidden yet)."""
    return redact(text) != text


def refusal(text: str) -> str:
    """What to tell somebody who gives such a URL; without the key."""
    return (
        f"{redact(text)} has a key in it ({HIDDEN} here). saev takes no keys in URLs, because URLs "
        "are shown and stored. Put keys into the environment (for s3:// AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or a profile), or copy the file to a place that needs none."
    )


def refuse_in(argv: Iterable[str]) -> None:
    """End a command whose words hold a key, with status 2, before a parser can repeat them."""
    for word in argv:
        if holds_key(word):
            sys.stderr.write(f"error: {refusal(word)}\n")
            sys.exit(2)


class RedactingFilter(logging.Filter):
    """Hides keys of URLs in whatever a handler prints."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the record's text by one without keys."""
        text = record.getMessage()
        if holds_key(text):
            record.msg, record.args = redact(text), ()
        return True
