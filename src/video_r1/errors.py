"""The errors of this package. Each message says what was found, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def writing_to(place: object) -> Iterator[None]:
    """An OSError inside that names no file, as that of a full disk, names `place`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(place)
        raise


def first_line(error: BaseException) -> str:
    """The first line of what it says, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class VideoR1Error(Exception):
    """Base of every error that a person can act on. The command line prints it as one line."""


class RequestError(VideoR1Error):
    """The request itself is wrong: a setting, a file name, a manifest. `problems` has each. Exit code 2."""

    def __init__(self, message: str, problems: tuple = ()) -> None:
        super().__init__(message)
        self.problems = problems


class ConfigError(RequestError):
    """A setting is unknown, has a wrong type or contradicts another one. `problems`: (name, text) pairs."""


class ManifestError(RequestError):
    """A manifest has problems. `problems` holds all of them, not only the first."""


class MediaError(VideoR1Error):
    """A media file cannot be used. The question is skipped and recorded, never scored.

    Attributes: `path` (str), the file; `reason` (str), what is wrong with it.
    """

    kind = "media"

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason


class PromptError(VideoR1Error):
    """A question does not make a usable prompt, for example because it is over the token limit."""

    kind = "prompt"

    @property
    def reason(self) -> str:
        return str(self)


class RewardError(VideoR1Error):
    """A reward function raised, or returned something that is no list of rewards."""
