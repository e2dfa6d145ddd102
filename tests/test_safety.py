"""What a stranger's files cannot do: run code, read outside the media root, put script into the report."""

from __future__ import annotations

import json
import pickle
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import write_hostile_run, write_rl_run
from tgrpo_trainers import make_trainer
from tiny_questions import row, write_manifest

from video_r1.data.manifests.records import load_manifest
from video_r1.errors import ConfigError, ManifestError
from video_r1.models.loading import load_model
from video_r1.report.page import build_report
from video_r1.settings.shared import ModelSettings


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (Path.touch, (self.proof,))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_resuming_runs_no_pickled_code(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """A checkpoint whose training state was replaced by a pickle that runs code."""
    data = tmp_path / "data"
    data.mkdir()
    manifest = str(write_manifest(data, videos=2, images=1))
    settings: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1}
    make_trainer(checkpoint, manifest, tmp_path / "run", **settings).train()
    proof, folder = tmp_path / "proof", tmp_path / "run" / "checkpoint-1"
    torch.save({"state": Bomb(proof)}, folder / name)
    with pytest.raises(pickle.UnpicklingError):
        make_trainer(checkpoint, manifest, tmp_path / "run", **settings).train(
            resume_from_checkpoint=str(folder)
        )
    assert not proof.exists()


def test_checkpoints_have_no_other_pickles(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    manifest = str(write_manifest(data, videos=2, images=1))
    trainer = make_trainer(checkpoint, manifest, tmp_path / "run", max_steps=1, per_device_train_batch_size=1)
    trainer.train()
    trainer.publish_model()
    pickled = {p.name for p in (tmp_path / "run").rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl")}
    assert pickled == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}  # read with weights_only
    assert not [p for p in (tmp_path / "run").glob("*.p*t*") if p.suffix != ".jinja"]


def test_code_of_a_checkpoint_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    """A config that names Python code of its own; the default leaves it alone."""
    assert ModelSettings().trust_remote_code is False
    folder, proof = tmp_path / "model", tmp_path / "proof"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"import pathlib; pathlib.Path({str(proof)!r}).touch()\nclass Config: pass\n"
    )
    with pytest.raises(ConfigError):
        load_model(folder)
    assert not proof.exists()


@pytest.mark.parametrize("path", ["../secret.png", "link.png", "folder/secret.png", "/etc/hostname"])
def test_manifest_reads_nothing_outside_its_root(tmp_path: Path, path: str) -> None:
    """By `..`, by a link to a file, by a linked folder, by an absolute path."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    manifest = root / "manifest.json"
    manifest.write_text(json.dumps([row(1, "numerical", "image", path)]))
    with pytest.raises(ManifestError, match=r"leads out of the media root|is absolute"):
        load_manifest(manifest)


class Elements(HTMLParser):
    """Counts elements and finds event handlers and script addresses among their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0
        self.bad: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            if name.startswith("on") or "javascript:" in (value or "").lower():
                self.bad.append(f"<{tag} {name}={value}>")


def test_report_has_no_element_of_a_stranger(tmp_path: Path) -> None:
    """Parsed as a page: hostile questions, completions and names make no element and no handler."""
    write_hostile_run(tmp_path / "hostile")
    write_rl_run(tmp_path / "harmless", steps=10, every=5)
    pages = [build_report(tmp_path / name) for name in ("hostile", "harmless")]
    found = []
    for page in pages:
        elements = Elements()
        elements.feed(page.read_text(encoding="utf-8"))
        assert elements.bad == []
        found.append(elements.scripts)
    assert found[0] == found[1]
