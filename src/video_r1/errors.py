"""Errors of this package. Each message says what was found, where, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_SECRETS = (
    re.compile(r"(://)[^/\s@]+(?=@)"),  # user:secret@host
    re.compile(
        r"""(?i)((?:authorization|api[-_]?key|password|secret|\btoken)['"]?\s*[:=]\s*['"]?)"""
        r"""(?:(?:bearer|basic)\s+)?[^'"\s,}]+"""
    ),
    re.compile(r"(?i)(--[\w-]*(?:key|token|password)[= ])\S+"),
)


def without_secrets(text: str) -> str:
    """Hide passwords in addresses, and keys of requests and options, in a text that is printed or written.

    >>> without_secrets("http://me:secret@host/v1"), without_secrets('{"Authorization": "Bearer abc"}')
    ('http://***@host/v1', '{"Authorization": "***"}')
    """
    for secret in _SECRETS:
        text = secret.sub(r"\1***", text)
    return text


@contextmanager
def writing_to(place: object) -> Iterator[None]:
    """Add `place` to an OSError that names no file, such as a full disk's."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(place)
        raise


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or the error's name if it has none, without secrets."""
    return without_secrets(next(iter(str(error).strip().splitlines()), type(error).__name__))


class VideoR1Error(Exception):
    """Base of every error that a user can act on. The command line prints it as one line."""


class RequestError(VideoR1Error):
    """Wrong request: a setting, a file name, a manifest. `problems` lists each. Exit code 2."""

    def __init__(self, message: str, problems: tuple = ()) -> None:
        super().__init__(message)
        self.problems = problems


class ConfigError(RequestError):
    """Setting that is unknown, has a wrong type or contradicts another. `problems`: (name, text) pairs."""


class ManifestError(RequestError):
    """Manifest with problems. `problems` lists all of them, not only the first."""


class MediaError(VideoR1Error):
    """Media file (`path`) that cannot be used, and the `reason`. The question is recorded, never scored."""

    kind = "media"

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason


class PromptError(VideoR1Error):
    """Question without a usable prompt, for example because it is over the token limit."""

    kind = "prompt"

    @property
    def reason(self) -> str:
        return str(self)


class RewardError(VideoR1Error):
    """Reward function that raised, or returned no list of rewards."""
