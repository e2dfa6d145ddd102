"""What several processes of one command agree on, and what each of them has once.

With a single process every function is the identity, and torch is not imported: what reads manifests alone,
as the studio's server, does without it.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from video_r1.errors import VideoR1Error, first_line
from video_r1.files import claimed

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=1)  # for processes that share work, who meet at its end only


class Closable(Protocol):
    def close(self) -> object: ...


Held = TypeVar("Held", bound=Closable)


class OneAProcess(Generic[Held]):
    """`one` is what `make` gives, closed when the process ends. A forked process has another, as it must not
    talk on its parent's pipes and sockets.
    """

    def __init__(self, make: Callable[[], Held]) -> None:
        self.make = make
        self.one = make()
        os.register_at_fork(after_in_child=self.renew)
        atexit.register(lambda: self.one.close())

    def renew(self) -> None:
        self.one = self.make()


def process_count() -> int:
    return _distributed().get_world_size() if _running() else 1


def process_index(group: Any = None) -> int:
    return _distributed().get_rank(group) if _running() else 0


def gather(value: T, group: Any = None) -> list[T]:
    """The value of every process of the group (default: all), in their order; each of them has to call it."""
    if not _running():
        return [value]
    values: list[Any] = [None] * _distributed().get_world_size(group)
    _distributed().all_gather_object(values, value, group=group)
    return values


def own_share(work: Sequence[T]) -> Sequence[T]:
    """What of some work is this process's: every n-th piece of it, with n processes."""
    return work[process_index() :: process_count()]


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """Inside, the processes that a launcher (accelerate, torchrun) has started for this command know of one
    another, and only the first of them writes to standard output. For work that they share in `folder`, each
    with a whole model. They agree over gloo, which needs no GPU and notices at once when one is lost: the
    others then raise VideoR1Error. An engine of vLLM ends the group when it is closed, so nothing is agreed
    on after that.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _running():
        yield
        return
    os.environ["ACCELERATE_USE_FSDP"] = "false"  # of a launcher's file; transformers would load shares
    _distributed().init_process_group("gloo", timeout=LONGEST_WAIT)
    with ExitStack() as closing:
        closing.callback(lambda: _distributed().destroy_process_group() if _running() else None)
        if process_index() > 0:
            closing.enter_context(redirect_stdout(closing.enter_context(open(os.devnull, "w"))))
        closing.enter_context(naming_lost_processes(folder, "the answers"))
        yield


def wait_for_everyone() -> None:
    """Returns when every process has come here."""
    if _running():
        _distributed().barrier()


def decided_by_first(decide: Callable[[], T]) -> T:
    """What `decide` returns in the first process, in all of them; a VideoR1Error is raised in all of them."""
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
    """As `claimed`, for all processes of a run: the first one holds the claim."""
    with ExitStack() as claim:
        decided_by_first(lambda: claim.enter_context(claimed(folder)))
        yield


def gather_lists(own: Sequence[T], group: Any = None) -> tuple[list[T], slice]:
    """The lists of all processes (of the group) end to end, and where this one's own is in them."""
    parts = gather(list(own), group)
    start = sum(len(part) for part in parts[: process_index(group)])
    return [entry for part in parts for entry in part], slice(start, start + len(own))


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective call failed because another process, its machine or the network is gone, or did
    not answer within `ddp_timeout`. (gloo has no error of its own: its messages name its source file.)
    """
    return isinstance(error, _distributed().DistError) or (
        isinstance(error, RuntimeError) and "gloo/" in str(error)
    )


@contextmanager
def naming_lost_processes(folder: Path, saved: str = "the last checkpoint") -> Iterator[None]:
    """Turns the error that a lost process leaves in the others into a VideoR1Error that says how to go on:
    from what is saved in the folder."""
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
    """Where nobody has imported torch, no processes have been joined."""
    return "torch.distributed" in sys.modules and (
        _distributed().is_available() and _distributed().is_initialized()
    )
