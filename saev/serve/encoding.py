"""Values of tables as JSON."""

import functools
import json
import math
import typing as tp

_WRITE = functools.partial(json.dumps, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encoded(value: tp.Any) -> bytes:
    """JSON, with null for numbers that are not finite."""
    try:
        return _WRITE(value).encode()
    except ValueError:  # few answers have such numbers, and looking for them takes long
        return _WRITE(plain(value)).encode()


def plain(value: tp.Any) -> tp.Any:
    """The same with null for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return value
