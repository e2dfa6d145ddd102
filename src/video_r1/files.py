"""Appending to and replacing files that others read, and claiming a folder for one command."""

import errno
import fcntl
import glob
import json
import logging
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, TextIO

from video_r1.errors import RequestError, VideoR1Error, first_line

logger = logging.getLogger(__name__)

LOCK = ".lock"
_claimed: set[Path] = set()
_without_locks: set[int] = set()  # devices that the warning has named


def cache_folder() -> Path | None:
    """Return `$XDG_CACHE_HOME/video-r1` or `~/.cache/video-r1`; None for a user without a home folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if caches.startswith("~") else Path(caches, "video-r1")


def without_links(path: str, flags: int) -> int:
    """Open `path` for the builtin `open(…, opener=without_links)`; refuse a symbolic link.

    A downloaded run folder may contain links to any file of the user. Raises PermissionError.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        text = "this is a symbolic link, and nothing is written through links: remove it"
        raise PermissionError(errno.EPERM, text, path) from error


def append_line(path: Path, record: Any) -> None:
    """Append one JSON line. A half-written last line, left by a killed run, stays a separate line."""
    with open(path, "ab+", opener=without_links) as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json_lines([record]))


def part_of(path: Path, process: int) -> Path:
    """Return the file of a rank's part of `path`."""
    return path.with_name(f"part-{process}.{path.name}")


def parts_of(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"part-*.{glob.escape(path.name)}"))


def json_lines(records: Iterable[Any]) -> bytes:
    """Encode each record as a line of UTF-8. A lone surrogate, which a model may write, becomes an escape."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return "".join(lines).encode("utf-8", "backslashreplace")


def whole_lines(file: BinaryIO) -> Iterator[tuple[int, int, Any]]:
    """Yield (line number, byte offset, JSON object or None) of each line of a file open for reading and
    writing. An incomplete last line, left by a killed process, is removed from the file."""
    file.seek(0)
    place = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            file.truncate(place)
            return
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        yield number, place, record if isinstance(record, dict) else None
        place += len(line)


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Create an empty draft beside `path`; it replaces `path` in one step when the block ends without error.

    No reader sees half of the file: the draft is on the disk before it is renamed. The draft has a random
    name and is always a new file, so a link in a downloaded folder is replaced and never written through.
    A device or a pipe (/dev/full) is written directly.
    """
    if not path.is_symlink() and (path.is_char_device() or path.is_fifo()):
        yield path
        return
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
        yield draft
        flush(draft)
        draft.replace(path)
    except OSError as error:
        if str(error.filename) == str(draft):
            error.filename = str(path)
        raise
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a text file (UTF-8) that replaces `path` in one step when the block ends without an error."""
    with draft_of(path) as draft, draft.open("w", encoding="utf-8", errors="backslashreplace") as file:
        yield file


@contextmanager
def writing_rows(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Write manifest rows one by one, as a JSON list (.json) or JSON lines; the file appears in one step.

    Values that JSON lacks (times, decimals) are written as text.
    """
    is_list, written = path.suffix == ".json", 0
    with replacing(path) as file:

        def write(row: Mapping[str, Any]) -> None:
            nonlocal written
            begin, end = (",\n" if written else "[\n", "") if is_list else ("", "\n")
            file.write(begin + json.dumps(row, ensure_ascii=False, default=str) + end)
            written += 1

        yield write
        if is_list:
            file.write("\n]\n" if written else "[]\n")


def replace_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with writing_rows(path) as write:
        for row in rows:
            write(row)


def replace_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text)


def replace_json(path: Path, value: Any) -> None:
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """Wait until the folder's files are on the disk, before the folder is renamed."""
    for path in [folder, *folder.rglob("*")]:
        flush(path)


def check_place(setting: str, path: Path) -> None:
    """Raise VideoR1Error if nothing can be written at `path`. It needs neither torch nor a file to try."""
    place = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not os.access(place, os.W_OK):
        why = "is read-only" if os.statvfs(place).f_flag & os.ST_RDONLY else "may not be written"
        raise VideoR1Error(f"{setting} {path} cannot be written: {place} {why}; choose another one")


def follow_umask(folder: Path) -> None:
    """Give the folder's weights the mode of its other files; safetensors lets only the owner read them."""
    probe = folder / f".mode-{secrets.token_hex(8)}"
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def lock(file: IO[Any], how: int, of_process: bool = False) -> None:
    """Lock an open file until it is closed. An exclusive lock on NFS needs a file that is open for writing.

    how: `fcntl.LOCK_SH` or `LOCK_EX`, with `LOCK_NB` to raise BlockingIOError instead of waiting. of_process:
    forked processes do not keep the lock. A file system without locks gets one warning.
    """
    try:
        (fcntl.lockf if of_process else fcntl.flock)(file, how)
    except (BlockingIOError, PermissionError) as error:  # some systems say the one, some the other
        raise BlockingIOError(*error.args) from error
    except OSError as error:
        if (device := os.fstat(file.fileno()).st_dev) not in _without_locks:
            _without_locks.add(device)
            logger.warning(
                "%s cannot be locked (%s): let no two commands write to that folder at once", file.name, error
            )


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Claim a folder, made if it is missing, for this process inside the block; claims may be nested.

    The system releases the claim when the process ends. If the block fails, the lock file says why (`Claim`).
    Raises RequestError, which names the holder of the claim.
    """
    folder = folder.resolve()
    if folder in _claimed:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", opener=without_links) as file:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, of_process=True)
        except BlockingIOError as error:
            file.seek(0)
            raise RequestError(
                f"{folder} is being written by another command ({file.read().strip() or 'of unknown name'}); "
                "wait for its end, stop it, or name another folder"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _claimed.add(folder)
        ended = ""
        try:
            yield
        except BaseException as error:  # the lock file says what ended the command
            word = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            ended = f"{word}: {first_line(error)[:1000]}"
            raise
        finally:
            _claimed.discard(folder)
            file.truncate(0)
            file.write(ended)


class Claim(NamedTuple):
    """Content of a lock file: the process that claims the folder (or was killed), or how the last claim ended
    ("failed", "stopped") and why. All fields are empty after work that succeeded.
    """

    process: int | None = None
    host: str = ""
    ended: str = ""
    why: str = ""


def parse_claim(text: str) -> Claim:
    """Parse the text of a lock file.

    >>> parse_claim("process 17 on node3"), parse_claim("failed: CUDA out of memory").why
    (Claim(process=17, host='node3', ended='', why=''), 'CUDA out of memory')
    """
    if held := re.fullmatch(r"process ([1-9]\d{0,8}) on (\S+)", text.strip()):
        return Claim(process=int(held[1]), host=held[2])
    ended, _, why = text.strip().partition(": ")
    return Claim(ended=ended, why=why) if ended in ("failed", "stopped") else Claim()


LAST_FILES = ("adapter_config.json", "config.json")
"""Files that make a folder a model. They are written last."""


def is_finished(folder: Path) -> bool:
    """Return whether the model was saved after the run's last start, which writes config.yaml."""
    settings = folder / "config.yaml"
    if not settings.is_file() or not any(folder.glob("*.safetensors")):
        return False
    model = [path for name in LAST_FILES if (path := folder / name).is_file()]
    return any(path.stat().st_mtime_ns >= settings.stat().st_mtime_ns for path in model)


@contextmanager
def tolerated(record: str) -> Iterator[None]:
    """Warn once, instead of raising, if the disk refuses what is written inside."""
    try:
        yield
    except OSError as error:
        warn_once(f"{record} cannot be written ({error.strerror or error}); training continues without it")


@cache
def warn_once(message: str) -> None:
    logger.warning(message)
