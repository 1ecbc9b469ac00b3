"""Content hashes: names that equal objects share."""

import hashlib
import json
import typing as tp


def canonical_json(obj: tp.Any) -> str:
    """The one JSON text of ``obj``: sorted keys, no spaces, no NaN. What content hashes are of."""
    return json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def content_hash(obj: tp.Any, n_digits: int = 64) -> str:
    """The first hex digits of the SHA-256 of the canonical JSON: equal objects, equal names."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()[:n_digits]
