"""Processes of a training run that hold one vLLM between them: each has its shard of the weights.

All ranks of such a group must put the same requests to vLLM in the same order. So each gathers the others'
requests, generates for all, and keeps the completions of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import distributed

from video_r1.errors import ConfigError
from video_r1.processes import process_count, process_index

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """`size` neighbouring ranks, of which this process is number `index`. group: None for a size of 1."""

    size: int = 1
    index: int = 0
    group: Any = None

    def gather(self, own: Sequence[T]) -> tuple[list[T], slice]:
        """Everything that the ranks of the group have, in their order, and where this process's own is."""
        if self.size == 1:
            return list(own), slice(None)
        parts: list[Any] = [None] * self.size
        distributed.all_gather_object(parts, list(own), group=self.group)
        start = sum(len(part) for part in parts[: self.index])
        return [entry for part in parts for entry in part], slice(start, start + len(own))


def tensor_parallel(size: int) -> TensorParallel:
    """The group of this process. Every process of the run has to call it.

    Raises ConfigError when `size` does not divide the number of processes.
    """
    processes = process_count()
    if processes % size:
        raise ConfigError(
            f"vllm_tensor_parallel_size is {size}; it must divide the number of processes ({processes})"
        )
    if size == 1:
        return TensorParallel()
    rank = process_index()
    groups = [distributed.new_group(list(range(first, first + size))) for first in range(0, processes, size)]
    return TensorParallel(size, rank % size, groups[rank // size])
