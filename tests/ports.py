"""A port for a server of another process, which takes it only seconds later."""

import random
import socket

OWN = range(20_000, 32_000)
"""Below those that systems hand out for port 0, which other tests take in the meantime."""


def free_port() -> int:
    """Raises OSError when all of a hundred are taken."""
    taken = OSError("no port was tried")
    for port in random.SystemRandom().sample(OWN, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError as error:
                taken = error
    raise taken
