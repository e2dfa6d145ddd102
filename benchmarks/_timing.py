"""Two ways of doing the same work compared in one process: time in turns, peak memory, counted FLOPs."""

from __future__ import annotations

import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Work = Callable[[], object]
T = TypeVar("T")


def seconds(work: Work, device: torch.device) -> float:
    """Wall time of one call, the device's queue included."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def in_turns(ours: Callable[[], T], other: Callable[[], T], rounds: int) -> list[tuple[T, T]]:
    """What both measure, round by round; who begins changes."""
    pairs = []
    for number in range(rounds):
        if number % 2:
            late = other()
            pairs.append((ours(), late))
        else:
            pairs.append((ours(), other()))
    return pairs


def spread(ratios: Iterable[float]) -> dict[str, float]:
    """`ratio` (their median), `ratio_min` and `ratio_max`."""
    values = list(ratios)
    figures = {"ratio": statistics.median(values), "ratio_min": min(values), "ratio_max": max(values)}
    return {name: round(value, 3) for name, value in figures.items()}


def compare(ours: Work, other: Work, rounds: int, device: torch.device) -> dict[str, Any]:
    """Both in turns, after one warm-up of each; a ratio above 1 means that ours is faster.

    Returns `ratio` (median over rounds of other / ours within a round), `ratio_min`, `ratio_max`, the median
    seconds of both, `rounds`, and `peak_memory_ratio` (ours / other) with both peaks in MiB.
    """
    ours_peak, other_peak = peak_bytes(ours, device), peak_bytes(other, device)
    times = in_turns(lambda: seconds(ours, device), lambda: seconds(other, device), rounds)
    return {
        **spread(b / a for a, b in times),
        "seconds": round(statistics.median(a for a, _ in times), 4),
        "seconds_other": round(statistics.median(b for _, b in times), 4),
        "rounds": rounds,
        "peak_memory_ratio": round(ours_peak / other_peak, 3),
        "peak_mib": round(ours_peak / 2**20, 1),
        "peak_mib_other": round(other_peak / 2**20, 1),
    }


def peak_bytes(work: Work, device: torch.device) -> int:
    """Most tensor bytes that lived at once during one call, beyond those that lived before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    results: Any = recorded.profiler and recorded.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def flops(work: Work) -> int:
    """Counted floating-point operations of one call: matrix products, convolutions and attention."""
    linear = torch.ops.mkldnn._linear_pointwise
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def count(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def count_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    def count_linear(inputs: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * math.prod(inputs) * weight[0]

    with FlopCounterMode(
        display=False,
        custom_mapping={attention: count, backward: count_backward, linear: count_linear},
    ) as counter:
        work()
    return counter.get_total_flops()


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int = 8192) -> float:
    """Measured FLOP/s of a square matrix product, the best of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
