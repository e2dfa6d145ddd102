"""Addresses of files (s3://, hf://, https:// and all that fsspec knows): reading, joining and opening them.

What is fetched to stay is in remote.py. Credentials are those of the libraries: environment variables and
files of their own.
"""

import errno
import posixpath
import re
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from fsspec.core import url_to_fs
from fsspec.registry import get_filesystem_class

from video_r1.availability import ask_the_hub
from video_r1.data.sources.tar_index import split_member
from video_r1.errors import ConfigError, MediaError, VideoR1Error, first_line

ATTEMPTS = 3
PAUSE = 1.0  # seconds before the second attempt, twice as many before the third
HTTP_SECONDS = {"total": 600.0, "sock_connect": 30.0, "sock_read": 30.0}  # of a file, a connection, a silence
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*:(//|:)")
# What reads files of this machine: a manifest's rows may not, but for those below the media root.
_LOCAL = {"file", "local", "asynclocal", "reference", "git", "dvc", "generic"}
_OTHER_ANSWERS = (408, 425, 429)  # statuses below 500 after which a server may still give the file
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_STAMPS = (
    "size", "ETag", "etag", "Content-MD5", "Digest", "content_hash", "md5Hash", "blob_id", "xet_hash", "CRC",
    "generation", "Last-Modified", "LastModified", "last_modified", "modified", "mtime", "updated", "created",
    "date_time",
)  # fmt: skip
Found = TypeVar("Found")
_archives = threading.Lock()  # a file system inside another one's file has one place where it reads


class NoAnswer(MediaError):
    """A file that neither came nor was refused."""


def is_address(path: object) -> bool:
    """Whether it is an fsspec address: `scheme://…`, or several of them joined by `::`."""
    return isinstance(path, str) and "://" in path and _ADDRESS.match(path) is not None


def local_file(path: str) -> str | None:
    """The file of this machine that a sample's path is, or lies in as a member of an archive; else None."""
    inside = split_member(path)
    file = inside[1] if inside else path
    return None if is_address(file) else file


def on_this_machine(path: str) -> str:
    """The plain path of a file:// address; anything else as it is. Of a member of an archive: that of the
    archive.
    """
    if inside := split_member(path):
        return f"{inside[0]}::{on_this_machine(inside[1])}"
    return url_to_fs(path)[1] if path.startswith(("file://", "local://")) else path


def check_schemes(address: str, may_be_local: bool = True) -> None:
    """Raises ValueError, in words, for what fsspec does not know or may not read, and ConfigError where a
    package is missing.
    """
    for scheme in _schemes(address):
        try:
            get_filesystem_class(scheme)
        except ImportError as error:
            raise ConfigError(f"{scheme}:// needs a package that is not installed: {error}") from error
        except ValueError:
            raise ValueError(f"has an unknown scheme, {scheme}://") from None
        if scheme in _LOCAL and not may_be_local:
            raise ValueError("reads files of this machine; name them relative to the media root")


def folder_of(address: str) -> str:
    """The address of the folder that a file is in."""
    first, chain, rest = address.partition("::")
    scheme, _, path = first.partition("://")
    path = path.partition("?")[0] if scheme in ("http", "https") else path
    return f"{scheme}://{path.rpartition('/')[0]}{chain}{rest}"


def below(root: str, path: str) -> str:
    """The address of a path relative to the folder `root`. Raises ValueError where it leads out of it."""
    if _leads_out(path):
        raise ValueError(f"path {path!r} leads out of the media root")
    return _begin(root)[0] + posixpath.normpath(path) + _begin(root)[1]


def relative_to(address: str, root: str) -> str | None:
    """The path of an address below the folder `root`; None where it is not there."""
    begin, end = _begin(root)
    if not (is_address(root) and address.startswith(begin) and address.endswith(end)):
        return None
    path = address[len(begin) : len(address) - len(end)]
    return None if "::" in path or _leads_out(path) else path


def _leads_out(path: str) -> bool:
    return posixpath.normpath(unquote(path)).split("/")[0] in ("..", ".", "")


def _begin(root: str) -> tuple[str, str]:
    """What stands before and behind the path of a file in a folder."""
    first, chain, rest = root.partition("::")
    first = first if "://" in first else f"{first}://"
    return first if first.endswith("/") else f"{first}/", chain + rest


def _schemes(address: str) -> list[str]:
    return [part.partition("://")[0] for part in address.split("::")]


def fetch(address: str, target: Path) -> None:
    """Copies a file to `target`. Raises as `at_address`, and VideoR1Error when the disk takes no more."""

    def copy(system: Any, path: str) -> None:
        system.get_file(path, str(target))
        if target.is_dir():
            target.rmdir()
            raise IsADirectoryError("a folder")

    at_address(address, copy)


def stamps_at(address: str) -> dict[str, str]:
    """What changes when a file does, of what its file system tells without reading it: by the names that this
    gives. Raises as `at_address`.
    """

    def told(system: Any, path: str) -> dict[str, str]:
        info = system.info(path)
        return {name: str(info[name]) for name in _STAMPS if info.get(name) is not None}

    return at_address(address, told)


def at_address(address: str, act: Callable[[Any, str], Found]) -> Found:
    """What `act` returns of the file system and the path in it, in as many as three attempts.

    Raises:
        MediaError: there is no such file, or it is refused, or fsspec does not know the scheme.
        NoAnswer: none of the attempts brought it, for another reason.
        ConfigError: its scheme needs a package that is not installed.
        VideoR1Error: the disk takes no more.
    """
    try:
        check_schemes(address)
    except ValueError as error:
        raise MediaError(address, str(error)) from error
    if "hf" in _schemes(address):
        ask_the_hub()
    failure: Exception | None = None
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE * attempt)
        try:
            system, path = url_to_fs(address, **_http_options(address))
            with _archives if "::" in address else nullcontext():
                return act(system, path)
        except MediaError:
            raise
        except Exception as error:  # each file system has errors of its own, without a common base
            if isinstance(error, OSError) and error.errno in _FULL:
                raise VideoR1Error(f"{address} cannot be kept on this machine ({error.strerror})") from error
            failure = error
        if reason := _refusal(failure):
            raise MediaError(address, reason) from failure
    assert failure is not None
    said = dict.fromkeys((type(failure).__name__, first_line(failure)))  # some say nothing but their name
    raise NoAnswer(address, f"cannot be fetched ({': '.join(said)}; {ATTEMPTS} attempts)") from failure


def _refusal(error: Exception) -> str:
    """What a final answer says; empty where another attempt may bring the file."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not a media file"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"may not be read ({first_line(error)})"
    if isinstance(status, int) and 400 <= status < 500 and status not in _OTHER_ANSWERS:
        return f"is refused ({first_line(error)})"
    return ""


def _http_options(address: str) -> dict[str, dict]:
    schemes = {"http", "https"} & set(_schemes(address))
    if not schemes:
        return {}
    from aiohttp import ClientTimeout  # only where it is used

    client = {"timeout": ClientTimeout(**HTTP_SECONDS), "trust_env": True}  # proxies, netrc
    return {scheme: {"client_kwargs": client} for scheme in schemes}
