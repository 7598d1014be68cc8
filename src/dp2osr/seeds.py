"""Seeds that depend on names alone, never on shard, batch, process count or order (design: determinism)."""

import hashlib


def derive(base: int, *names: str | int) -> int:
    """Return a 63-bit seed from a base seed and the names of what it is for.

    Names are joined with a separator that no name may hold, so ("a", "bc") and ("ab", "c") differ.
    """
    text = "\x1f".join(str(part) for part in (base, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def candidate(base: int, group_id: str, rollout: int) -> int:
    """Return the noise seed of candidate `rollout` of a group."""
    return derive(base, "candidate", group_id, rollout)
