"""The last lines of commands: the next command, with existing paths, ready to paste."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from video_r1.cli import find_command, main, read_request
from video_r1.next_steps import next_steps
from video_r1.recipe import Recipe
from video_r1.recipe_files import RECIPES


def after(words: str) -> list[str]:
    name, rest = find_command(shlex.split(words))
    return [line.removeprefix("next: ") for line in next_steps(read_request(name, rest))]


LAUNCHED = f"accelerate launch --config_file {RECIPES}/accelerate"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lab make my/lab", ["video-r1 sft lab-sft --train_manifest my/lab/sft.json"]),
        (
            "sft qwen3-vl-4b-sft-lora --train_manifest cot.json --media_root /data --output_dir o",
            [
                "video-r1 merge o o-merged",
                "video-r1 rl qwen3-vl-4b-tgrpo-lora --model_name_or_path o-merged --train_manifest MANIFEST "
                "--media_root /data",
            ],
        ),
        (
            "sft video-r1-7b-sft --output_dir runs/x",
            [
                f"{LAUNCHED}/fsdp2.yaml --num_processes 8 -m video_r1 rl video-r1-7b-tgrpo "
                "--model_name_or_path runs/x --train_manifest MANIFEST"
            ],
        ),
        (
            "rl lab-tgrpo --train_manifest lab/rl.json",
            [
                "video-r1 eval runs/lab-tgrpo lab/test.json --order ordered,shuffled",
                "video-r1 report runs/lab-tgrpo",
            ],
        ),
        (
            "eval run lab/test.json --order ordered,frozen",
            ["video-r1 studio runs/eval/run-test", "video-r1 report runs/eval/run-test"],
        ),
        ("eval a/b/c --bench mvbench --controls --out e", ["video-r1 studio e", "video-r1 report e"]),
        (
            "plan video-r1-7b-sft-lora --gpus 4 --sharding zero3 --gradient_accumulation_steps 4",
            [
                f"{LAUNCHED}/zero3.yaml --num_processes 4 --deepspeed_config_file "
                f"{RECIPES}/deepspeed/zero3.json -m video_r1 sft video-r1-7b-sft-lora "
                "--gradient_accumulation_steps 4"
            ],
        ),
        (
            "plan video-r1-7b-tgrpo-lora --load_in_4bit --engine transformers --gpu_memory 24GB "
            "--length_range 1 2 --warmup_steps 9 --keep 'blind < 0.5'",
            [
                "video-r1 rl video-r1-7b-tgrpo-lora --load_in_4bit --engine transformers --length_range 1 2 "
                "--warmup_steps 9 --keep 'blind < 0.5'"
            ],
        ),
    ],
)
def test_the_next_command_has_real_paths(
    words: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("lab/sft.json", "lab/rl.json", "lab/test.json", "run/metrics.jsonl"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text("[]")
    found = after(words)
    assert found == expected
    for line in found:  # each can be pasted
        pasted = shlex.split(line)
        start = max(pasted.index(word) for word in pasted if word in ("video-r1", "video_r1")) + 1
        read_request(*find_command(pasted[start:]))


def test_after_an_annotation(tmp_path: Path) -> None:
    manifest = tmp_path / "train.json"
    manifest.write_text("[]")
    line, _ = after(f"annotate {manifest} --teacher http://x/v1 --out {tmp_path}/cot.json")
    words = f"--train_manifest {tmp_path}/cot.json --media_root {tmp_path}"
    assert line == f"video-r1 sft qwen3-vl-4b-sft-lora {words}"


def test_other_gpus_than_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, passes, kept in ((4, 2, 8), (3, 3, 9), (16, 1, 16)):
        line, note = after(f"plan video-r1-7b-tgrpo-lora --gpus {gpus}")
        assert line.endswith(f"video-r1-7b-tgrpo-lora --gradient_accumulation_steps {passes}")
        kept_words = f"{kept} questions a step, the recipe's 8 on 1"
        assert note == f"(gradient_accumulation_steps {passes} on {gpus} GPUs: {kept_words})"
    monkeypatch.setenv("WORLD_SIZE", "2")
    (line,) = after("sft video-r1-7b-sft-4x96")
    assert "--num_processes 2 -m video_r1 rl video-r1-7b-tgrpo-4x96" in line


@pytest.mark.parametrize(
    ("number", "code", "words", "said"),
    [
        (
            signal.SIGINT,
            130,
            "eval run lab/test.json",
            "the same command continues with the remaining questions: ",
        ),
        (signal.SIGTERM, 143, "rl lab-tgrpo", "the same command resumes: video-r1 rl lab-tgrpo\n"),
    ],
)
def test_an_interrupted_command_says_how_to_go_on(
    number: int, code: int, words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stop(recipe: Recipe) -> int:
        signal.raise_signal(number)
        raise AssertionError("it went on")

    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)  # a background job's Ctrl-C is ignored
    monkeypatch.setattr("video_r1.cli.carry_out", stop)
    assert main(words.split()) == code
    signal.signal(number, before)
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.startswith("video-r1: interrupted") and captured.out == ""
