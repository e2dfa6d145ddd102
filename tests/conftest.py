"""Shared fixtures; one thread per process, no network, no time limits, and why a test is skipped."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import signal
import sys
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
# A shell ignores SIGINT in jobs that it starts in the background, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A machine with other work may be slow at any moment: no example has a deadline. Each run has the same ones.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that this machine cannot run, with the reason. All tests of vLLM run in one process of
    pytest-xdist, so that only one vLLM is in memory at a time."""
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
    """Give the test its own cache of remote files, with no pause between attempts."""
    from video_r1.data.sources import remote

    monkeypatch.setattr(remote, "PAUSE", 0.0)
    remote.from_rows.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    remote.open_remote_cache.cache_clear()


@pytest.fixture
def memory() -> Iterator[Any]:
    """The memory:// file system, emptied after the test."""
    import fsspec

    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


@pytest.fixture(autouse=True)
def unchecked_fast_paths() -> None:
    """Each test starts with fast paths that have not been compared with the plain ones yet."""
    if (checked := sys.modules.get("video_r1.models.checked")) is None:
        return
    checked.WORKING.clear()
    for name in [name for name in sys.modules if name.startswith(("video_r1.models.", "video_r1.rollout."))]:
        for value in vars(sys.modules[name]).values():
            if isinstance(value, checked.Checked):
                value.agrees = value.gradients_agree = None


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Map each file of the folder to its size and modification time."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny Qwen2.5-VL with its processor. All tests share it: copy the folder before you change a file."""
    from tiny_models import tiny_checkpoint

    folder = tiny_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("model"))
    before = stamps(folder)
    yield folder
    assert before.items() <= stamps(folder).items(), "a test changed the shared checkpoint"


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Five clips and three pictures with questions of all types. All tests share the files: change none."""
    from tiny_questions import write_manifest

    path = write_manifest(tmp_path_factory.mktemp("data"))
    before = stamps(path.parent)
    yield path
    assert before.items() <= stamps(path.parent).items(), "a test changed the shared manifest"


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips as they lie about, for tables that name them. All tests share it: change no file."""
    from made_tables import write_shelf

    return write_shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small lab. All tests share it: change no file."""
    from video_r1.lab.clips import write_lab
    from video_r1.settings.commands import LabSettings

    folder = tmp_path_factory.mktemp("lab")
    write_lab(LabSettings(folder=str(folder), train=16, test=8, seed=0, workers=1))
    return folder


@pytest.fixture(scope="session")
def vllm_engines() -> Iterator[list[Any]]:
    engines: list[Any] = []
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture
def vllm_engine(vllm_engines: list[Any]) -> Any:
    """A VLLMEngine of the lab's base in float32, up to 1,024 tokens. Tests load their weights first.

    It is made anew when a test has closed another engine, since that ends vLLM's process groups.
    """
    from vllm.distributed import parallel_state

    from video_r1.lab.model import base_folder
    from video_r1.models.loading import load_model, load_processor
    from video_r1.rollout.vllm.engine import VLLMEngine

    if not vllm_engines or not parallel_state.model_parallel_is_initialized():
        while vllm_engines:
            vllm_engines.pop().close()  # before the next one: its end would take the new groups with it
        gc.collect()
        model, processor = load_model(base_folder(), "float32"), load_processor(base_folder())
        vllm_engines.append(VLLMEngine(model, processor, max_model_len=1024))
    return vllm_engines[0]


@pytest.fixture
def process_group() -> Iterator[None]:
    """A gloo group of this process alone; if a vLLM engine of other tests runs in it, the engine's."""
    from torch import distributed

    if own := not distributed.is_initialized():
        store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    if own:
        distributed.destroy_process_group()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser of all tests."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    import browser

    if browser.find_chromium() is None:
        pytest.skip("no chromium on this machine")
    with browser.chromium() as opened:
        yield opened


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page that must show no errors, policy violations or requests to other hosts."""
    problems: list[str] = []
    own = re.compile(r"(http://127\.0\.0\.1:|file:|data:image/jpeg|blob:)")
    shown = chromium.new_page(viewport={"width": 1280, "height": 900})
    shown.on("pageerror", lambda error: problems.append(str(error)))
    shown.on(
        "console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None
    )
    shown.on("request", lambda asked: None if own.match(asked.url) else problems.append(asked.url))
    shown.on("dialog", lambda dialog: problems.append(dialog.message))
    yield shown
    assert problems == [] and shown.evaluate("window.pwned") is None
    shown.close()
