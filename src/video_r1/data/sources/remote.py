"""Files at addresses (s3://, hf://, https:// and whatever fsspec knows), and their local copies.

    address ─► RemoteCache.file ─► fetch ─► <folder>/ab/ab12….mp4 ─► decoders.py, as any file

An address names the same file for good: a file is fetched once, by all processes and threads that share the
folder, and stays while it is read (bounded_folder.py). It is fetched into a draft, so that an interrupted
transfer leaves nothing behind. Credentials are those of the libraries: environment variables and their files.

Of a tar archive (archives.py) only the headers and the wanted members are fetched. Its index is kept in the
same folder, also that of a local archive, whose members are read in place. A replaced archive or Parquet
table has other files: its version stamp is part of their names.
"""

import errno
import fcntl
import functools
import ipaddress
import json
import os
import posixpath
import re
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

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
from video_r1.files import cache_folder, lock
from video_r1.fingerprint import digest

ATTEMPTS = 3
PAUSE = 1.0  # seconds before the second attempt, twice as many before the third
HTTP_SECONDS = {"total": 600.0, "sock_connect": 30.0, "sock_read": 30.0}  # of a file, a connection, a silence
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*:(//|:)")
# Schemes that read local files: rows may not use them outside the media root.
_LOCAL = {"file", "local", "asynclocal", "reference", "git", "dvc", "generic"}
_RETRIED = (408, 425, 429)  # statuses below 500 that may pass
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_STAMPS = (
    "size", "ETag", "etag", "Content-MD5", "Digest", "content_hash", "md5Hash", "blob_id", "xet_hash", "CRC",
    "generation", "Last-Modified", "LastModified", "last_modified", "modified", "mtime", "updated", "created",
    "date_time",
)  # fmt: skip
_HOSTS = {"http", "https", "ftp", "sftp", "ssh", "smb", "webhdfs"}  # schemes whose addresses name a host
Found = TypeVar("Found")
from_rows: set[str] = set()  # hosts that rows of a manifest name, and not the user
_archives = threading.Lock()  # a file system inside another one's file shares one file position
MEMBERS = 1_000_000  # of archives whose indexes are in memory, some 250 MB
OUTAGE = 10  # files in a row without an answer, after which a host counts as out of reach
SILENCE = 10.0  # seconds without a stamp, after which the host is not asked for others
_MEDIA_BYTES = 8 << 20  # of a row group's other cells that are kept, if the table is smaller than that
_HEADERS = 1 << 16  # bytes that are read of an archive around each header
_OF_A_COMMIT = re.compile(r"hf://[^:]*@[0-9a-f]{40}/[^:]*")  # never changes


class NoAnswer(MediaError):
    """A file that was neither fetched nor refused."""


def is_address(path: object) -> bool:
    """Return whether it is an fsspec address: `scheme://…`, or several joined by `::`."""
    return isinstance(path, str) and "://" in path and _ADDRESS.match(path) is not None


def local_file(path: str) -> str | None:
    """Return the local file, perhaps an archive, that holds a sample's path; None for an address."""
    inside = split_member(path)
    file = inside[1] if inside else path
    return None if is_address(file) else file


def on_this_machine(path: str) -> str:
    """Return the plain path of a file:// address, also inside the path of a member; others unchanged."""
    if inside := split_member(path):
        return f"{inside[0]}::{on_this_machine(inside[1])}"
    return url_to_fs(path)[1] if path.startswith(("file://", "local://")) else path


def check_schemes(address: str, may_be_local: bool = True) -> None:
    """Raise ValueError, in words, for an unknown or forbidden scheme, ConfigError for a missing package."""
    for scheme in _schemes(address):
        try:
            get_filesystem_class(scheme)
        except ImportError as error:
            raise ConfigError(f"{scheme}:// needs a package that is not installed: {error}") from error
        except ValueError:
            raise ValueError(f"has an unknown scheme, {scheme}://") from None
        if scheme in _LOCAL and not may_be_local:
            raise ValueError("reads files of this machine; name them relative to the media root")


def hosts_of(address: str) -> set[str]:
    """Return the hosts that an address names, without those of clouds and buckets."""
    parts = [urlsplit(part) for part in address.split("::")]
    return {part.hostname for part in parts if part.scheme.lower() in _HOSTS and part.hostname}


def require_public(ip: str) -> None:
    """Raise MediaError for a loopback, link-local or private IP address."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    if not (getattr(address, "ipv4_mapped", None) or address).is_global:
        reason = "leads to this machine or its network; name its host in media_root if you trust the rows"
        raise MediaError("", reason)


def _public_socket(place: tuple[Any, ...]) -> socket.socket:
    require_public(place[4][0])
    return socket.socket(*place[:3])


async def _public_client(**settings: Any) -> Any:
    """Return an HTTP client that connects to public addresses only, also after redirects and DNS."""
    from aiohttp import ClientSession, TCPConnector

    return ClientSession(connector=TCPConnector(socket_factory=_public_socket), **settings)


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
    begin, end = _begin(root)
    return begin + posixpath.normpath(path) + end


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


def fetch(address: str, target: Path, limit: int, setting: str = "remote_cache_gb") -> None:
    """Copy a file to `target`. Raise as `at_address`, and MediaError beyond `limit` bytes."""

    def refuse_large(size: int | None, received: int, **_: object) -> None:
        if max(size or 0, received) > limit:
            raise MediaError(address, f"is larger than {setting} ({limit / 1e9:g} GB)")

    def copy(system: Any, path: str) -> None:
        system.get_file(path, str(target), callback=Callback(hooks={"limit": refuse_large}))
        if target.is_dir():
            target.rmdir()
            raise IsADirectoryError("a folder")

    at_address(address, copy)


def stamps_at(address: str) -> dict[str, str]:
    """Return size, ETag, modification time and the like of a file. Raise as `at_address`."""

    def told(system: Any, path: str) -> dict[str, str]:
        info = system.info(path)
        return {name: str(info[name]) for name in _STAMPS if info.get(name) is not None}

    return at_address(address, told)


def at_address(address: str, act: Callable[[Any, str], Found]) -> Found:
    """Return `act(file system, path)`, in up to three attempts.

    Raises:
        MediaError: there is no such file, it is refused, or the scheme is unknown.
        NoAnswer: all attempts failed for another reason.
        ConfigError: the scheme needs a package that is not installed.
        VideoR1Error: the disk is full.
    """
    try:
        check_schemes(address)
    except ValueError as error:
        raise MediaError(address, str(error)) from error
    if "hf" in _schemes(address):
        ask_the_hub()
    guarded = hosts_of(address) & from_rows
    failure: Exception | None = None
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE * attempt)
        try:
            for host in guarded:
                with suppress(socket.gaierror):
                    for *_, place in socket.getaddrinfo(host, None):
                        require_public(str(place[0]))
            system, path = url_to_fs(address, **_http_options(address, bool(guarded)))
            with _archives if "::" in address else nullcontext():
                return act(system, path)
        except MediaError as error:
            raise type(error)(address, error.reason) from error
        except Exception as error:  # each file system has errors of its own, without a common base
            if isinstance(error, OSError) and error.errno in _FULL:
                raise VideoR1Error(f"{address} cannot be kept on this machine ({error.strerror})") from error
            failure = error
        if reason := _refusal(failure):
            raise MediaError(address, reason) from failure
    assert failure is not None
    reasons = dict.fromkeys((type(failure).__name__, first_line(failure)))  # some have no message
    raise NoAnswer(address, f"cannot be fetched ({': '.join(reasons)}; {ATTEMPTS} attempts)") from failure


def _refusal(error: Exception) -> str:
    """Return the reason of a final refusal; "" if another attempt may succeed."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not a media file"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"may not be read ({first_line(error)})"
    if isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED:
        return f"is refused ({first_line(error)})"
    return ""


def _http_options(address: str, guarded: bool) -> dict[str, dict[str, Any]]:
    schemes = {"http", "https"} & set(_schemes(address))
    if not schemes:
        return {}
    from aiohttp import ClientTimeout  # only where it is used

    options: dict[str, Any] = {
        "client_kwargs": {"timeout": ClientTimeout(**HTTP_SECONDS), "trust_env": True}  # proxies, netrc
    }
    if guarded and not getproxies().keys() & {"http", "https", "all"}:  # a proxy connects by its own rules
        options["get_client"] = _public_client
    return dict.fromkeys(schemes, options)


class RemoteCache(BoundedFolder):
    """Local copies of remote files. Safe for threads and processes.

    Raises ConfigError when the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        super().__init__(folder, limit, "remote_cache")
        self.unanswered: Counter[str] = Counter()  # files in a row, by host or bucket
        self._indexes: dict[tuple[object, ...], Members] = {}  # of archives
        self._indexing = threading.Lock()
        self._states: dict[str, tuple[str, ...]] = {}  # of archives and tables at addresses
        self._asking = threading.Lock()
        self._silent: set[str] = set()  # hosts that did not answer

    @contextmanager
    def file(self, address: str) -> Iterator[str]:
        """Yield the path of the local copy, fetched if needed; it stays inside the block.

        Raises as `fetch`, and VideoR1Error when its host has failed for `OUTAGE` files in a row.
        """
        name = self._name(address)
        entry = self.place(name + _suffix(address))
        with ExitStack() as stack:
            held, path = locked(entry, fcntl.LOCK_SH), entry
            if held is None:
                entry.parent.mkdir(exist_ok=True)
                with self._alone(name):
                    held = locked(entry, fcntl.LOCK_SH)  # another process may have fetched it meanwhile
                    if held is None:
                        path = self.draft_of(entry)
                        stack.callback(path.unlink, missing_ok=True)
                        self._fetch(address, path)
                        held = path.open("rb")
                        lock(held, fcntl.LOCK_SH)
                        if self.admit(path, entry):
                            path = entry
            with held:
                self.used(path)
                yield str(path)

    def part(self, path: str) -> Part | list[Part]:
        """Return a member of a local archive, or the frames of a folder in it. Raise MediaError."""
        begin, _, archive = path.partition("::")

        def read() -> Members:
            with open(archive, "rb") as file:
                return members_of(file)

        try:
            facts = os.stat(archive)
            if not stat.S_ISREG(facts.st_mode):
                raise ValueError("the archive is no plain file")
            members = self._members(archive, (facts.st_size, facts.st_mtime_ns), read)
            return part_of(members, begin.removeprefix(TAR), archive)
        except FileNotFoundError as error:
            raise MediaError(path, "there is no such archive") from error
        except OSError as error:
            raise MediaError(path, f"the archive may not be read ({error.strerror})") from error
        except ValueError as error:
            raise MediaError(path, str(error)) from error

    def state(self, container: str) -> tuple[int | str, ...]:
        """Return the version stamp of a table or archive: size and modification time, or a digest of its
        ETag and the like; () if unknown.

        An address is asked once per process. If its host does not answer, the last known stamps of the
        files there are used.
        """
        if not is_address(container):
            facts = os.stat(container) if os.path.exists(container) else None
            return (facts.st_size, facts.st_mtime_ns) if facts else ()
        if _OF_A_COMMIT.fullmatch(container):
            return ()
        if (state := self._states.get(container)) is not None:
            return state  # without waiting for the lock
        with self._asking:
            if container not in self._states:
                self._states[container] = self._asked(container)
            return self._states[container]

    def _asked(self, container: str) -> tuple[str, ...]:
        entry, known = self.place(f"{digest(['state', container], size=20)}.json"), ()
        with suppress(OSError, ValueError):
            known = (str(json.loads(entry.read_bytes())),)
            self.used(entry)
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
            self.store(entry, json.dumps(*state).encode())
        return state

    def _members(self, archive: str, stamp: tuple[int | str, ...], read: Callable[[], Members]) -> Members:
        """Return the index of an archive from memory, from the folder, or newly read and stored in both."""
        key = (archive, *stamp)
        with self._indexing:
            members = self._indexes.pop(key, None)
            if members is None:
                entry = self.place(f"{digest(('members', *key), size=20)}.json")
                try:
                    members = {name: tuple(place) for name, place in json.loads(entry.read_bytes()).items()}
                    self.used(entry)
                except (OSError, ValueError, AttributeError, TypeError):
                    members = read()
                    self.store(entry, json.dumps(members).encode())
                room = MEMBERS - len(members)
                while self._indexes and sum(map(len, self._indexes.values())) > room:
                    self._indexes.pop(next(iter(self._indexes)))
            self._indexes[key] = members  # the last one used
            return members

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Hold the lock for fetching the file of that name."""
        path = self.place(name + PARTIAL)
        path.parent.mkdir(exist_ok=True)
        path.touch()
        while (held := locked(path, fcntl.LOCK_EX)) is None:  # its last holder has removed it
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
        except MediaError:  # the host has answered
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
            with suppress(FileNotFoundError):  # it came with another cell meanwhile
                draft.write_bytes(self.place(self._name(f"{begin}::{table}")).read_bytes())
                return
            with system.open(path, "rb", cache_type="none") as file:  # no read-ahead into other row groups
                wanted, room = None, max(file.seek(0, os.SEEK_END), _MEDIA_BYTES)
                for (number, part), content in cells_beside(file, column, row):
                    entry = self.place(self._name(cell_path(column, number, table, part)))
                    if (number, part) == (row, item):
                        wanted = content
                    elif content is not None and not entry.exists():
                        room -= len(content)  # a small table may unpack to very many bytes
                        if room >= 0:
                            self.store(entry, content)
            if wanted is None:
                raise ValueError("there are no bytes in that cell")
            draft.write_bytes(wanted)

    def _name(self, address: str) -> str:
        """Return the name of an entry: a digest of the address and of its container's version stamp."""
        inside = split_member(address)
        state = self.state(inside[1]) if inside else ()
        return digest([address, *state] if state else address, size=20)


def _place_of(address: str) -> str:
    """Return the host or bucket of an address."""
    return "/".join(address.rpartition("::")[2].split("/", 3)[:3])


def _suffix(address: str) -> str:
    """Return the extension of the file's name, by which FFmpeg recognises some containers."""
    name = address.partition("::")[0].partition("?")[0]
    return match[0] if (match := re.search(r"\.[A-Za-z0-9]{1,8}$", name)) else ""


@functools.cache
def open_remote_cache(folder: str | None, limit: int) -> RemoteCache:
    """Open the cache of a folder once per process; default: `~/.cache/video-r1/media`. Raises ConfigError."""
    caches = cache_folder()
    if folder is None and caches is None:
        raise ConfigError("remote_cache: there is no home folder for copies of remote files; name a folder")
    return RemoteCache(folder or cast(Path, caches) / "media", limit)
