"""Processes of a training run that hold one vLLM between them: each has its shard of the weights.

All ranks of such a group must put the same requests to vLLM in the same order. So each gathers the others'
requests, generates for all, and keeps the completions of its own.
"""

from __future__ import annotations

from typing import Any

from torch import distributed

from video_r1.errors import ConfigError
from video_r1.processes import process_count, process_index


def neighbours(size: int) -> Any:
    """The torch group of the `size` neighbouring processes that this one is among; None for itself alone.

    Every process of the run has to call it. Raises ConfigError when `size` does not divide their number.
    """
    processes = process_count()
    if processes % size:
        raise ConfigError(
            f"vllm_tensor_parallel_size is {size}; it must divide the number of processes ({processes})"
        )
    if size == 1:
        return None
    groups = [distributed.new_group(list(range(at, at + size))) for at in range(0, processes, size)]
    return groups[process_index() // size]
