"""Processes of a training run that hold one vLLM between them: each has its shard of the weights.

All ranks of such a group must put the same requests to vLLM in the same order. So each gathers the others'
requests, generates for all, and keeps the completions of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import distributed

from video_r1.errors import ConfigError
from video_r1.processes import gather, process_count, process_index

T = TypeVar("T")


class TensorParallel:
    """`size` neighbouring processes of the run, this one among them.

    Every process of the run has to build it. Raises ConfigError when `size` does not divide their number.
    """

    def __init__(self, size: int) -> None:
        processes, rank = process_count(), process_index()
        if processes % size:
            raise ConfigError(
                f"vllm_tensor_parallel_size is {size}; it must divide the number of processes ({processes})"
            )
        self.size, self.index = size, rank % size
        if size > 1:
            firsts = range(0, processes, size)
            self.group = [distributed.new_group(list(range(at, at + size))) for at in firsts][rank // size]

    def gather(self, own: Sequence[T]) -> tuple[list[T], slice]:
        """Everything that these processes have, in their order, and where this one's own is."""
        if self.size == 1:
            return list(own), slice(None)
        parts = gather(list(own), self.group)
        start = sum(len(part) for part in parts[: self.index])
        return [entry for part in parts for entry in part], slice(start, start + len(own))
