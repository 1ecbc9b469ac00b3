"""Content hashes: equal objects have equal hashes."""

import hashlib
import json
import typing as tp


def canonical_json(obj: tp.Any) -> str:
    """JSON with sorted keys, without spaces and NaN. Content hashes are computed from this text."""
    return json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def content_hash(obj: tp.Any, n_digits: int = 64) -> str:
    """The first hex digits of the SHA-256 of the canonical JSON of ``obj``."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()[:n_digits]
