"""The package without its extras: everything can be imported, and training runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXTRAS = ("deepspeed", "bitsandbytes", "wandb", "tensorboard", "peft", "vllm", "trl", "decord")
SCRIPT = f"""
import importlib, importlib.util, pkgutil, sys
from importlib.machinery import PathFinder

hidden = set({EXTRAS!r})

class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Hidden if finder is PathFinder else finder for finder in sys.meta_path]
assert not any(map(importlib.util.find_spec, hidden))

import video_r1
for module in pkgutil.walk_packages(video_r1.__path__, "video_r1."):
    if module.name != "video_r1.__main__":  # Python's
        importlib.import_module(module.name)

from pathlib import Path
from tgrpo_trainers import make_trainer
from tiny_models import tiny_checkpoint
from tiny_questions import write_manifest
folder = Path(sys.argv[1])
checkpoint, manifest = tiny_checkpoint("qwen2_5_vl", folder / "model"), str(write_manifest(folder))
trainer = make_trainer(checkpoint, manifest, folder / "run", max_steps=1, save_steps=1)
trainer.train()
assert not hidden & {{name.partition(".")[0] for name in sys.modules}}
print("trained", trainer.state.global_step)
"""


@pytest.mark.slow
def test_without_extras(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trained 1" in done.stdout
