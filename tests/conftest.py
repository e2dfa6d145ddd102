"""What all tests share: one thread per process, no network, no time limits, and why a test is skipped."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason. Tests of vLLM share one process of pytest-xdist, so
    that only one vLLM lives at a time."""
    missing = {}
    if importlib.util.find_spec("vllm") is None:
        missing["vllm"] = "vLLM is not installed"
    if not torch.cuda.is_available() and "GPU_CHECK_DEVICE" not in os.environ:
        missing["gpu"] = "no CUDA device"
    if not torch.distributed.is_available():
        missing["dist"] = "torch is built without distributed support"
    for item in items:
        if item.get_closest_marker("vllm") is not None:
            item.add_marker(pytest.mark.xdist_group("vllm"))
        for marker, reason in missing.items():
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def own_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Copies of remote files in a folder of this test's own, fetched without pauses between attempts."""
    from video_r1.data.sources import addresses, remote

    monkeypatch.setattr(addresses, "PAUSE", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    remote.open_remote_cache.cache_clear()


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system whose addresses begin with memory://, emptied afterwards."""
    import fsspec

    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL with its processor."""
    from tiny_models import tiny_checkpoint

    return tiny_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips and three pictures with questions of all types."""
    from tiny_questions import write_manifest

    return write_manifest(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def vllm_engine() -> Iterator[Any]:
    """A VLLMEngine of the lab's base in float32, up to 1,024 tokens. Each user hands over weights first."""
    from video_r1.lab.model import base_folder
    from video_r1.models.loading import load_model, load_processor
    from video_r1.rollout.vllm.engine import VLLMEngine

    model, processor = load_model(base_folder(), "float32"), load_processor(base_folder())
    engine = VLLMEngine(model, processor, max_model_len=1024)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def studio_browser() -> Iterator[Any]:
    pytest.importorskip("starlette", reason="the extra studio is not installed")
    pytest.importorskip("playwright", reason="playwright is not installed")
    from browser import chromium, find_chromium

    if find_chromium() is None:
        pytest.skip("no chromium on this machine")
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(studio_browser: Any) -> Iterator[Any]:
    """A page that has to stay without errors, refusals of its policy, and requests to elsewhere."""
    problems: list[str] = []
    shown = studio_browser.new_page(viewport={"width": 1280, "height": 900})
    shown.on("pageerror", lambda error: problems.append(str(error)))
    shown.on(
        "console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None
    )
    shown.on("request", lambda asked: None if "//127.0.0.1:" in asked.url else problems.append(asked.url))
    shown.on("dialog", lambda dialog: problems.append(dialog.message))
    yield shown
    assert problems == [] and shown.evaluate("window.pwned") is None
    shown.close()
