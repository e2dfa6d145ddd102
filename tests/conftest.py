"""What all tests share: one thread per process, no network, no time limits, and why a test is skipped."""

from __future__ import annotations

import importlib.util
import os

# Before torch is imported: two test processes with a thread per core each would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# A machine with other work may be slow at any moment: no example has a deadline. Each run has the same ones.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    missing = {}
    if importlib.util.find_spec("vllm") is None:
        missing["vllm"] = "vLLM is not installed"
    if not torch.cuda.is_available():
        missing["gpu"] = "no CUDA device"
    if not torch.distributed.is_available():
        missing["dist"] = "torch is built without distributed support"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
