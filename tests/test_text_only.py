"""Questions without images or videos, beside others: manifests, training, evaluation and annotation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_sft
import torch
from chat_endpoint import annotate as annotate_at
from chat_endpoint import chat_endpoint
from tgrpo_trainers import first_step, make_trainer, policy_of
from tiny_models import tiny_checkpoint
from tiny_questions import read_lines, write_manifest

from video_r1.cli import main
from video_r1.data.manifests.records import load_manifest, manifest_row
from video_r1.errors import ManifestError
from video_r1.report.page import build_report

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")


def text_row(**fields: Any) -> dict[str, Any]:
    return {
        "problem_id": "words",
        "problem": "Question 7: which is larger?",
        "data_type": "text",
        "problem_type": "multiple choice",
        "options": ["A. 3", "B. 4"],
        "process": "<think>4 is larger than 3.</think>",
        "solution": "<answer>B</answer>",
        **fields,
    }


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Text, an image and two videos."""
    rows = json.loads(write_manifest(tmp_path, 2, 1).read_text())
    path = tmp_path / "mixture.json"
    rows = [{**row, "process": "<think>It moves.</think>"} for row in rows]
    path.write_text(json.dumps([*rows, text_row()]))
    return path


@pytest.mark.parametrize(
    "absent", [{}, {"path": None}, {"path": []}, {"path": "", "play": "forward", "subtitles": ""}]
)
def test_a_row_needs_no_path(tmp_path: Path, absent: dict[str, Any]) -> None:
    (sample,) = load_manifest([text_row(**absent)], tmp_path)
    assert sample.paths == sample.files == () and sample.path == ""
    written = manifest_row(sample, str(tmp_path))
    assert "path" not in written and load_manifest([written], tmp_path) == [sample]
    (other,) = load_manifest([text_row(problem_id="more")], tmp_path)
    assert sample.cluster != other.cluster  # intervals resample them apart


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"path": "clip.mp4"}, "path is given, but data_type is text"),
        ({"start": 3}, "start is given, but data_type is text"),
        ({"play": "reversed"}, "play is given, but data_type is text"),
        (
            {
                **{"problem_type": "temporal grounding", "options": None},
                "solution": '<answer>{"time": [1, 2]}</answer>',
            },
            "temporal grounding is for videos, and this is a text",
        ),
        ({"data_type": "video"}, "path is missing"),
    ],
)  # fmt: skip
def test_a_row_of_text_has_nothing_of_a_clip(tmp_path: Path, fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ManifestError, match=problem):
        load_manifest([text_row(**fields)], tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_rl_on_a_mixture(family: str, mixture: Path, tmp_path: Path) -> None:
    """Log-probs of the sampler, of a batch with clips and of a plain forward agree; the report shows all."""
    model = tiny_checkpoint(family, tmp_path / "model")
    trainer = make_trainer(
        model, str(mixture), tmp_path / "run", per_device_train_batch_size=4, temporal_rule="likelihood_gate",
        max_steps=2,
    )  # fmt: skip
    (inputs,), _ = first_step(trainer)
    batch = inputs["batch"]
    assert sorted(g.sample.data_type for g in batch.groups) == ["image", "text", "video", "video"]
    policy = trainer.logprobs(policy_of(trainer), batch)
    found = iter(policy.logprobs.detach().split(policy.lengths.tolist()))
    for group in batch.groups:
        for rollout in group.ordered:
            own = next(found)
            torch.testing.assert_close(own, rollout.logprobs, atol=1e-5, rtol=0)
            if group.sample.data_type == "text":
                assert group.rollouts.question.contrast is None and not group.prompt.media
                ids = torch.cat([group.prompt.input_ids, rollout.token_ids])[None]
                logits = policy_of(trainer)(input_ids=ids).logits[0, len(group.prompt.input_ids) - 1 : -1]
                exact = logits.log_softmax(-1).gather(1, rollout.token_ids[:, None])[:, 0]
                torch.testing.assert_close(own, exact, atol=1e-5, rtol=0)
    trainer.train()
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert any("reward/many_tokens/text" in line for line in lines)
    page = build_report(tmp_path / "run").read_text()
    assert "which is larger" in page


def test_sft_on_a_mixture(checkpoint: Path, mixture: Path, tmp_path: Path) -> None:
    samples = load_manifest(mixture)
    trainer = test_sft.make_trainer(checkpoint, samples, tmp_path / "run", samples, max_steps=3)
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_questions"] == 4 and found["eval_skipped"] == 0


def test_evaluation_annotation_and_check(
    checkpoint: Path, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--max_frames", "4", "--frame_pixels", "3136", "--image_pixels", "3136", "--max_new_tokens", "4"]
    out = ["--out", str(tmp_path / "eval"), "--order", "ordered,shuffled,blind"]
    assert main(["eval", str(checkpoint), str(mixture), *out, *small]) == 0
    lines = read_lines(tmp_path / "eval" / "predictions-4.jsonl")
    asked = [line["order"] for line in lines if line["problem_id"] == "words"]
    assert asked == ["ordered"] and len(lines) == 1 + 1 + 2 * 3
    audit = ["data", "audit", str(mixture), "--model", str(checkpoint), "--out", str(tmp_path / "a.json")]
    assert main([*audit, "--samples", "2", *small]) == 0
    assert "1 questions without media; answered" in capsys.readouterr().out
    *_, words = json.loads((tmp_path / "a.json").read_text())
    assert words["problem_id"] == "words" and words["pass_rates"].keys() == {"ordered"}
    assert main(["data", "check", str(mixture)]) == 0
    assert "3 media files or windows opened" in capsys.readouterr().out
    with chat_endpoint() as served:
        (alone := tmp_path / "words.json").write_text(json.dumps([text_row()]))
        counts = annotate_at(served.url, alone, tmp_path / "cot.json")
        assert counts.questions == {"kept": 1}
        (part,) = served.requests[0]["messages"][-1]["content"]
        assert part["type"] == "text" and "which is larger" in part["text"]
    (kept,) = load_manifest(tmp_path / "cot.json")
    assert kept.data_type == "text" and kept.process
