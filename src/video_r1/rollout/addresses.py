"""Several servers of one model: a request goes to the least busy one that answers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from video_r1.rollout.http_client import ServerFailure, ServerRefusal

logger = logging.getLogger(__name__)

FIRST_REST, LONGEST_REST = 1.0, 30.0  # seconds that a server that failed is left out, doubled each time


@dataclass(slots=True)
class Address:
    """One server. Times are those of the clock that `Addresses` is given, in seconds."""

    url: str
    under_way: int = 0  # requests
    failures: int = 0  # since it answered last; those of requests that failed together count as one
    left_out_until: float = 0.0
    closed_until: float = 0.0  # it asked for a pause


class Addresses:
    """Whom of the servers at `urls` to ask. Thread-safe.

    One that fails is left out for a while, at first `FIRST_REST` seconds; then one request tries it, and what
    becomes of that decides about the others. When all are left out, the one is asked that returns first: how
    long to wait before is for the caller to decide. One that asks for a pause gets nothing before its end.
    """

    def __init__(self, urls: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._all = [Address(url) for url in urls]
        self._clock = clock
        self._lock = threading.Lock()

    def pause(self) -> float:
        """Seconds for which nobody may be asked."""
        with self._lock:
            return max(0.0, self._choice().closed_until - self._clock())

    def some_ready(self) -> bool:
        """Whether there is one that is not left out."""
        with self._lock:
            return bool(self._ready())

    @contextmanager
    def asking(self) -> Iterator[Address]:
        """The server to send a request to, for the length of that request.

        Inside, a ServerFailure is that server's, and anything else that it says, a refusal too, is an answer.
        """
        with self._lock:
            address = self._choice()
            address.under_way += 1
        try:
            yield address
            self._answered(address)
        except ServerRefusal:
            self._answered(address)
            raise
        except ServerFailure as failure:
            self._failed(address, failure)
            raise
        finally:
            with self._lock:
                address.under_way -= 1

    def is_back(self, url: str) -> None:
        """It has answered something: it is left out no longer."""
        for address in self._all:
            if address.url == url:
                self._answered(address)

    def _choice(self) -> Address:
        if ready := self._ready():
            return min(ready, key=lambda address: address.under_way)
        return min(self._all, key=lambda address: address.left_out_until)

    def _ready(self) -> list[Address]:
        now = self._clock()
        return [
            address
            for address in self._all
            if address.left_out_until <= now and not (address.failures and address.under_way)
        ]

    def _answered(self, address: Address) -> None:
        with self._lock:
            address.failures, address.left_out_until = 0, address.closed_until

    def _failed(self, address: Address, failure: ServerFailure) -> None:
        with self._lock:
            now = self._clock()
            if failure.retry_after is not None:  # it is well
                address.closed_until = max(address.closed_until, now + failure.retry_after)
                rest = max(failure.retry_after, FIRST_REST)
                address.left_out_until = max(address.left_out_until, now + rest)
            elif address.left_out_until <= now:
                rest = min(FIRST_REST * 2**address.failures, LONGEST_REST)
                address.failures += 1
                address.left_out_until = now + rest
                if len(self._all) > 1:
                    logger.warning("%s: %s; it is left out for %g s", address.url, failure, rest)
