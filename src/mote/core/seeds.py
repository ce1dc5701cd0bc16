"""Seeds of single requests, derived from what identifies the request."""

import hashlib


def seed_of(*parts: object) -> int:
    """A seed below 2**63 that depends only on these parts, not on the machine or the order of requests."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
