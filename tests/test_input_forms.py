"""A set of questions with its media as files, folders of frames, members of archives and cells of a table: a
training has the same figures."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from media_files import decoded_frames
from PIL import Image
from tgrpo_trainers import make_trainer
from tiny_questions import read_lines

from video_r1.data.manifests.records import load_manifest
from video_r1.data.sources import remote

FIGURES = ("loss", "grad_norm", "reward/total", "temporal/p", "media/skipped", "completion/length")


def in_other_forms(manifest: Path, folder: Path) -> Path:
    """The rows of a manifest, each in one of the other forms."""
    rows, cells = json.loads(manifest.read_text()), []
    with tarfile.open(folder / "media.tar", "w") as archive:
        for number, row in enumerate(rows):
            file = manifest.parent / row["path"]
            form = number % 4 if row["data_type"] == "video" else 2 + number % 2
            if form < 2:
                frames = folder / f"frames {number}"
                frames.mkdir()
                for place, frame in enumerate(decoded_frames(file)):
                    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(frames / f"{place}.png")
                row |= {"path": frames.name, "fps": 4}
                if form == 1:
                    archive.add(frames, f"clips/{number}")
                    row["path"] = f"tar://clips/{number}/::media.tar"
            elif form == 2:
                archive.add(file, file.name)
                row["path"] = f"tar://{file.name}::media.tar"
            else:
                row["path"] = f"parquet://file/{len(cells)}::media.parquet"
                cells.append(file.read_bytes())
    pq.write_table(pa.table({"file": cells}), folder / "media.parquet")
    (folder / "manifest.json").write_text(json.dumps(rows))
    return folder / "manifest.json"


@pytest.mark.slow
def test_a_training_has_the_same_figures(
    checkpoint: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    remote.open_remote_cache.cache_clear()
    found = []
    (tmp_path / "other").mkdir()
    other = in_other_forms(manifest, tmp_path / "other")
    forms = {sample.path.partition("://")[0] for sample in load_manifest(other) if "://" in sample.path}
    assert forms == {"tar", "parquet"}
    for name, questions in (("files", manifest), ("forms", other)):
        run = tmp_path / name
        changes: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "num_generations": 2}
        trainer = make_trainer(checkpoint, str(questions), run, **changes)
        trainer.train()
        lines = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
        found.append([{name: line.get(name) for name in FIGURES} for line in lines])
        assert not (run / "quarantine.jsonl").exists()
    assert len(found[0]) == 2 and found[0] == found[1]
