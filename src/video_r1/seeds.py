"""Seeds that follow from what they are for, the same in every run, in every thread and on every machine.

Nothing that draws at random here carries a state along: the order of an epoch, a shuffled clip and a prompt's
completions each have a seed of their own, so that work which is done again, or in another order, draws what
it drew before.
"""

from __future__ import annotations

import hashlib


def derived_seed(*parts: object, bits: int = 63) -> int:
    """A seed in [0, 2**bits) that depends on all of `parts` and nothing else. bits: up to 64."""
    return hashed_seed(repr(parts), bits)


def hashed_seed(text: str, bits: int) -> int:
    """The same of a text. What is drawn from it changes with every character."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - bits)
