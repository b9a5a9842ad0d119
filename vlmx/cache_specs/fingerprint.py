"""How is plain data turned into one short identity? Canonical JSON, then SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, ASCII only and the shortest float that reads back equal; NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON, 64 hex digits: equal data gives equal fingerprints on every machine."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()
