"""What commands end with: the next command, with paths that are there, which can be pasted."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from video_r1.cli import find_command, main, read_request
from video_r1.next_steps import again, next_steps
from video_r1.processes import Interrupted
from video_r1.recipe import Recipe
from video_r1.recipe_files import RECIPES
from video_r1.rollout.vllm.serve import while_served
from video_r1.settings.vllm import ServeSettings


def after(words: str) -> list[str]:
    name, rest = find_command(shlex.split(words))
    return next_steps(read_request(name, rest))


def commands(lines: list[str]) -> list[str]:
    return [
        line.strip().removeprefix("next: ") for line in lines if "video-r1 " in line or " video_r1 " in line
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lab make my/lab", ["video-r1 sft lab-sft --train_manifest my/lab/sft.json"]),
        (
            "sft lab-sft",
            ["video-r1 rl lab-tgrpo --model_name_or_path runs/lab-sft --train_manifest MANIFEST"],
        ),
        (
            "sft lab-sft --train_manifest lab/sft.json --output_dir 'my runs/a'",
            ["video-r1 rl lab-tgrpo --model_name_or_path 'my runs/a' --train_manifest lab/rl.json"],
        ),
        (
            "sft video-r1-7b-sft-lora",
            [
                "video-r1 merge runs/video-r1-7b-sft-lora runs/video-r1-7b-sft-lora-merged",
                "video-r1 rl video-r1-7b-tgrpo-lora --model_name_or_path runs/video-r1-7b-sft-lora-merged "
                "--train_manifest MANIFEST",
            ],
        ),
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
                f"accelerate launch --config_file {RECIPES}/accelerate/fsdp2.yaml --num_processes 8 "
                "-m video_r1 rl video-r1-7b-tgrpo --model_name_or_path runs/x --train_manifest MANIFEST"
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
            "rl qwen3-vl-4b-tgrpo-lora --output_dir o",
            [
                "video-r1 merge o o-merged",
                "video-r1 eval o-merged --bench mvbench,tempcompass --order ordered,shuffled",
                "video-r1 report o",
            ],
        ),
        ("eval run lab/test.json", ["video-r1 report run"]),
        ("eval Qwen/Qwen2.5-VL-3B-Instruct lab/test.json", []),
        ("plan lab-tgrpo", ["video-r1 rl lab-tgrpo"]),
        (
            "plan video-r1-7b-sft-lora --gpus 4 --sharding zero3",
            [
                f"accelerate launch --config_file {RECIPES}/accelerate/zero3.yaml --num_processes 4 "
                f"--deepspeed_config_file {RECIPES}/deepspeed/zero3.json "
                "-m video_r1 sft video-r1-7b-sft-lora --gradient_accumulation_steps 4"
            ],
        ),
        (
            "plan video-r1-7b-tgrpo-lora --load_in_4bit --use_vllm false --gpu_memory 24GB "
            "--length_range 1 2 --run_name='--x' --warmup_steps 9 --keep 'blind < 0.5'",
            [
                "video-r1 rl video-r1-7b-tgrpo-lora --load_in_4bit --use_vllm false --length_range 1 2 "
                "--run_name=--x --warmup_steps 9 --keep 'blind < 0.5'"
            ],
        ),
        (
            "plan video-r1-7b-sft-lora --max_response_length 99 --num_generations 4",
            ["video-r1 sft video-r1-7b-sft-lora --max_response_length 99"],
        ),
        ("data check lab/test.json", []),
    ],
)
def test_the_next_command_has_real_paths(
    words: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("lab/sft.json", "lab/rl.json", "lab/test.json", "run/metrics.jsonl"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text("[]")
    found = commands(after(words))
    assert found == expected
    for line in found:  # each can be pasted
        pasted = shlex.split(line)
        name, rest = find_command(
            pasted[max(pasted.index(w) for w in pasted if w in ("video-r1", "video_r1")) + 1 :]
        )
        read_request(name, rest)


def test_after_an_annotation_and_a_merge(tmp_path: Path) -> None:
    manifest = tmp_path / "train.json"
    manifest.write_text("[]")
    lines = after(f"annotate {manifest} --teacher http://x/v1 --out {tmp_path}/cot.json")
    words = f"video-r1 sft qwen3-vl-4b-sft-lora --train_manifest {tmp_path}/cot.json --media_root {tmp_path}"
    assert commands(lines)[0] == words
    lines = after("merge runs/lora runs/merged")
    assert "video-r1 rl RECIPE --model_name_or_path runs/merged" in lines[0]
    assert "video-r1 eval runs/merged" in lines[1]


def test_a_run_of_several_processes_goes_on_with_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (line,) = commands(after("sft video-r1-7b-sft-4x96"))
    assert "--num_processes 2 -m video_r1 rl video-r1-7b-tgrpo-4x96" in line


@pytest.mark.parametrize(
    ("words", "option", "said"),
    [
        ("video-r1-7b-tgrpo-lora", "", ""),
        ("video-r1-7b-tgrpo-lora --gpus 4", "--gradient_accumulation_steps 2", ""),
        (
            "video-r1-7b-tgrpo-lora --gpus 3",
            "--gradient_accumulation_steps 2",
            "a step has 6 questions with 3 processes, 8 on the machine that the recipe is for",
        ),
        (
            "video-r1-7b-tgrpo-lora --gpus 16",
            "--gradient_accumulation_steps 1",
            "a step has 16 questions with 16 processes, 8 on the machine that the recipe is for",
        ),
        (
            "lab-tgrpo --gpus 4 --gradient_accumulation_steps 5",
            "--gradient_accumulation_steps 5",
            "",
        ),
        (
            "video-r1-7b-tgrpo --gpus 4",
            "",
            "a step has 4 questions with 4 processes, 8 on the machine that the recipe is for; "
            "--gradient_accumulation_steps 2 keeps them, if it fits",
        ),
        ("mine.yaml --gpus 2", "--gradient_accumulation_steps 1", ""),
    ],
)
def test_a_step_keeps_its_questions_on_other_gpus(
    words: str, option: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("made_for: {command: sft, gpus: 1}\n")  # SFT's two passes by default
    line, *more = after(f"plan {words}")
    found = " ".join(line.partition(" --gradient_accumulation_steps ")[1:]).split()
    assert (" ".join(found), more) == (option, [said] * bool(said))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_server_says_what_to_do_with_it(on_gpu: bool) -> None:
    """Training loads onto the GPUs that the server has not taken."""
    settings = ServeSettings(model="Qwen/Qwen2.5-VL-7B-Instruct", host="0.0.0.0", port=8001)
    found = [shlex.split(line) for line in while_served(settings, on_gpu)[1:] if "(" not in line]
    start = ["CUDA_VISIBLE_DEVICES=FREE", "accelerate", "launch"] if on_gpu else ["video-r1", "rl"]
    assert found[0][: len(start)] == start
    if on_gpu:
        file, count = (found[0][found[0].index(word) + 1] for word in ("--config_file", "--num_processes"))
        assert Path(file).name == "fsdp2.yaml" and Path(file).is_file() and count == "COUNT"
        found[0] = found[0][found[0].index("video_r1") :]
    assert found[0][1:3] == ["rl", "video-r1-7b-tgrpo"]
    for words in found:
        assert "http://127.0.0.1:8001" in words
        name, rest = find_command(words[1:])
        read_request(name, rest)


@pytest.mark.parametrize(
    ("number", "code", "words", "said"),
    [
        (
            signal.SIGINT,
            130,
            "eval run lab/test.json",
            "the same command goes on with the questions that are left: ",
        ),
        (signal.SIGTERM, 143, "rl lab-tgrpo", "the same command goes on from there: video-r1 rl lab-tgrpo\n"),
        (signal.SIGTERM, 143, "report run", "video-r1: interrupted\n"),
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


def test_what_is_saved_comes_first() -> None:
    assert again("rl", ["rl", "a b.yaml"], "x is the last checkpoint") == (
        "interrupted; x is the last checkpoint; the same command goes on from there: video-r1 rl 'a b.yaml'"
    )
    assert again("lab make", ["lab", "make"], "") == "interrupted"
    assert str(Interrupted()) == ""


def test_a_command_ends_with_what_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("video_r1.lab.clips.write_lab", lambda settings: None)
    words = ["lab", "make", str(tmp_path / "lab")]
    assert main(words) == 0
    assert capsys.readouterr().out == f"next: video-r1 sft lab-sft --train_manifest {tmp_path}/lab/sft.json\n"
    monkeypatch.setenv("RANK", "1")
    assert main(words) == 0
    assert capsys.readouterr().out == ""
