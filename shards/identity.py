"""What identifies a sample, a stream of draws or a place in an order of files, without torch: readers of archives import this."""

import hashlib


def hash_text(*parts: str) -> int:
    """A signed 64-bit hash of text, the same on every machine and version: sample ids and stream names."""
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
