"""The evaluation of Video-R1's public code: its prompts written out by hand, answers that it reads in another
way than this project does, its settings, and a whole evaluation with the small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_fixtures import lab_clips, reference_row

from video_r1.cli import main
from video_r1.data.manifests.records import Sample
from video_r1.errors import ConfigError
from video_r1.evaluation import paper
from video_r1.evaluation.paper import setup_differences
from video_r1.evaluation.predictions import score_output
from video_r1.recipe import load_recipe
from video_r1.rollout.transformers import TransformersEngine
from video_r1.settings.decoding import EvalSettings
from video_r1.settings.frames import FrameBudget

THINK = (
    "Please think about this question as if you were a human pondering deeply. Engage in an internal "
    "dialogue using expressions such as 'let me think', 'wait', 'Hmm', 'oh, I see', 'let's break it down', "
    "etc, or other natural language thought expressions It's encouraged to include self-reflection or "
    "verification in the reasoning process. Provide your detailed reasoning between the <think> and </think> "
    "tags, and then give your final answer between the <answer> and </answer> tags."
)
LETTER = (
    " Please provide only the single option letter (e.g., A, B, C, D, etc.) within the "
    "<answer> </answer> tags."
)
NUMBER = " Please provide the numerical value (e.g., 42 or 3.14) within the <answer> </answer> tags."


def question(problem_type: Any, truth: str = "B", **fields: Any) -> Sample:
    options = ("A. left", "B. {right}") if problem_type == "multiple choice" else ()
    solution = f"<answer>{truth}</answer>"
    return Sample(1, "Where to?", "video", problem_type, solution, "clip.mp4", options, **fields)


def test_prompts() -> None:
    text = " Please transcribe text from the image/video clearly and provide your text answer"
    hints = {"numerical": NUMBER, "regression": NUMBER, "OCR": f"{text} within the <answer> </answer> tags."}
    hints["free-form"] = " Please provide your text answer within the <answer> </answer> tags."
    prompts = {kind: f"Where to?\n{THINK}{hint}" for kind, hint in hints.items()}
    prompts["multiple choice"] = "Where to?Options:\nA. left\nB. {right}\n\n" + THINK + LETTER
    assert {kind: paper.TEMPLATE.render(question(kind)) for kind in prompts} == prompts


@pytest.mark.parametrize(
    ("problem_type", "truth", "output", "prediction", "there", "here"),
    [
        ("multiple choice", "B", "<think>t</think>\n<answer>\nB </answer>", "B", 1, 1),
        ("multiple choice", "B", " B\n", " B\n", 1, 1),
        ("multiple choice", "B", "<answer>A</answer> or <answer>B</answer>", "A", 0, 0),
        ("multiple choice", "B", "<answer>B. right</answer>", "B. right", 0, 1),
        ("multiple choice", "B", "The answer is (B).", "The answer is (B).", 0, 1),
        ("multiple choice", "B", "<answer></answer>B", "<answer></answer>B", 0, 0),
        ("numerical", "12", "<answer>12.0</answer>", "12.0", 0, 1),
        ("numerical", "1200", "<answer>1,200</answer>", "1,200", 0, 1),
        ("numerical", "12.5", "<answer>12.504</answer>", "12.504", 1, 1),
        ("OCR", "exit", "<answer>exit</answer>", "exit", 0, 1),
        ("regression", "10", "<answer>9</answer>", "9", 0.9, 0.8),  # an error of exactly 1 - 0.9
        ("regression", "10", "<answer>8.5 m</answer>", "8.5 m", 0, 0.7),
        ("regression", "10", "<answer>nan</answer>", "nan", 0, 0),
        ("regression", "0", "<answer>0</answer>", "0", 1, 1),
        ("numerical", "−5", "<answer>-5</answer>", "-5", 1, 1),
        ("numerical", "1 200", "<answer>1200</answer>", "1200", 1, 1),
        ("numerical", "35", "<answer>35</answer>3,5", "35", 1, 1),
        ("numerical", "35", "<answer>3,5</answer>", "3,5", 0, 0),
    ],
)
def test_answers_that_are_read_there_and_here(
    problem_type: Any, truth: str, output: str, prediction: str, there: float, here: float
) -> None:
    sample = question(problem_type, truth)
    scored = score_output(sample, output, by="reference")
    assert scored.prediction == prediction
    assert scored.score == pytest.approx(there)
    ours = score_output(sample, output)
    assert ours.score == pytest.approx(here)
    assert (scored.strict_score, scored.format) == (ours.strict_score, ours.format)


def test_its_settings_are_defaults_of_a_recipe(tmp_path: Path) -> None:
    """Before those that a checkpoint carries, and behind those that are given."""
    carried = {"fps": 8.0, "max_frames": 8, "frame_pixels": 3136, "prompt_template": "{question} {options}"}
    (tmp_path / "video_r1.json").write_text(json.dumps(carried))
    given = {"model": str(tmp_path), "manifest": "m.json", "protocol": "reference", "max_new_tokens": 9}
    settings = load_recipe("eval", None, given).section(EvalSettings)
    assert (settings.temperature, settings.top_p, settings.max_new_tokens) == (0.1, 0.001, 9)
    assert (settings.fps, settings.min_frames, settings.max_frames) == (2.0, 4, 16)
    assert settings.frame_pixels == settings.image_pixels == 200_704
    assert settings.prompt_template is None
    assert load_recipe("eval", None, given | {"protocol": "none"}).section(EvalSettings).fps == 8.0
    assert setup_differences(settings) == ["max_new_tokens is 9 here and 1024 there"]
    for name, value in (("prompt_template", "mine.txt"), ("subtitles", True)):
        with pytest.raises(ConfigError, match=f"{name}.*prompt of its own"):
            load_recipe("eval", None, given | {name: value})


def test_small_frames_are_scaled_up_less() -> None:
    sized = paper.as_sized(FrameBudget(frame_pixels=256 * 784))
    assert sized == FrameBudget(frame_pixels=256 * 784, least_pixels=128 * 784)
    assert paper.as_sized(FrameBudget(frame_pixels=3136)) == FrameBudget(frame_pixels=3136)


def test_a_whole_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Of the reference's JSON, about whole clips, with its words and its scores."""
    clip = lab_clips(tmp_path / "lab")[0]
    (tmp_path / "Evaluation/MVBench").mkdir(parents=True)
    (tmp_path / "Evaluation/MVBench/a.mp4").write_bytes(clip.read_bytes())
    window = {"start": 1.0, "end": 2.0}
    rows = [
        reference_row(1, "./Evaluation/MVBench/a.mp4", **window),
        reference_row(2, "./Evaluation/MVBench/b.mp4"),
    ]
    (tmp_path / "eval_mvbench.json").write_text(json.dumps(rows))
    asked: list[Any] = []
    sample = TransformersEngine.sample

    def recorded(engine: Any, prompts: Any, *arguments: Any) -> Any:
        asked.extend(prompts)
        return sample(engine, prompts, *arguments)

    monkeypatch.setattr(TransformersEngine, "sample", recorded)
    monkeypatch.setattr(paper, "LEAST_PIXELS", 784)
    small = ["--frame_pixels", "3136", "--dtype", "float32", "--media_seconds", "0", "--device", "cpu"]
    run = ["eval", "lab-base", "--bench", "mvbench"]
    run += ["--media_root", str(tmp_path), "--out", str(tmp_path / "o")]
    run += ["--protocol", "reference", "--max_new_tokens", "4", *small]
    assert main(run) == 2
    assert "Pass --allow_missing" in capsys.readouterr().err
    assert main([*run, "--allow_missing"]) == 0
    (prompt,) = asked
    expected = "What will the person do next?Options:\nA. Wash.\nB. Close.\n\n" + THINK + LETTER
    assert prompt.messages[-1]["content"][-1] == {"type": "text", "text": expected}
    assert prompt.frames == 8  # of four seconds, not of the one of the window
    made_with = json.loads((tmp_path / "o/mvbench/evaluation.json").read_text())
    assert made_with["budget"]["least_pixels"] == 784
    (record,) = [json.loads(line) for line in (tmp_path / "o/mvbench/predictions-16.jsonl").open()]
    assert record["prediction"] == paper.read_answer(record["output"])
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    assert summary["protocol"] == "reference"
    assert summary["benchmarks"]["mvbench"]["annotation"] == "reference"
    assert summary["setup_differences"] == [
        "frame_pixels is 3136 here and 200704 there",
        "max_new_tokens is 4 here and 1024 there",
    ]
    assert "- max_new_tokens is 4 here and 1024 there" in capsys.readouterr().out
    # Answers to other prompts are not continued.
    assert main([*run, "--allow_missing", "--protocol", "none"]) == 2
    assert "other settings" in capsys.readouterr().err
