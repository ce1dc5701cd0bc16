"""Seeds of single requests, drawn from what names the request."""

import hashlib


def seed_of(*parts: object) -> int:
    """A seed below 2**63 that depends on these parts alone, on any machine and in any order of work."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
