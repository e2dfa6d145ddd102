"""Missing paths are told from hub ids without a network, and a hub out of reach is noticed at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from video_r1.availability import ask_the_hub, is_hub_id
from video_r1.data.manifests.records import load_manifest
from video_r1.errors import ConfigError, ManifestError
from video_r1.models.loading import load_model, load_processor
from video_r1.plan.shapes import model_config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", True),
        ("a-b/c.d_e", True),
        ("runs/sft", False),
        ("here/sft", False),  # a folder of that name exists
        ("./sft", False),
        ("/a/sft", False),
        ("~/sft", False),
        ("a/b/c", False),
        ("a/", False),
    ],
)
def test_a_missing_path_is_no_hub_id(
    name: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name) is expected


@pytest.fixture
def closed_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub whose port is closed, for a client that does not know that yet."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    ask_the_hub.cache_clear()
    yield
    ask_the_hub.cache_clear()


@pytest.mark.parametrize("load", [load_model, load_processor, model_config])
@pytest.mark.parametrize("name", ["runs/sft", "/nowhere/sft"])
def test_a_missing_folder_is_refused_without_asking_the_hub(
    load: Any, name: str, closed_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "get_session", asked)
    with pytest.raises(
        ConfigError, match=rf"^{name}: .*no such folder, and not the id of a model on the hub"
    ):
        load(name)
    assert constants.HF_HUB_OFFLINE is False


def test_a_missing_manifest_is_refused_without_asking_the_hub(closed_hub: None) -> None:
    with pytest.raises(ManifestError, match="no such manifest, and not a dataset id of the hub"):
        load_manifest("runs/sft")
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("load", [load_model, load_processor, model_config])
def test_a_hub_out_of_reach_is_not_tried_again(
    load: Any, closed_hub: None, caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"^owner/name: .*couldn't connect"):
        load("owner/name")
    assert time.monotonic() - start < 10  # its client's own way takes 23 s a file
    assert "http://127.0.0.1:9 does not answer" in caplog.text
    assert constants.HF_HUB_OFFLINE is True
