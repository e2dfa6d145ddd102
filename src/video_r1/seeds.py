"""Seeds derived from their purpose, the same in every run, thread and machine.

No random generator keeps a state: the order of an epoch, a shuffled clip and a prompt's completions have
separate seeds, so that repeated or reordered work draws the same values.
"""

import hashlib


def derived_seed(*parts: object, bits: int = 63) -> int:
    """Return a seed in [0, 2**bits) that depends only on `parts`. bits: up to 64."""
    return hashed_seed(repr(parts), bits)


def hashed_seed(text: str, bits: int) -> int:
    """Return a seed in [0, 2**bits) that depends only on `text`."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - bits)
