"""Local copies of files behind addresses.

    address ─► RemoteCache.file ─► fetch ─► <folder>/ab/ab12….mp4 ─► decoders.py, as any file

An address stands for one file for good: what has been fetched is not asked for again. Processes and threads
that share the folder fetch a file once; while it is read it stays (bounded_folder.py). It is fetched into a
draft, so that a transfer that breaks off leaves nothing behind (addresses.py).

Of a tar archive (tar_index.py) only its headers and the members that are asked for are fetched; its index is
kept in the same folder, also that of an archive on this machine, whose members are read where they lie. One
that is replaced, as well as a Parquet table (table_cells.py), has other files: its state is in their names.
"""

import fcntl
import functools
import json
import os
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from video_r1.data.sources.addresses import NoAnswer, at_address, fetch, is_address, stamps_at
from video_r1.data.sources.bounded_folder import PARTIAL, BoundedFolder, locked
from video_r1.data.sources.table_cells import cell_of, cell_path, cells_beside
from video_r1.data.sources.tar_index import (
    TABLE,
    TAR,
    Members,
    Part,
    member_of,
    members_of,
    part_of,
    split_member,
)  # fmt: skip
from video_r1.errors import MediaError, VideoR1Error
from video_r1.files import lock
from video_r1.fingerprint import digest

MEMBERS = 1_000_000  # of archives whose indexes are in memory, some 250 MB
OUTAGE = 10  # files in a row without an answer, after which a place counts as out of reach
SILENCE = 10.0  # seconds without the state of a container, after which its place is not asked for others'
_HEADERS = 1 << 16  # bytes that are read of an archive around each header
_OF_A_COMMIT = re.compile(r"hf://[^:]*@[0-9a-f]{40}/[^:]*")  # of which nothing changes


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
        """The path of the local copy, fetched where there is none; it stays there inside the block.

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
        """Where a member of an archive on this machine lies, or the frames of a folder in it. Raises
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
        """What another table or archive in the place of this one has not; () where nothing tells.

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
        """The index of an archive: from memory, from the folder, or read and kept in both."""
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
        """Inside, nobody else fetches the file of that name."""
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
                fetch(address, draft)
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
        """A member of an archive at an address, or a cell of a table. Raises as `fetch`."""
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
        content = system.cat_file(path, start=first, end=first + size)
        if len(content) != size:
            raise ValueError("its server does not give parts of files; fetch the archive first")
        draft.write_bytes(content)

    def _take_cell(self, system: Any, path: str, begin: str, table: str, draft: Path) -> None:
        """The other cells that are read with it become entries too."""
        column, row, item = cell_of(begin)
        with self._alone(digest(["table", table], size=20)):
            with suppress(FileNotFoundError):  # it was read with another one meanwhile
                draft.write_bytes(self.place(self._name(f"{begin}::{table}")).read_bytes())
                return
            with system.open(path, "rb", cache_type="none") as file:  # no byte of another group of rows
                found = None
                for (number, part), content in cells_beside(file, column, row):
                    entry = self.place(self._name(cell_path(column, number, table, part)))
                    if (number, part) == (row, item):
                        found = content
                    elif content is not None and not entry.exists():
                        self._keep(entry, content)
            if found is None:
                raise ValueError("there are no bytes in that cell")
            draft.write_bytes(found)

    def _name(self, address: str) -> str:
        """Of an entry: a digest of the address, and of the state of the table or archive that it is in."""
        inside = split_member(address)
        state = self.state(inside[1]) if inside else ()
        return digest([address, *state] if state else address, size=20)


def _place_of(address: str) -> str:
    """The host or bucket that it lies in."""
    return "/".join(address.rpartition("::")[2].split("/", 3)[:3])


def _used_now(path: Path) -> None:
    with suppress(PermissionError):  # another's
        os.utime(path)


def _suffix(address: str) -> str:
    """That of the file's name, by which FFmpeg tells some containers."""
    name = address.partition("::")[0].partition("?")[0]
    return found[0] if (found := re.search(r"\.[A-Za-z0-9]{1,8}$", name)) else ""


@functools.cache
def open_remote_cache(folder: str | None, limit: int) -> RemoteCache:
    """One a process for each folder; without a folder that of the user, `~/.cache/video-r1/media`."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return RemoteCache(folder or Path(caches, "video-r1", "media"), limit)
