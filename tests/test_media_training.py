"""Training on a manifest a tenth of whose media are bad: it finishes, and its figures say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damaged_media import bomb, good_files, many_streams, truncated
from tgrpo_trainers import make_trainer
from tiny_questions import read_lines, write_manifest

VIDEOS, IMAGES, STEPS, BATCH = 20, 10, 10, 3


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty questions; two clips and a picture of them are hostile or damaged."""
    folder = tmp_path_factory.mktemp("data")
    manifest = write_manifest(folder, VIDEOS, IMAGES)
    good, draw = good_files(tmp_path_factory.mktemp("good")), np.random.default_rng(0)
    (folder / "3.mp4").write_bytes(truncated(good, "mp4", draw))
    (folder / "11.mp4").write_bytes(many_streams(good, "mp4", draw))
    (folder / "25.png").write_bytes(bomb(good, "gif", draw))
    return manifest


@pytest.mark.slow
def test_an_epoch_with_a_tenth_of_bad_media_finishes_and_counts_them(
    checkpoint: Path, manifest: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "logging_steps": 1}
    make_trainer(checkpoint, str(manifest), tmp_path, num_generations=2, **changes).train()
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(line["loss"]) for line in lines)
    set_aside = read_lines(tmp_path / "quarantine.jsonl")
    assert sorted(line["problem_id"] for line in set_aside) == [3, 11, 25]  # each once
    reasons = {line["problem_id"]: line["reason"] for line in set_aside}
    assert "is not a video that FFmpeg can read" in reasons[3]
    assert "more than 64 streams" in reasons[11] and "declares 9000×9000 pixels" in reasons[25]
    # In one epoch each of the three came up once, and perhaps again in the draw of a replacement.
    assert 3 <= sum(line["media/skipped"] for line in lines) <= 6
