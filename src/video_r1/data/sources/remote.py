"""Files at addresses (s3://, hf://, https:// and whatever fsspec knows), and their local copies.

    address ─► RemoteCache.file ─► fetch ─► <folder>/ab/ab12….mp4 ─► decoders.py, as any file

An address stands for one file for good: a file that was fetched is not fetched again. Processes and threads
that share the folder fetch a file once; while it is read it stays (bounded_folder.py). It is fetched into a
draft, so that a transfer that breaks off leaves nothing behind. Credentials are those of the libraries:
environment variables and their own files.

Of a tar archive (archives.py) only the headers and the members that are asked for are fetched; its index is
kept in the same folder, also that of an archive on this machine, whose members are read where they are. One
that is replaced, like a Parquet table, has other files: its state is part of their names.
"""

import errno
import fcntl
import functools
import json
import os
import posixpath
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from fsspec.registry import get_filesystem_class

from video_r1.availability import ask_the_hub
from video_r1.data.sources.archives import (
    TABLE,
    TAR,
    Members,
    Part,
    cell_of,
    cell_path,
    cells_beside,
    member_of,
    members_of,
    part_of,
    split_member,
)
from video_r1.data.sources.bounded_folder import PARTIAL, BoundedFolder, locked
from video_r1.errors import ConfigError, MediaError, VideoR1Error, first_line
from video_r1.files import lock
from video_r1.fingerprint import digest

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
MEMBERS = 1_000_000  # of archives whose indexes are in memory, some 250 MB
OUTAGE = 10  # files in a row without an answer, after which a place counts as out of reach
SILENCE = 10.0  # seconds without the state of a container, after which its place is not asked for others'
_MEDIA_BYTES = 8 << 20  # of other cells that are kept, where a table is smaller than that
_HEADERS = 1 << 16  # bytes that are read of an archive around each header
_OF_A_COMMIT = re.compile(r"hf://[^:]*@[0-9a-f]{40}/[^:]*")  # of which nothing changes


class NoAnswer(MediaError):
    """A file that was neither fetched nor refused."""


def is_address(path: object) -> bool:
    """Return whether it is an fsspec address: `scheme://…`, or several joined by `::`."""
    return isinstance(path, str) and "://" in path and _ADDRESS.match(path) is not None


def local_file(path: str) -> str | None:
    """Return the file of this machine that holds a sample's path, which may be an archive; None for an
    address.
    """
    inside = split_member(path)
    file = inside[1] if inside else path
    return None if is_address(file) else file


def on_this_machine(path: str) -> str:
    """Return the plain path of a file:// address (for a member of an archive: the archive); other paths
    unchanged.
    """
    if inside := split_member(path):
        return f"{inside[0]}::{on_this_machine(inside[1])}"
    return url_to_fs(path)[1] if path.startswith(("file://", "local://")) else path


def check_schemes(address: str, may_be_local: bool = True) -> None:
    """Raise ValueError, in words, for schemes that fsspec does not know or may not read, and ConfigError if a
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
    """Return the address of the folder that contains a file."""
    first, chain, rest = address.partition("::")
    scheme, _, path = first.partition("://")
    path = path.partition("?")[0] if scheme in ("http", "https") else path
    return f"{scheme}://{path.rpartition('/')[0]}{chain}{rest}"


def below(root: str, path: str) -> str:
    """Return the address of a path relative to the folder `root`. Raise ValueError if it leads out of it."""
    if _leads_out(path):
        raise ValueError(f"path {path!r} leads out of the media root")
    return _begin(root)[0] + posixpath.normpath(path) + _begin(root)[1]


def relative_to(address: str, root: str) -> str | None:
    """Return the path of an address below the folder `root`; None if it is elsewhere."""
    begin, end = _begin(root)
    if not (is_address(root) and address.startswith(begin) and address.endswith(end)):
        return None
    path = address[len(begin) : len(address) - len(end)]
    return None if "::" in path or _leads_out(path) else path


def _leads_out(path: str) -> bool:
    return posixpath.normpath(unquote(path)).split("/")[0] in ("..", ".", "")


def _begin(root: str) -> tuple[str, str]:
    """Return the parts of an address before and after the path of a file in a folder."""
    first, chain, rest = root.partition("::")
    first = first if "://" in first else f"{first}://"
    return first if first.endswith("/") else f"{first}/", chain + rest


def _schemes(address: str) -> list[str]:
    return [part.partition("://")[0] for part in address.split("::")]


class _Counted(Callback):
    """Progress of a download that raises MediaError beyond `limit` bytes."""

    def __init__(self, address: str, limit: int) -> None:
        super().__init__()
        self.address, self.limit = address, limit

    def set_size(self, size: int | None) -> None:
        super().set_size(size)
        self._check(size or 0)

    def call(self, *_: object, **__: object) -> None:
        self._check(self.value)

    def _check(self, size: int) -> None:
        if size > self.limit:
            raise MediaError(
                self.address,
                f"is larger than remote_cache_gb allows ({self.limit / 1e9:g} GB)",
            )


def fetch(address: str, target: Path, limit: int = 1 << 62) -> None:
    """Copy a file to `target`. Raise as `at_address`, MediaError beyond `limit` bytes, and VideoR1Error when
    the disk takes no more.
    """

    def copy(system: Any, path: str) -> None:
        system.get_file(path, str(target), callback=_Counted(address, limit))
        if target.is_dir():
            target.rmdir()
            raise IsADirectoryError("a folder")

    at_address(address, copy)


def stamps_at(address: str) -> dict[str, str]:
    """Return version stamps of a file (size, ETag, modification time, …) without reading it. Raise as
    `at_address`.
    """

    def told(system: Any, path: str) -> dict[str, str]:
        info = system.info(path)
        return {name: str(info[name]) for name in _STAMPS if info.get(name) is not None}

    return at_address(address, told)


def at_address(address: str, act: Callable[[Any, str], Found]) -> Found:
    """Return `act(file system, path)`, in up to three attempts.

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
    """Return the reason of a final refusal; empty if another attempt may succeed."""
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


class RemoteCache(BoundedFolder):
    """Local copies of remote files. Safe for threads and processes.

    Raises ConfigError when the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        super().__init__(folder, limit, "remote_cache")
        self.unanswered: Counter[str] = Counter()  # files in a row, by the place that they are in
        self._indexes: dict[tuple[object, ...], Members] = {}  # of archives
        self._indexing = threading.Lock()
        self._states: dict[str, tuple[str, ...]] = {}  # of archives and tables at addresses
        self._asking = threading.Lock()
        self._silent: set[str] = set()  # places that did not tell a state

    @contextmanager
    def file(self, address: str) -> Iterator[str]:
        """Yield the path of the local copy, fetched if needed; it is kept inside the block.

        Raises what `fetch` does, and VideoR1Error when its place gives nothing at all any more.
        """
        name = self._name(address)
        entry = self.place(name + _suffix(address))
        with ExitStack() as stack:
            held, path = locked(entry, fcntl.LOCK_SH), entry
            if held is None:
                entry.parent.mkdir(exist_ok=True)
                with self._alone(name):
                    held = locked(entry, fcntl.LOCK_SH)  # somebody else may have fetched it meanwhile
                    if held is None:
                        path = self.place(
                            f"{name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}{entry.suffix}"
                        )
                        stack.callback(path.unlink, missing_ok=True)
                        self._fetch(address, path)
                        held = path.open("rb")
                        lock(held, fcntl.LOCK_SH)
                        if self.admit(path, entry):
                            path = entry
            with held:
                _used_now(path)
                yield str(path)

    def part(self, path: str) -> Part | list[Part]:
        """Return the place of an archive member on this machine, or the frames of a folder in it. Raise
        MediaError.
        """
        inside = split_member(path)
        assert inside is not None
        member, archive = inside[0].removeprefix(TAR), inside[1]
        try:
            facts = os.stat(archive)
            if not stat.S_ISREG(facts.st_mode):
                raise ValueError("the archive is no plain file")

            def read() -> Members:
                with open(archive, "rb") as file:
                    return members_of(file)

            found = self._members(archive, (facts.st_size, facts.st_mtime_ns), read)
            return part_of(found, member, archive)
        except FileNotFoundError as error:
            raise MediaError(path, "there is no such archive") from error
        except OSError as error:
            raise MediaError(path, f"the archive may not be read ({error.strerror})") from error
        except ValueError as error:
            raise MediaError(path, str(error)) from error

    def state(self, container: str) -> tuple[int | str, ...]:
        """Return the version stamp of a table or archive: size and modification time, or a digest of its
        ETag; () if unknown.

        At an address it is asked once a process; one that does not answer, and what else lies in its place,
        has the state of the last time.
        """
        if not is_address(container):
            facts = os.stat(container) if os.path.exists(container) else None
            return (facts.st_size, facts.st_mtime_ns) if facts else ()
        if _OF_A_COMMIT.fullmatch(container):
            return ()
        if (found := self._states.get(container)) is not None:
            return found  # nobody waits for what is known
        with self._asking:
            if container not in self._states:
                self._states[container] = self._asked(container)
            return self._states[container]

    def _asked(self, container: str) -> tuple[str, ...]:
        entry, known = self.place(f"{digest(['state', container], size=20)}.json"), ()
        with suppress(OSError, ValueError):
            known = (str(json.loads(entry.read_bytes())),)
            _used_now(entry)
        if _place_of(container) in self._silent:
            return known
        began = time.monotonic()
        try:
            state = (digest(stamps_at(container), size=20),)
        except MediaError as error:
            # fsspec's HTTP calls a server that says nothing a missing file
            if isinstance(error, NoAnswer) or time.monotonic() - began > SILENCE:
                self._silent.add(_place_of(container))
            return known
        if state != known:
            self._keep(entry, json.dumps(*state).encode())
        return state

    def _members(self, archive: str, stamp: tuple[int | str, ...], read: Callable[[], Members]) -> Members:
        """Return the index of an archive: from memory, from the folder, or read and stored in both."""
        key = (archive, *stamp)
        with self._indexing:
            found = self._indexes.pop(key, None)
            if found is None:
                entry = self.place(f"{digest(('members', *key), size=20)}.json")
                try:
                    found = {name: tuple(place) for name, place in json.loads(entry.read_bytes()).items()}
                    _used_now(entry)
                except (OSError, ValueError, AttributeError, TypeError):
                    found = read()
                    self._keep(entry, json.dumps(found).encode())
                room = MEMBERS - len(found)
                while self._indexes and sum(map(len, self._indexes.values())) > room:
                    self._indexes.pop(next(iter(self._indexes)))
            self._indexes[key] = found  # the last one used
            return found

    def _keep(self, entry: Path, content: bytes) -> None:
        draft = entry.with_suffix(f".{os.getpid()}-{threading.get_ident()}{PARTIAL}")
        try:
            entry.parent.mkdir(exist_ok=True)
            draft.write_bytes(content)
            self.admit(draft, entry)
        except OSError as error:
            self.warn_once("an entry cannot be kept (%s)", error)
        finally:
            draft.unlink(missing_ok=True)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Hold the lock for fetching the file of that name."""
        path = self.place(name + PARTIAL)
        path.parent.mkdir(exist_ok=True)
        path.touch()
        while (held := locked(path, fcntl.LOCK_EX)) is None:  # whoever had it has removed it
            path.touch()
        with held:
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _fetch(self, address: str, draft: Path) -> None:
        place = _place_of(address)
        try:
            if split_member(address):
                self._fetch_inside(address, draft)
            else:
                fetch(address, draft, self.limit)
        except NoAnswer as error:
            self.unanswered[place] += 1
            if self.unanswered[place] >= OUTAGE:
                raise VideoR1Error(
                    f"{place} is out of reach: {OUTAGE} files in a row could not be fetched, the last one: "
                    f"{error}. Start the same command again when it answers"
                ) from error
            raise
        except MediaError:  # an answer as well
            self.unanswered.pop(place, None)
            raise
        self.unanswered.pop(place, None)

    def _fetch_inside(self, address: str, draft: Path) -> None:
        """Fetch a member of an archive at an address, or a cell of a table. Raise as `fetch`."""
        begin, _, container = address.partition("::")
        if not is_address(container) and os.path.exists(container) and not os.path.isfile(container):
            raise MediaError(address, "lies in no plain file")
        take = self._take_cell if begin.startswith(TABLE) else self._take_member

        def copy(system: Any, path: str) -> None:
            try:
                take(system, path, begin, container, draft)
            except ValueError as error:
                raise MediaError(address, str(error)) from error

        try:
            at_address(container if is_address(container) else f"file://{container}", copy)
        except MediaError as error:
            raise type(error)(address, error.reason) from error

    def _take_member(self, system: Any, path: str, begin: str, archive: str, draft: Path) -> None:
        def read() -> Members:
            with system.open(path, "rb", block_size=_HEADERS) as file:
                return members_of(file)

        first, size = member_of(self._members(archive, self.state(archive), read), begin.removeprefix(TAR))
        if size > self.limit:
            raise ValueError(f"its {size:,} bytes are more than remote_cache_gb")
        content = system.cat_file(path, start=first, end=first + size)
        if len(content) != size:
            raise ValueError("its server does not give parts of files; fetch the archive first")
        draft.write_bytes(content)

    def _take_cell(self, system: Any, path: str, begin: str, table: str, draft: Path) -> None:
        """Write a cell to `draft`; other cells of its group become entries too."""
        column, row, item = cell_of(begin)
        with self._alone(digest(["table", table], size=20)):
            with suppress(FileNotFoundError):  # it was read with another one meanwhile
                draft.write_bytes(self.place(self._name(f"{begin}::{table}")).read_bytes())
                return
            with system.open(path, "rb", cache_type="none") as file:  # no byte of another group of rows
                found, room = None, max(file.seek(0, os.SEEK_END), _MEDIA_BYTES)
                for (number, part), content in cells_beside(file, column, row):
                    entry = self.place(self._name(cell_path(column, number, table, part)))
                    if (number, part) == (row, item):
                        found = content
                    elif content is not None and not entry.exists():
                        room -= len(content)  # a small table may unpack to any number of bytes
                        if room >= 0:
                            self._keep(entry, content)
            if found is None:
                raise ValueError("there are no bytes in that cell")
            draft.write_bytes(found)

    def _name(self, address: str) -> str:
        """Return the name of an entry: a digest of the address and of the state of its table or archive."""
        inside = split_member(address)
        state = self.state(inside[1]) if inside else ()
        return digest([address, *state] if state else address, size=20)


def _place_of(address: str) -> str:
    """Return the host or bucket of an address."""
    return "/".join(address.rpartition("::")[2].split("/", 3)[:3])


def _used_now(path: Path) -> None:
    with suppress(PermissionError):  # another's
        os.utime(path)


def _suffix(address: str) -> str:
    """Return the extension of the file's name, by which FFmpeg recognises some containers."""
    name = address.partition("::")[0].partition("?")[0]
    return found[0] if (found := re.search(r"\.[A-Za-z0-9]{1,8}$", name)) else ""


@functools.cache
def open_remote_cache(folder: str | None, limit: int) -> RemoteCache:
    """Open the cache of a folder once per process; default: `~/.cache/video-r1/media`."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return RemoteCache(folder or Path(caches, "video-r1", "media"), limit)
