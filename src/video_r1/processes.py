"""Processes of one command: values shared over all ranks, lost ranks, and signals (Ctrl-C and SIGTERM).

With a single process every collective function is the identity, and torch is not imported.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

from video_r1.errors import VideoR1Error, first_line
from video_r1.files import claimed

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=1)  # for the slowest rank: ranks that share work meet only at its end


class OneAProcess(Generic[T]):
    """Resource `one` of this process, made by `make` and closed at exit. A forked child makes its own, since
    it must not use its parent's pipes and sockets.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self.make = make
        self.one = make()
        os.register_at_fork(after_in_child=self.renew)
        atexit.register(lambda: self.one.close())  # pyright: ignore[reportAttributeAccessIssue]

    def renew(self) -> None:
        self.one = self.make()


def process_count() -> int:
    return _distributed().get_world_size() if _running() else 1


def process_index(group: Any = None) -> int:
    return _distributed().get_rank(group) if _running() else 0


def gather(value: T, group: Any = None) -> list[T]:
    """Gather the value of every rank of the group (default: all), in order. Every rank must call this."""
    if not _running():
        return [value]
    values: list[Any] = [None] * _distributed().get_world_size(group)
    _distributed().all_gather_object(values, value, group=group)
    return values


def own_share(work: Sequence[T]) -> Sequence[T]:
    return work[process_index() :: process_count()]


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """Join the processes that a launcher (accelerate, torchrun) started, for work shared in `folder`.

    Only rank 0 writes to standard output. The backend is gloo: it needs no GPU and notices a lost rank at
    once, and the others raise VideoR1Error. Closing an engine of vLLM ends the group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _running():
        yield
        return
    os.environ["ACCELERATE_USE_FSDP"] = "false"  # set by a launcher's config; transformers would load shards
    _distributed().init_process_group("gloo", timeout=LONGEST_WAIT)
    with ExitStack() as closing:
        closing.callback(lambda: _distributed().destroy_process_group() if _running() else None)
        if process_index() > 0:
            closing.enter_context(redirect_stdout(closing.enter_context(open(os.devnull, "w"))))
        closing.enter_context(naming_lost_processes(folder, "the answers"))
        yield


def wait_for_everyone() -> None:
    if _running():
        _distributed().barrier()


def decided_by_first(decide: Callable[[], T]) -> T:
    """Call `decide` on rank 0 and return its result on every rank. A VideoR1Error is raised on every rank."""
    outcome: Any = None
    if process_index() == 0:
        try:
            outcome = decide()
        except VideoR1Error as error:
            outcome = error
    outcome = gather(outcome)[0]
    if isinstance(outcome, VideoR1Error):
        raise outcome
    return outcome


@contextmanager
def claimed_by_first(folder: Path) -> Iterator[None]:
    """Claim the folder for all ranks of a run: rank 0 holds the claim (see `files.claimed`)."""
    with ExitStack() as claim:
        decided_by_first(lambda: claim.enter_context(claimed(folder)))
        yield


def gather_lists(own: Sequence[T], group: Any = None) -> tuple[list[T], slice]:
    """Concatenate the lists of all ranks of the group; return the slice that is this rank's too."""
    parts = gather(list(own), group)
    start = sum(len(part) for part in parts[: process_index(group)])
    return [entry for part in parts for entry in part], slice(start, start + len(own))


def is_lost_process(error: BaseException) -> bool:
    """Return whether a collective call failed because another rank is gone or did not answer in time."""
    gloo = isinstance(error, RuntimeError) and "gloo/" in str(error)  # its messages name its source file
    return gloo or isinstance(error, _distributed().DistError)


@contextmanager
def naming_lost_processes(folder: Path, saved: str = "the last checkpoint") -> Iterator[None]:
    """Turn the error that follows a lost rank into a VideoR1Error that says how to resume from `folder`."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        reason = first_line(error).partition(". This is typically")[0]
        raise VideoR1Error(
            f"process {process_index()} has lost another process of this run, whose own output says why "
            f"({reason}). Start the same command again, on every machine of the run: it goes on from "
            f"{saved} in {folder}"
        ) from error


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed


def _running() -> bool:
    # Without torch imported, no processes have been joined.
    return "torch.distributed" in sys.modules and (
        _distributed().is_available() and _distributed().is_initialized()
    )


# ---- Signals

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Signal that ended the work. The text says what is saved."""

    def __init__(self, number: int = signal.SIGINT, saved: str = "") -> None:
        super().__init__(saved)
        self.number = int(number)


def number_of(stop: KeyboardInterrupt) -> int:
    return stop.number if isinstance(stop, Interrupted) else int(signal.SIGINT)


class Ending:
    """Signal handler of a command's process. A forked child ends by the signal's default."""

    def __init__(self) -> None:
        self.process = os.getpid()

    def __call__(self, number: int, frame: Any) -> None:
        if os.getpid() == self.process:
            raise Interrupted(number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise Interrupted on a signal inside the block. Ignored signals (nohup) stay ignored."""
    with _handled_by(Ending()):
        yield


@contextmanager
def told_of_signals(tell: Callable[[int], None]) -> Iterator[None]:
    """Call `tell` on a signal inside the block instead of ending the work. This has an effect only within
    `ended_by_signals`: a program that uses this package as a library keeps its own handlers.
    """
    present = signal.getsignal(signal.SIGTERM)
    if not isinstance(present, Ending) or present.process != os.getpid():
        yield
        return
    with _handled_by(lambda number, frame: tell(number)):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
