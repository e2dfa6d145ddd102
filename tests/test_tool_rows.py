"""Rows whose messages call tools: manifests, SFT and annotation."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_sft
import torch
from chat_endpoint import annotate as annotate_at
from chat_endpoint import chat_endpoint, write_questions
from test_look import FAMILIES, LOOK, Scripted, add, alone, budget_of, template, toolbox
from test_rollout_transformers import build_model
from tiny_models import moving_square, tiny_processor, write_clip
from tiny_questions import read_lines
from torch import Tensor

from video_r1.annotation import annotate
from video_r1.annotation.teachers import EngineTeacher
from video_r1.cli import main
from video_r1.data.check import check_media
from video_r1.data.decoding.decoders import read_media_at
from video_r1.data.manifests.records import Sample, load_manifest, manifest_row
from video_r1.data.prompts import Prompt, PromptBuilder, TextPrompts, response_text
from video_r1.data.reading import Reader
from video_r1.data.templates import chat_text
from video_r1.data.tools import Asked, parse_calls, worked_pieces
from video_r1.errors import ManifestError, PromptError
from video_r1.models.group_forward import group_logprobs
from video_r1.rollout.episodes import ToolEngine
from video_r1.settings.decoding import AnnotateSettings

CALL = {"type": "function", "function": {"name": "look", "arguments": {"start": 1, "end": 3}}}
SAID = {"role": "assistant", "content": "<think>When?</think>", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": ""}
OTHER = {"function": {"name": "count", "arguments": '{"what": "dogs"}'}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "clip.mp4", moving_square(64))
    return folder


def row(**fields: Any) -> dict[str, Any]:
    return {
        "problem_id": "q",
        "problem": "Which way does it move?",
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": ["A. left", "B. right"],
        "process": "<think>It goes right.</think>",
        "solution": "<answer>B</answer>",
        "path": "clip.mp4",
        "messages": [SAID, RESULT],
        **fields,
    }


def worked(folder: Path, **fields: Any) -> Sample:
    return load_manifest([row(**fields)], folder)[0]


def test_messages_with_tools_are_read_and_written_again(folder: Path) -> None:
    asked = {"role": "user", "content": "Where to?"}
    # Parquet fills in what other calls have.
    filled = {
        "function": None,
        "name": "look",
        "arguments": {"start": 1, "end": 3, "fps": None, "what": None},
    }
    twice = {**SAID, "content": None, "tool_calls": [filled, OTHER]}
    results = [RESULT, {"role": "tool", "content": "two"}]
    sample = worked(folder, messages=[asked, twice, *results, SAID, RESULT], problem=None)
    arguments = {"start": 1, "end": 3}
    assert sample.messages == (asked,) and sample.problem == "Where to?"
    assert sample.work == (
        ("", (("look", arguments), ("count", {"what": "dogs"})), ("", "two")),
        ("<think>When?</think>", (("look", arguments),), ("",)),
    )
    assert load_manifest([manifest_row(sample, str(folder))], folder) == [sample]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([SAID], "messages is"),  # no result
        ([SAID, RESULT, RESULT], "messages is"),
        ([RESULT, SAID], "messages is"),
        ([{**SAID, "tool_calls": []}, RESULT], "messages is"),
        ([{**SAID, "tool_calls": [{"name": 3}]}, RESULT], "messages is"),
        ([{**SAID, "tool_calls": [{"name": "look", "arguments": "{"}]}, RESULT], "messages is"),
        ([{**SAID, "tool_calls": ["look"]}, RESULT], "messages is"),
        ([{**SAID, "tool_calls": [{"name": "x", "arguments": "[" * 99999}]}, RESULT], "messages is"),
        ([{**SAID, "tool_calls": [{"name": "x", "arguments": '{"a": "\\ud800"}'}]}, RESULT], "messages is"),
        ([{**SAID, "tool_calls": [{"name": "x", "arguments": '{"a": 1e999}'}]}, RESULT], "messages is"),
        ([{**SAID, "tool_calls": [{"function": "look"}]}, RESULT], "messages is"),
        ([{**SAID, "tool_calls": [{"name": "x", "arguments": {"a": Path()}}]}, RESULT], "messages is"),
        (
            [{**SAID, "tool_calls": [{"name": "look", "arguments": {"start": 3}}]}, RESULT],
            "look from 3 to None",
        ),
        (
            [{**SAID, "tool_calls": [{"name": "look", "arguments": {"start": 3, "end": 1}}]}, RESULT],
            "from 3 to 1",
        ),
        ([SAID, {"role": ["tool"], "content": ""}], "messages is"),
        ([SAID, {"role": "tool", "content": 3}], "messages is"),
        ([SAID, RESULT, {"role": "user", "content": "And?"}], "messages is"),
        ([SAID, RESULT, {"role": "assistant", "content": "B"}], "messages is"),
    ],
)
def test_messages_that_are_no_chat(folder: Path, messages: list[Any], problem: str) -> None:
    with pytest.raises(ManifestError, match=problem):
        worked(folder, messages=messages)


def test_a_question_is_needed(folder: Path) -> None:
    with pytest.raises(ManifestError, match="problem is missing"):
        worked(folder, problem=None)


def example(family: str, folder: Path, processor: Any = None, **fields: Any) -> tuple[Prompt, list[Any], Any]:
    builder = PromptBuilder(processor or tiny_processor(family))
    builder.toolbox = toolbox(family)
    sample = worked(folder, **fields)
    media = read_media_at(sample, budget_of(family), (8,))
    prompt, answer = builder.build_with_response(sample, media, response_text(sample))
    return prompt, [*worked_pieces(builder, sample, prompt), answer], builder


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_learns_the_calls_and_the_answer(family: str, folder: Path) -> None:
    """The log-probs of the assistant's tokens are those of a plain forward of the whole conversation."""
    processor = tiny_processor(family)
    processor.chat_template = template("qwen3_5_think" if family == "qwen3_5" else family)
    prompt, pieces, builder = example(family, folder, processor)
    own = [piece for piece in pieces if isinstance(piece, Tensor)]
    assert [isinstance(piece, Tensor) for piece in pieces] == [True, False, True]
    said = builder.tokenizer.decode(own[0])
    assert said.startswith("<think>When?</think>") and said.endswith("</tool_call><|im_end|>")
    assert parse_calls(said) == [Asked("look", {"start": 1, "end": 3})]
    assert pieces[1].media[0].timestamps[0] == 1.0  # frames of the stretch
    model = build_model(family)
    whole: Any = SimpleNamespace(pieces=lambda contrast: pieces)
    result = group_logprobs(model, [prompt], [[torch.cat(own)]], pieces=[[pieces]])
    torch.testing.assert_close(result.logprobs, alone(model, prompt, whole), atol=1e-5, rtol=0)


def test_a_row_is_written_as_the_template_writes_the_conversation(folder: Path) -> None:
    processor = tiny_processor("qwen3_vl")
    processor.chat_template = template("qwen3_vl")
    prompt, pieces, builder = example("qwen3_vl", folder, processor)
    ids = torch.cat([p.input_ids if isinstance(p, Prompt) else p for p in (prompt, *pieces)])
    visual = r"(<\|vision_start\|>|<[\d.]+ seconds>|<\|video_pad\|>|<\|vision_end\|>)+"
    text = re.sub(visual, "[video]", builder.tokenizer.decode(ids))
    seen = [{"type": "text", "text": "1 to 3 s:"}, {"type": "video"}]
    asked = [{"type": "video"}, {"type": "text", "text": builder.question(worked(folder))}]
    answer = "<think>It goes right.</think>\n<answer>B</answer>"
    chat = [{"role": "user", "content": asked}, SAID, {"role": "tool", "content": seen}]
    rendered = chat_text(
        processor, [*chat, {"role": "assistant", "content": answer}], tools=builder.toolbox.schemas
    )
    assert text == re.sub(visual, "[video]", rendered).rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "settings", "reason"),
    [
        ({"start": 70, "end": 71}, {}, "Error: look: 70 to 71 s is no part of the clip, which has 8.0 s"),
        (
            {"start": 1, "end": 3},
            {"max_tool_tokens": 10},
            r"call tools that return \d+ tokens; max_tool_tokens",
        ),
        ({"start": 1, "end": 3}, None, "its messages call tools; set --tools look"),
        ({"start": 1, "end": 3}, {"tools": None, "functions": [add]}, "call look, which is not offered"),
        ({"start": 1, "end": 3}, {"max_looks": 1}, "call tools 2 times; max_looks is 1"),
    ],
)
def test_a_row_that_cannot_be_shown(folder: Path, arguments: Any, settings: Any, reason: str) -> None:
    said = deepcopy(SAID)
    said["tool_calls"][0]["function"]["arguments"] = arguments
    builder = PromptBuilder(tiny_processor("qwen2_5_vl"))
    sample = worked(folder, messages=[said, RESULT] * (2 if settings and "max_looks" in settings else 1))
    prompt = builder.build(sample, read_media_at(sample, budget_of("qwen2_5_vl"), (8,)))
    builder.toolbox = None if settings is None else toolbox(**settings)
    with pytest.raises(PromptError, match=reason):
        worked_pieces(builder, sample, prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_may_hold_a_call_alone(family: str, folder: Path) -> None:
    processor = tiny_processor(family)
    processor.chat_template = template("qwen3_5_think" if family == "qwen3_5" else family)
    _, (own, *_), builder = example(family, folder, processor, messages=[{**SAID, "content": ""}, RESULT])
    assert builder.tokenizer.decode(own).startswith("<tool_call>\n")


def test_a_check_finds_looks_behind_the_end(folder: Path) -> None:
    late = {**SAID, "tool_calls": [{"name": "look", "arguments": {"start": 50, "end": 60}}]}
    samples = load_manifest([row(), row(problem_id="late", messages=[late, RESULT])], folder)
    result = check_media(samples, budget_of("qwen2_5_vl"))
    assert result.usable == samples[:1]
    assert [problem.text for problem in result.problems] == ["its messages look at 50 s; the clip has 8.0 s"]


def test_tools_are_explained_in_the_own_system_message(folder: Path) -> None:
    """Templates of many families refuse two system messages."""
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where to?"}]
    sample = worked(folder, messages=own)
    for builder in (TextPrompts(), PromptBuilder(tiny_processor("qwen2_5_vl"))):
        builder.toolbox = toolbox()
        prompt = builder.build(sample, read_media_at(sample, budget_of("qwen2_5_vl"), (8,)))
        if builder.processor is None:
            first, *others = prompt.messages
            texts = [part["text"] for part in first["content"]]
            assert texts[0] == "Be brief." and "<tool_call>" in texts[-1] and others[0]["role"] == "user"
        else:
            said = builder.tokenizer.decode(prompt.input_ids)
            assert said.count("<|im_start|>system") == 1 and "Be brief.\n\nYou can call" in said


def test_an_sft_run_with_tools(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    late = {**SAID, "tool_calls": [{"name": "look", "arguments": {"start": 50, "end": 60}}]}
    rows = [row(), row(problem_id="late", messages=[late, RESULT]), row(problem_id="plain", messages=[])]
    samples = load_manifest(rows, folder)
    trainer = test_sft.make_trainer(
        checkpoint, samples, tmp_path, samples[::2], tools="look", overview_frames=[2, 4], look_frames=4,
        max_steps=3, max_prompt_length=2000,
    )  # fmt: skip
    loaded = trainer.load(samples[0])
    assert loaded.prompt.frames in (2, 4) and len(loaded.pieces) == 3
    trainer.train()
    (line,) = read_lines(tmp_path / "quarantine.jsonl")
    assert line["problem_id"] == "late" and "no part of the clip" in line["reason"]
    assert trainer.evaluate()["eval_questions"] == 2


def test_a_teacher_with_tools(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right and used the tool is kept, with its calls; SFT reads it."""
    builder = PromptBuilder(tiny_processor("qwen2_5_vl"))
    builder.toolbox = toolbox()
    answer = "<think>It goes to the right side.</think><answer>B</answer>"
    late = LOOK.replace('"start": 1, "end": 3', '"start": 11, "end": 13')
    texts = [f"<think>When?</think>{LOOK}", answer, answer, late, answer]
    settings = AnnotateSettings(
        manifest=str(tmp_path / "train.json"), teacher="t", out=str(tmp_path / "cot.json"),
        media_root=str(folder), tools="look", length_range=[3, 100], batch_size=1,
    )  # fmt: skip
    rows = [row(problem_id=name, messages=None, process=None) for name in ("used", "unused", "failed")]
    Path(str(settings.manifest)).write_text(json.dumps(rows))
    engine = ToolEngine(Scripted(builder, *texts), builder)
    teacher = EngineTeacher(engine, builder, Reader(budget_of("qwen2_5_vl")), settings)
    monkeypatch.setattr(annotate, "_local_teacher", lambda settings: teacher)
    assert annotate.run_annotate(settings).questions == {"kept": 1, "tool": 2}
    (sample,) = load_manifest(settings.out or "", folder)
    assert sample.problem_id == "used" and sample.process == "<think>It goes to the right side.</think>"
    assert sample.work == (("<think>When?</think>", (("look", {"start": 1, "end": 3}),), ("1 to 3 s:",)),)
    rejected = read_lines(tmp_path / "cot.rejected.jsonl")
    details = {line["problem_id"]: line["rationales"][0]["detail"] for line in rejected}
    assert details == {"unused": "it calls no tool", "failed": "1 of its calls got no answer"}


def test_a_chat_endpoint_with_tools(tmp_path: Path) -> None:
    """Calls and frames are messages; an annotation keeps what used the tool, an evaluation counts calls."""
    manifest = write_questions(tmp_path, 2, clips=2)
    with chat_endpoint(owner="vllm") as served:
        served.script[0] = [LOOK.replace("3", "2"), "<tool_call>?</tool_call>"]
        served.script[1] = [LOOK.replace("3", "2")]
        counts = annotate_at(served.url, manifest, tmp_path / "cot.json", tools="look", look_frames=4)
        assert counts.questions == {"tool": 1, "kept": 1}
        asked = [request["messages"] for request in served.requests if "Question 1:" in json.dumps(request)]
        assert [message["role"] for message in asked[1]] == ["system", "user", "assistant", "user"]
        assert '"name": "look"' in asked[0][0]["content"]
        parts = asked[1][-1]["content"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        assert texts[:3] == [
            "<tool_response>",
            "1 to 2 s:",
            "Video 2 of 2: 4 frames of a video of 1.0 seconds, in order:",
        ]
        assert texts[3:] == ["1.0 s", "1.2 s", "1.5 s", "1.8 s", "</tool_response>"]
        assert sum(part["type"] == "image_url" for part in parts) == 4
        (sample,) = load_manifest(tmp_path / "cot.json", tmp_path)
        assert sample.problem_id == "q1" and sample.work[0].calls == (("look", {"start": 1, "end": 2}),)
        # A refused question, in its first or a later turn, is not answered; the others are.
        for number, refused in enumerate(([400], [LOOK.replace("3", "2"), 413])):
            served.script[0], served.script[1] = refused, [LOOK.replace("3", "2")]
            counts = annotate_at(
                served.url.removesuffix("/v1"), manifest, tmp_path / f"refused{number}.json", tools="look",
                look_frames=4, frames_as="images", request_fields={"top_k": 7},
            )  # fmt: skip
            assert counts.questions == {"endpoint": 1, "kept": 1}
            assert served.requests[-1]["top_k"] == 7
        served.script[0], served.script[1] = [LOOK.replace("3", "2")], []
        words = [
            "--engine",
            served.url,
            "--tools",
            "look",
            "--out",
            str(tmp_path / "eval"),
            "--max_frames",
            "4",
        ]
        assert main(["eval", "teacher", str(manifest), *words, "--order", "ordered,elsewhere"]) == 0
    lines = read_lines(tmp_path / "eval" / "predictions-4.jsonl")
    assert sum(line.get("calls", 0) for line in lines) == 1 and all(line["score"] == 1.0 for line in lines)
