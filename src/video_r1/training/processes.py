"""What several training processes agree on. With a single process every function is the identity."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def process_count() -> int:
    return torch.distributed.get_world_size() if _running() else 1


def process_index() -> int:
    return torch.distributed.get_rank() if _running() else 0


def gather(value: T) -> list[T]:
    """The value of every process, in their order. Every process has to call it."""
    if not _running():
        return [value]
    values: list[Any] = [None] * process_count()
    torch.distributed.all_gather_object(values, value)
    return values


def wait_for_everyone() -> None:
    """Returns when every process has come here."""
    if _running():
        torch.distributed.barrier()


def gather_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """The rows [Q, …] of all processes end to end, and where this process's own are among them."""
    parts = gather(rows)
    start = sum(len(part) for part in parts[: process_index()])
    return torch.cat(parts), slice(start, start + len(rows))


def _running() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
