"""Every command line in a code block of README.md and docs/ runs in a short form, or is parsed.

It runs on a CPU, in a folder that has what its block names: tables, clips and manifests of some questions.
SHORT is added to its words; models are the packaged one, engines the process itself, /data that folder.
Recipes for GPUs and the commands of READ are parsed alone. A command that has no rule fails. The lines of
first-day.md run in test_first_day.py.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from doc_commands import PAGES, request, shell_blocks
from measured_memory import model_of
from tiny_questions import write_manifest

from video_r1.cli import find_command, main, read_request
from video_r1.commands import TRAINS
from video_r1.recipe_files import RECIPES

pytestmark = pytest.mark.slow

SHORT = {
    "data make": "--workers 1",
    "data check": "--workers 1",
    "data audit": "--limit 2 --samples 1 --max_new_tokens 4 --frame_pixels 3136",
    "lab make": "--train 4 --test 4 --workers 1",
    "lab base": "--steps 1",
    "sft": "--max_steps 1 --per_device_train_batch_size 2",
    "rl": "--num_generations 2",
    "plan": "--model_config narrow",
    "recipes": "",
    "eval": "--limit 2 --max_new_tokens 4 --frame_pixels 3136",
    "ask": "--max_new_tokens 4 --frame_pixels 3136",
    "report": "",
}
"""What is added to a command that runs."""
READ = {
    "annotate": "its teacher answers in tags, which the packaged model has not learnt",
    "merge": "it needs the adapters of a run for a GPU",
    "serve": "it needs vLLM, and does not end",
    "demo": "it takes minutes",
    "studio": "it does not end",
}
"""Commands that are read alone, and why. They have tests of their own."""
MODELS = ("model", "model_name_or_path")
MANIFESTS = ("manifest", "train_manifest", "eval_manifest")


BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name != "first-day.md"
    for number, block in enumerate(shell_blocks(page.read_text(encoding="utf-8")))
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages name."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("clips", "Video-R1-data", "NExTVideo/1164", "runs/mine", "runs/grpo"):
        (folder / name).mkdir(parents=True)
    rows = json.loads(write_manifest(folder / "clips").read_text())
    (folder / "clips" / "manifest.json").unlink()
    (folder / "clips" / "0.mp4").rename(folder / "clips" / "kitchen.mp4")
    rows[0]["path"] = "kitchen.mp4"
    there = [{**row, "path": f"clips/{row['path']}"} for row in rows]
    (folder / "questions.json").write_text(json.dumps(there))
    table = [f"Which way?,left,right,{'AB'[n % 2]},{row['path']}" for n, row in enumerate(rows[:5])]
    (folder / "questions.csv").write_text("\n".join(["question,option_a,option_b,answer,video", *table]))
    shutil.copy(folder / "clips" / "1.mp4", folder / "Video-R1-data" / "a.mp4")
    (folder / "Video-R1-260k.json").write_text(json.dumps([{**rows[1], "path": "./a.mp4"}]))
    shutil.copy(folder / "clips" / "1.mp4", folder / "NExTVideo" / "1164" / "4010069381.mp4")
    (folder / "mc.csv").write_text(
        "video,question,answer,qid,type,a0,a1,a2,a3,a4\n4010069381,which way,0,1,CW,left,right,up,down,out\n"
    )
    for run in ("mine", "grpo"):
        (folder / "runs" / run / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n'
        )
    (folder / "my.yaml").write_text("model_name_or_path: m\ntrain_manifest: t\noutput_dir: o\n")
    model_of(128, 4, 2048).config.save_pretrained(folder / "narrow")
    return folder


@pytest.mark.parametrize("block", BLOCKS)
def test_each_line_of_a_block(
    block: list[str], shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(shelf, tmp_path / "day"))
    for line in block:
        follow(line)


def follow(line: str) -> None:
    """Do with a line what its rule says. AssertionError: it has none, or does not work."""
    words = shlex.split(line.replace("$R/", f"{RECIPES}/"), comments=True)
    found = request(words)
    if found is None:
        return  # other programs; test_docs.py checks the make targets
    command, rest = find_command(found)
    recipe = read_request(command, [word for word in rest if word != "--smoke"])
    values = recipe.values()
    for_gpus = recipe.made_for.gpus != 0 or values.get("use_vllm") or "video_r1" in words
    if command in TRAINS and "--smoke" not in rest and for_gpus:
        return
    if command not in READ and not out_of_reach(values):
        assert command in SHORT, f"no rule for the command {command}"
        run_short(command, rest, values)


def out_of_reach(values: Mapping[str, Any]) -> bool:
    """Return whether it needs addresses or the files of benchmarks, which no test has."""
    return bool(values.get("bench")) or any(
        "://" in value for value in values.values() if isinstance(value, str)
    )


def run_short(command: str, words: list[str], values: Mapping[str, Any]) -> None:
    """Run it on what is there: other models are the packaged one, other manifests the folder's."""
    models = {values[name] for name in MODELS if values.get(name)}
    instead = {model: "lab-base" for model in models if not Path(model, "config.json").is_file()}
    for manifest in {values[name] for name in MANIFESTS if values.get(name) in words}:
        if not Path(manifest).suffix:  # a data set of the hub
            instead[manifest] = "questions.json"
        elif not Path(manifest).exists():
            shutil.copy("questions.json", manifest)
    words = [(instead | {"/data": "."}).get(word, word) for word in words]
    extra = [*SHORT[command].split(), *(["--engine", "transformers"] if values.get("engine") else [])]
    assert main([*command.split(), *words, *extra]) == 0


def test_a_line_that_does_not_work_is_found(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf)
    with pytest.raises(AssertionError):
        follow("video-r1 report runs/nobodys")
