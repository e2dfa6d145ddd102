"""Tools: calls, tool turns, and episodes of several turns whose log-probs and gradients are exact."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest
import torch
from PIL import Image
from scripted_engine import Forced, ScriptedEngine
from test_group_forward import assert_same_gradients, gradients
from test_prompts import make_sample
from test_rollout_transformers import build_model
from tgrpo_trainers import first_step, make_trainer, policy_of, weights
from tiny_models import moving_square, tiny_model, tiny_processor, write_clip
from torch import Tensor

from video_r1.cli import main
from video_r1.data import tools
from video_r1.data.decoding.decoders import read_media_at
from video_r1.data.decoding.media import Media
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.reading import Reader
from video_r1.data.rollouts import Rollout, ToolCall, ToolTurn
from video_r1.data.tools import Asked, Toolbox, elsewhere, is_control, parse_calls
from video_r1.errors import ConfigError
from video_r1.evaluation.predictions import _Evaluation, evaluate
from video_r1.evaluation.summary import summary_table
from video_r1.evaluation.validation import temporal_accuracy
from video_r1.lab.model import base_folder
from video_r1.models.group_forward import all_parts, encode_groups, group_logprobs
from video_r1.plan.trace import TURN_TOKENS, longest_row
from video_r1.report.run_data import find_run_folders, group_of
from video_r1.rollout import engine_factory
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.rollout.episodes import NOTICE, NOTICE_TOKENS, Episode, ToolEngine
from video_r1.rollout.transformers import TransformersEngine
from video_r1.rollout.vllm.engine import VLLMEngine
from video_r1.settings.decoding import EvalSettings
from video_r1.settings.frames import FrameBudget
from video_r1.settings.shared import PromptSettings
from video_r1.settings.tools import LookSettings, ToolSettings
from video_r1.settings.training import TGRPOSettings
from video_r1.training.recording import record_group

INVALID = ("", {}, "the call is not valid JSON")
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
SIDES = {"qwen2_5_vl": 28, "qwen3_vl": 32, "qwen3_5": 32}
LOOK = '<tool_call>\n{"name": "look", "arguments": {"start": 1, "end": 3}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("no call", []),
        (f"I look.{LOOK}{LOOK}", [("look", {"start": 1, "end": 3}, "")] * 2),
        (
            "<tool_call>\n<function=look>\n<parameter=start>\n1.5\n</parameter>\n<parameter=end>\n3\n"
            "</parameter>\n</function>\n</tool_call>",
            [("look", {"start": 1.5, "end": 3}, "")],
        ),
        ('<tool_call>{"name": "look"', [("", {}, "the call has no </tool_call>")]),
        ("<tool_call>look(1, 2)</tool_call>", [("", {}, "the call is not valid JSON")]),
        ("<tool_call>" + "[" * 3999 + "</tool_call>", [("", {}, "the call is not valid JSON")]),
        ('<tool_call>{"name": "look", "arguments": {"start": 1e999}}</tool_call>', [INVALID]),
        ('<tool_call>{"name": "\\ud800"}</tool_call>', [INVALID]),
        ('<tool_call>{"name": "look", "arguments": {"start": NaN}}</tool_call>', [INVALID]),
        ("<tool_call>[1]</tool_call>", [("", {}, 'the call is not {"name": ..., "arguments": {...}}')]),
        (
            '<tool_call>{"name": "look", "arguments": 3}</tool_call>',
            [("look", {}, "arguments is not an object")],
        ),
        ("<tool_call>" + "a" * 5000 + "</tool_call>", [("", {}, "the call is longer than 4000 characters")]),
    ],
)
def test_calls_are_parsed(text: str, calls: list[Any]) -> None:
    assert [tuple(call) for call in parse_calls(text)] == calls


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seconds, eight frames a second."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", moving_square(64))


def budget_of(family: str) -> FrameBudget:
    side = SIDES[family]
    return FrameBudget(
        fps=1.0, max_frames=8, frame_pixels=4 * side**2, image_pixels=4 * side**2, size_multiple=side
    )


def question(family: str, clip: Path, builder: PromptBuilder, **fields: Any) -> Prompt:
    sample = make_sample(path=str(clip), **fields)
    return builder.build(sample, read_media_at(sample, budget_of(family), (8,)))


def add(a: int, b: int) -> str:
    """
    Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    if a < 0:
        raise RuntimeError("negative\nnumbers")
    while a > 1000:
        time.sleep(0.01)
    return str(a + b)


def picture(name: str) -> Any:
    """
    Show a picture.

    Args:
        name: Its name.
    """
    return ["a picture:", Image.new("RGB", (70, 50))]


def toolbox(family: str = "qwen2_5_vl", functions: Sequence[Any] = (), **settings: Any) -> Toolbox:
    return Toolbox(ToolSettings(**{"tools": "look", **settings}), budget_of(family), functions)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Asked("", {}, "the call is not valid JSON"), "Error: the call is not valid JSON"),
        (Asked("dance", {}), "Error: there is no tool 'dance'; there is look, add, picture"),
        (Asked("look", {"start": 1}), "Error: look: missing a required argument: 'end'"),
        (Asked("look", {"start": "1", "end": 2}), "Error: look: start, end and fps are numbers"),
        (Asked("look", {"start": 10**400, "end": 2}), "Error: look: start, end and fps are numbers"),
        (Asked("look", {"start": True, "end": 2}), "Error: look: start, end and fps are numbers"),
        (
            Asked("look", {"start": 9, "end": 12}),
            "Error: look: 9 to 12 s is no part of the clip, which has 8.0 s",
        ),
        (
            Asked("look", {"start": 3, "end": 3}),
            "Error: look: 3 to 3 s is no part of the clip, which has 8.0 s",
        ),
        (
            Asked("look", {"start": 0, "end": 8, "fps": 4}),
            "Error: look: at most 16 frames at once; lower fps, or leave it out",
        ),
        (Asked("look", {"start": 1, "end": 1.1}), "Error: look: this part of the clip has 1 frame"),
        (Asked("add", {"a": -1, "b": 2}), "Error: negative numbers"),
        (Asked("add", {"a": 2000, "b": 2}), "Error: it took longer than 0.1 s"),
        (Asked("add", {"a": 1, "b": 2}), "3"),
    ],
)
def test_a_call_gets_an_answer_or_the_reason(
    clip: Path, asked: Asked, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "TOOL_SECONDS", 0.1)
    prompt = question("qwen2_5_vl", clip, PromptBuilder(tiny_processor("qwen2_5_vl")))
    call = toolbox(functions=[add, picture]).call(asked, prompt)
    assert len(call.result) == 1 and str(call.result[0]).startswith(said)
    assert call.failed == said.startswith("Error")


def test_a_stretch_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """Errors of one clip do not end the run: here it has no frames between 2 and 6 s."""
    path = tmp_path / "gap.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.height = stream.width = 64
        stream.options = {"g": "8", "bf": "0"}
        for number, picture in enumerate(moving_square(32)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number + (32 if number >= 16 else 0)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    prompt = question("qwen2_5_vl", path, PromptBuilder(tiny_processor("qwen2_5_vl")))
    box = toolbox()
    seen = {start: box.call(Asked("look", {"start": start, "end": start + 2}), prompt) for start in (0, 3, 6)}
    assert [call.failed for call in seen.values()] == [False, True, False]
    assert str(seen[3].result[0]).startswith("Error: look: this part of the clip ")


@pytest.mark.parametrize(
    ("window", "asked", "times"),
    [
        ({}, {"start": 2, "end": 4}, [2.0, 3.875]),
        ({}, {"start": 7, "end": 60}, [7.0, 7.875]),  # to the end
        ({"start": 4.0, "end": 8.0}, {"start": 2, "end": 3}, [2.0, 2.875]),
        ({"play": "reversed"}, {"start": 2, "end": 4}, [2.0, 3.875]),
    ],
)
def test_a_look_shows_the_stretch_with_the_times_of_the_clip(
    clip: Path, window: dict[str, Any], asked: dict[str, Any], times: list[float]
) -> None:
    prompt = question("qwen2_5_vl", clip, PromptBuilder(tiny_processor("qwen2_5_vl")), **window)
    call = toolbox(look_fps=8.0).call(Asked("look", asked), prompt)
    text, shown = call.result
    assert isinstance(shown, Media) and text == f"{asked['start']:g} to {min(asked['end'], 8):g} s:"
    found = [float(shown.timestamps[0]), float(shown.timestamps[-1])]
    assert found == pytest.approx(times, abs=0.13)
    # Which frame of the clip is it? The square's left edge tells.
    first = 8 * (times[0] + window.get("start", 0.0))
    first = 63 - first if "play" in window else first
    whole = read_media_at(
        make_sample(path=str(clip)), FrameBudget(fps=8, max_frames=64, frame_pixels=56 * 56), (64,)
    )
    differences = (whole[0].frames.float() - shown.frames[0].float()).abs().mean((1, 2, 3))
    assert abs(int(differences.argmin()) - first) <= 1


def test_a_stretch_that_several_ask_for_is_decoded_once(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    monkeypatch.setattr(tools, "read_media_at", lambda *given: read.append(given[0]) or read_media_at(*given))
    box, prompt = toolbox(), question("qwen2_5_vl", clip, PromptBuilder(tiny_processor("qwen2_5_vl")))
    for end in (2, 3, 2):
        assert not box.call(Asked("look", {"start": 1, "end": end}), prompt).failed
    assert len(read) == 2
    box.forget()
    box.call(Asked("look", {"start": 1, "end": 2}), prompt)
    assert len(read) == 3


# ---- Chat templates


@cache
def template(name: str) -> str:
    """A family's published template, which TRL carries."""
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


@pytest.mark.parametrize(
    ("family", "name", "tool", "turn"),
    [
        ("qwen2_5_vl", "qwen2_5_vl", "# none of its own", "<|im_start|>user\n<tool_response>"),
        ("qwen3_vl", "qwen3_vl", "# Tools", "<|im_start|>user\n<tool_response>\n"),
        ("qwen3_5", "qwen3_5_think", "# Tools", "<|im_start|>user\n<tool_response>\n"),
        ("qwen3_5", "qwen3_5_nothink", "# Tools", "<|im_start|>user\n<tool_response>\n"),
    ],
)
def test_tools_and_their_answers_are_written_as_the_family_does(
    clip: Path, family: str, name: str, tool: str, turn: str
) -> None:
    processor = tiny_processor(family)
    processor.chat_template = template(name)
    builder, box = PromptBuilder(processor), toolbox(family)
    builder.toolbox = box
    prompt = question(family, clip, builder)
    asked = processor.tokenizer.decode(prompt.input_ids)
    assert '"name": "look"' in asked and (tool in asked or family == "qwen2_5_vl")
    result = box.call(Asked("look", {"start": 1, "end": 3}), prompt).result
    answer = builder.build_turn([result, ["nothing"]], prompt)
    text = processor.tokenizer.decode(answer.input_ids)
    assert text.startswith("\n" + turn) and "1 to 3 s:" in text and "nothing" in text
    assert text.count("<tool_response>") == text.count("</tool_response>") == 2
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    shown = result[1]
    assert isinstance(shown, Media)
    visuals = len(shown.frames) // 2
    assert text.count("<|video_pad|>") == 4 * visuals
    if family != "qwen2_5_vl":  # the clip's own times, the mean of each pair
        pairs = shown.timestamps.view(-1, 2).mean(1)
        assert all(f"<{float(second):.1f} seconds>" in text for second in pairs)
    # The template writes the same behind a whole conversation.
    call = {"type": "function", "function": {"name": "look", "arguments": {"start": 1, "end": 3}}}
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "1 to 3 s:"}, {"type": "video"}]},
        {"role": "tool", "content": [{"type": "text", "text": "nothing"}]},
    ]
    if family != "qwen2_5_vl":
        rendered = processor.apply_chat_template(chat, tokenize=False)
        block = text[: text.index("<|im_start|>assistant")]
        plain = block[: block.index("1 to 3 s:")]
        assert plain in rendered and rendered.endswith(block[block.rindex("<|vision_end|>") :])


# ---- Episodes


def sampled(
    family: str, clip: Path, model: Any, engine: RolloutEngine | None = None, processor: Any = None
) -> Any:
    """Prompts of two questions about a clip (one shuffled), and their episodes of up to three turns."""
    builder = PromptBuilder(processor or tiny_processor(family))
    builder.toolbox = toolbox(family)
    tool_engine = Forced(engine or TransformersEngine(model, builder.processor), builder, "reversed")
    sample = make_sample(path=str(clip))
    media = read_media_at(sample, budget_of(family), (8,))
    permutation = torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])
    prompts = [builder.build(sample, media), builder.build(sample, media, permutation)]
    for seed in range(5, 50):  # transformers refuses a sequence in which the policy wrote a placeholder
        groups = tool_engine.sample(prompts, SamplingSettings(max_tokens=6, seed=seed), [4, 2])
        written = torch.cat([rollout.token_ids for group in groups for rollout in group])
        if not builder.visual_tokens(written):
            break
    return prompts, groups


def alone(model: Any, prompt: Prompt, rollout: Rollout, contrast: bool = False) -> Tensor:
    """Log-probs of an episode's own tokens by transformers' forward of the whole sequence."""
    pieces = [prompt, *rollout.pieces(contrast)]
    given = [piece for piece in pieces if isinstance(piece, Prompt)]
    ids = torch.cat([p.input_ids if isinstance(p, Prompt) else p for p in pieces])
    kinds = [
        p.features["mm_token_type_ids"].view(-1) if isinstance(p, Prompt) else torch.zeros_like(p)
        for p in pieces
    ]
    own = torch.cat(
        [torch.full((len(k),), not isinstance(p, Prompt)) for p, k in zip(pieces, kinds, strict=True)]
    )
    names = [name for name in given[0].features if name != "mm_token_type_ids"]
    features = {name: torch.cat([part.features[name] for part in given]) for name in names}
    logits = model(input_ids=ids[None], mm_token_type_ids=torch.cat(kinds)[None], **features).logits[0]
    logprobs = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return logprobs[own[1:]]


@pytest.mark.parametrize("family", FAMILIES)
def test_episodes_are_scored_as_they_were_sampled(family: str, clip: Path) -> None:
    model = build_model(family)
    prompts, groups = sampled(family, clip, model)
    assert [[len(rollout.turns) for rollout in group] for group in groups] == [[0, 1, 2, 0], [0, 1]]
    assert {rollout.turns[-1].after for group in groups for rollout in group if rollout.turns} != {0}
    pieces = [[rollout.pieces() for rollout in group] for group in groups]
    completions = [[rollout.token_ids for rollout in group] for group in groups]
    result = group_logprobs(model, prompts, completions, pieces=pieces)
    own = torch.cat([rollout.logprobs for group in groups for rollout in group])
    torch.testing.assert_close(result.logprobs, own, atol=1e-5, rtol=0)
    pairs = [(p, rollout) for p, group in zip(prompts, groups, strict=True) for rollout in group]
    reference = torch.cat([alone(model, prompt, rollout) for prompt, rollout in pairs])
    torch.testing.assert_close(result.logprobs, reference, atol=1e-5, rtol=0)
    weights = torch.randn(len(reference))
    expected = gradients(model, reference, weights)
    within = 2e-5 if family == "qwen3_5" else 1e-5
    assert_same_gradients(gradients(model, result.logprobs, weights), expected, within)
    vision = [part for group in encode_groups(model, prompts, pieces) for part in group]
    assert len(vision) == len(all_parts(prompts, pieces)) == 2 + 4
    shared = group_logprobs(model, prompts, completions, vision_features=vision, pieces=pieces).logprobs
    torch.testing.assert_close(shared, result.logprobs, atol=1e-5, rtol=0)


def test_an_answer_does_not_depend_on_the_others(clip: Path) -> None:
    model = build_model("qwen2_5_vl")
    _, groups = sampled("qwen2_5_vl", clip, model)
    small = TransformersEngine(model, tiny_processor("qwen2_5_vl"), max_sequences=1)
    _, again = sampled("qwen2_5_vl", clip, model, small)
    for first, second in zip((r for g in groups for r in g), (r for g in again for r in g), strict=True):
        assert first.token_ids.tolist() == second.token_ids.tolist() and first.text == second.text


def test_looks_of_a_shuffled_clip_are_shuffled_and_scored_ones_have_a_contrast(clip: Path) -> None:
    _, (ordered, shuffled) = sampled("qwen2_5_vl", clip, build_model("qwen2_5_vl"))
    turn = ordered[1].turns[0]
    times = [media.timestamps.tolist() for media in turn.prompt.media]
    assert turn.contrast is not None and turn.contrast.media[0].timestamps.tolist() == times[0]
    assert torch.equal(turn.contrast.media[0].frames, turn.prompt.media[0].frames.flip(0))
    assert turn.contrast.input_ids.tolist() == turn.prompt.input_ids.tolist()
    other = shuffled[1].turns[0]
    assert other.contrast is None and isinstance(other.calls[0].result[1], Media)
    seen, asked = other.prompt.media[0], other.calls[0].result[1]
    assert torch.equal(seen.timestamps, asked.timestamps) and not torch.equal(seen.frames, asked.frames)
    pixels = (sorted(media.frames.flatten(1).float().mean(1).tolist()) for media in (seen, asked))
    assert next(pixels) == pytest.approx(next(pixels))


class Scripted(ScriptedEngine):
    """Says the next text of each question; ends every turn."""

    def __init__(self, builder: PromptBuilder, *texts: str) -> None:
        super().__init__(lambda prompt, n: [])
        self.builder, self.texts = builder, list(texts)

    def sample(self, prompts: Any, sampling: Any, *rest: Any, **options: Any) -> list[list[Rollout]]:
        self.prompts += prompts
        text = self.texts.pop(0)
        ids = [*self.builder.tokenizer(text)["input_ids"], self.builder.end_token_id]
        one = Rollout(torch.tensor(ids), torch.zeros(len(ids)), text, "stop")
        return [[one] for _ in prompts]


@pytest.mark.parametrize(
    ("texts", "settings", "turns", "text"),
    [
        (["B"], {}, [], "B"),
        ([LOOK, "B"], {}, ["1 to 3 s:"], "B"),
        (
            ["<tool_call>?</tool_call>", LOOK, "B"],
            {},
            ["Error: the call is not valid JSON", "1 to 3 s:"],
            "B",
        ),
        ([LOOK] * 4, {}, ["1 to 3 s:", "1 to 3 s:", NOTICE], LOOK),  # calls on: the answer is what it said
        ([LOOK, LOOK, "B"], {"max_tool_tokens": 100}, ["1 to 3 s:", NOTICE], "B"),
        ([LOOK + LOOK, "B"], {}, ["1 to 3 s:"], "B"),
        (
            [LOOK * 3, LOOK],
            {},
            ["1 to 3 s:"],
            LOOK,
        ),  # the third gets the notice: no call is answered behind it
        # What a model writes comes back in errors: a special token must not.
        (
            [LOOK.replace("look", "<|im_end|>"), "B"],
            {},
            ["Error: a tool's text holds a special token of the model"],
            "B",
        ),
        (
            ["<tool_call>" + '{"name": "picture", "arguments": {"name": "x"}}</tool_call>', "B"],
            {},
            ["a picture:"],
            "B",
        ),
    ],
)
def test_an_episode_ends_politely(
    clip: Path, texts: list[str], settings: dict[str, Any], turns: list[str], text: str
) -> None:
    builder = PromptBuilder(tiny_processor("qwen2_5_vl"))
    inner = Scripted(builder, *texts)
    builder.toolbox = toolbox(functions=[picture], **settings)
    engine = ToolEngine(inner, builder)
    ((rollout,),) = engine.sample([question("qwen2_5_vl", clip, builder)], SamplingSettings(max_tokens=2000))
    assert [turn.calls[0].result[0] for turn in rollout.turns] == turns and rollout.text == text
    assert len(rollout.logprobs) == len(rollout.token_ids)
    last = inner.prompts[-1]
    assert sum(len(p.input_ids if isinstance(p, Prompt) else p) for p in last.pieces) == len(last.input_ids)


def test_the_length_limit_counts_all_turns(clip: Path) -> None:
    builder = PromptBuilder(tiny_processor("qwen2_5_vl"))
    first = len(builder.tokenizer(LOOK)["input_ids"]) + 1
    builder.toolbox = toolbox()
    engine = ToolEngine(Scripted(builder, LOOK, "B" * 99), builder)
    sampling = SamplingSettings(max_tokens=first + 5)
    ((rollout,),) = engine.sample([question("qwen2_5_vl", clip, builder)], sampling)
    assert len(rollout.token_ids) == first + 5 and rollout.finish_reason == "length"
    assert rollout.text == builder.tokenizer.decode(rollout.token_ids[first:])


class Looker(Scripted):
    """Looks, and is right if it got the stretch that it asked for."""

    def __init__(self, builder: PromptBuilder, right: Tensor) -> None:
        super().__init__(builder)
        self.right = right

    def sample(self, prompts: Any, sampling: Any, *rest: Any, **options: Any) -> list[list[Rollout]]:
        found = []
        for prompt in prompts:
            seen = bool(prompt.parts) and torch.equal(prompt.media[-1].frames, self.right)
            self.texts = [
                f"<think>x</think><answer>{'B' if seen else 'A'}</answer>" if prompt.parts else LOOK
            ]
            found += super().sample([prompt], sampling)
        return found


def test_the_look_gap(clip: Path, tmp_path: Path) -> None:
    settings = EvalSettings(
        model="m",
        manifest="x.json",
        tools="look",
        order=["ordered", "elsewhere"],
        look=LookSettings(frames=4),
    )
    builder = PromptBuilder(tiny_processor("qwen2_5_vl"))
    box = builder.toolbox = toolbox(look_frames=4)
    sample = make_sample(path=str(clip))
    right = box.call(Asked("look", {"start": 1, "end": 3}), question("qwen2_5_vl", clip, builder)).result[1]
    assert isinstance(right, Media)
    looker = Looker(builder, right.frames)
    engine = ToolEngine(looker, builder)
    summary = evaluate([sample], engine, builder, budget_of("qwen2_5_vl"), settings, tmp_path)
    figures = summary["frames"]["16"]
    assert figures["look_gap"]["gap"] == 1.0 and "temporal_gaps" not in figures
    (line,) = (line for line in summary_table(summary).splitlines() if line.startswith("elsewhere "))
    assert line.split()[1:4] == ["1", "0.000", "1.000"]
    validated = SimpleNamespace(
        seed=0, tools="look", contrast="shuffled", contrast_unit="frame", eval_batch_size=1,
        max_completion_length=500, num_generations_eval=None, overview_frames=[4, 4],
    )  # fmt: skip
    found = temporal_accuracy(engine, [sample], Reader(budget_of("qwen2_5_vl")), builder, validated)
    assert (found["look_gap"], found["accuracy_elsewhere"], found["accuracy_video"]) == (1.0, 0.0, 1.0)
    assert "look_gap_low" not in found  # of one question
    assert [media.frames.shape[0] for media in looker.prompts[-1].media] == [4, 4]
    lines = [json.loads(line) for line in (tmp_path / "predictions-16.jsonl").read_text().splitlines()]
    assert {line["order"]: line["score"] for line in lines} == {"ordered": 1.0, "elsewhere": 0.0}
    assert lines[0]["calls"] == 1 and "[look(start=1, end=3): 1 to 3 s: 4 frames]" in lines[0]["transcript"]
    control = replace(
        settings, order=["ordered", "no-look"], max_looks=1, frame_pixels=budget_of("qwen2_5_vl").frame_pixels
    )
    whole = PromptBuilder(builder.processor)
    whole.toolbox = box
    figures = evaluate([sample], engine, whole, budget_of("qwen2_5_vl"), control, tmp_path / "control")[
        "frames"
    ]["16"]
    assert figures["no_look_gap"]["gap"] == 1.0 and figures["no-look"]["questions"] == 1
    (line,) = [
        json.loads(line)
        for line in (tmp_path / "control/no-look/predictions-20.jsonl").read_text().splitlines()
    ]
    assert line["order"] == "no-look" and line["frames"] == 20 and "calls" not in line
    assert looker.prompts[-1].frames == 20  # at its 1 frame a second the clip would give 8
    assert find_run_folders(tmp_path / "control") == [tmp_path / "control"]
    with pytest.raises(ConfigError, match="order names elsewhere, which is about looks; add --tools look"):
        EvalSettings(model="m", manifest="x.json", order=["ordered", "elsewhere"])


@pytest.mark.parametrize(
    ("start", "end", "length", "least", "most"),
    [
        (0.0, 2.0, 10.0, 2.0, 8.0),
        (8.0, 10.0, 10.0, 0.0, 6.0),
        (4.0, 6.0, 10.0, 0.0, 8.0),
        (1.0, 9.0, 10.0, 2.0, 2.0),
    ],
)
def test_elsewhere_is_another_stretch(
    start: float, end: float, length: float, least: float, most: float
) -> None:
    place = elsewhere(start, end, length)
    assert least <= place <= most and place == elsewhere(start, end, length)
    size = end - start
    assert size > length / 2 or place + size <= start or place >= end


@pytest.mark.parametrize(
    ("calls", "is_one"),
    [
        ([(0.0, 4.0)], True),
        ([(0.0, 6.0)], True),  # shown: 4 to 10 s, a third of it the same
        ([(0.0, 7.0)], False),  # 3 to 10 s: four sevenths
        ([(3.0, 8.0)], True),  # 0 to 5 s
        ([(0.0, 4.0), (0.0, 9.0)], False),
        ([], True),
    ],
)
def test_a_look_elsewhere_that_shows_the_same_is_no_control(
    calls: list[tuple[float, float]], is_one: bool
) -> None:
    prompt: Any = SimpleNamespace(media=[SimpleNamespace(duration=10.0)])
    made = tuple(ToolCall("look", {"start": start, "end": end}, ["…"]) for start, end in calls)
    failed = ToolCall("look", {"start": "x", "end": 0.0}, ["…"], failed=True)
    turn = ToolTurn(1, "", (*made, failed), prompt)
    assert is_control(prompt, Rollout(torch.tensor([1]), torch.zeros(1), "", "stop", (turn,))) == is_one


def test_the_look_gap_leaves_out_what_is_no_control() -> None:
    record = {"output": "", "prediction": "A", "strict_score": 1.0, "format": 1.0, "finish_reason": "stop"}
    orders = [(n, order) for n in range(8) for order in ("ordered", "elsewhere")]
    lines = [
        {**record, "problem_id": n, "order": order, "score": float(order == "ordered"), "clip": str(n)}
        | ({"no_control": True} if order == "elsewhere" and n < 3 else {})
        for n, order in orders
    ]
    samples: Any = [SimpleNamespace(problem_id=n, cluster=str(n)) for n in range(8)]
    loop: Any = SimpleNamespace(samples=samples, skipped=lambda keys: {})
    answered: Any = {"reasoned": {(line["problem_id"], line["order"]): line for line in lines}}
    figures = _Evaluation.figures(loop, answered, orders)
    assert figures["look_gap"]["questions"] == 5 and figures["no_control"] == 3
    assert "elsewhere: 3 questions not counted" in summary_table({"frames": {"8": figures}})


# ---- Training


@pytest.mark.parametrize("rule", ["margin", "likelihood_gate"])
def test_a_step_trains_on_episodes(checkpoint: Path, manifest: Path, tmp_path: Path, rule: str) -> None:
    trainer = make_trainer(
        checkpoint, manifest, tmp_path / rule, tools="look", temporal_rule=rule, beta=0.04,
        overview_frames=[2, 4], look_frames=4, max_steps=1, num_iterations=2, save_steps=2,
    )  # fmt: skip
    trainer.engine.__class__ = Forced
    batches, normaliser = first_step(trainer)
    groups = batches[0]["batch"].groups
    for group in groups:
        assert [len(rollout.turns) for rollout in group.ordered] == [0, 1, 2, 0]
        assert group.prompt.frames in (1, 2, 4)
    loss, found = trainer.compute_loss(policy_of(trainer), batches[0], True, normaliser)
    own = torch.cat([rollout.logprobs for group in groups for rollout in group.ordered])
    torch.testing.assert_close(found["policy"].logprobs, own, atol=1e-5, rtol=0)
    loss.backward()
    taught = [rollout.logprobs - 1 for rollout in groups[0].ordered]
    record_group(tmp_path, 1, groups[0], trainer.builder.tokenizer, taught)
    (line,) = map(json.loads, (tmp_path / "rollouts.jsonl").read_text().splitlines())
    recorded = [completion.get("turns", []) for completion in line["ordered"]]
    assert [len(turns) for turns in recorded] == [0, 1, 2, 0]
    shown = group_of(line, None, tmp_path)["ordered"][2]["turns"]
    for completion in line["ordered"]:  # the words of each turn are its own
        turns = [*completion.get("turns", []), completion]
        for turn in turns:
            assert "".join(word for word, *_ in turn["word_logprobs"]) == turn["text"]
        lost = sum(own - taught for turn in turns for _, own, taught in turn["word_logprobs"])
        assert lost == pytest.approx(completion["tokens"], abs=0.05)
    assert all(turn["scored"] for turn in shown)
    is_video = groups[0].sample.data_type == "video"
    for turn in recorded[2]:
        assert turn["calls"][0]["failed"] == (not is_video)
        assert not is_video or (tmp_path / turn["frames"]["strip"]).is_file()
    assert [turn["failed"] for turn in shown] == [not is_video] * 2
    assert all(str(turn["strip"]).startswith("data:image/jpeg;base64,") == is_video for turn in shown)
    contrasts = [
        group
        for group in groups
        if group.rollouts.question.contrast is not None and group.rollouts.token_contrasts
    ]
    assert bool(contrasts) == (rule == "likelihood_gate")
    for group in contrasts:
        for rollout, drops in zip(group.ordered, group.rollouts.token_contrasts, strict=True):
            with torch.no_grad():
                kept = alone(policy_of(trainer), group.prompt, rollout)
                lost = alone(policy_of(trainer), group.rollouts.question.contrast, rollout, contrast=True)
            torch.testing.assert_close(drops, kept - lost, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_run_with_tools_resumes_exactly(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    def run(folder: Path, **changes: Any) -> dict[str, Tensor]:
        trainer = make_trainer(
            checkpoint, manifest, folder, tools="look", look_frames=4, overview_frames=[2, 4], save_steps=2,
            **changes,
        )  # fmt: skip
        trainer.engine.__class__ = Forced
        trainer.train()
        return weights(trainer)

    whole = run(tmp_path / "whole", max_steps=4)
    run(tmp_path / "parts", max_steps=2)
    resumed = run(tmp_path / "parts", max_steps=4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Adding(ToolEngine):
    """Calls add behind first turns. order: of each turn as it ends, the number of tool turns before it."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.order: list[int] = []

    def _add(self, episode: Episode, new: Rollout) -> None:
        super()._add(episode, new)
        self.order.append(len(episode.rollout.turns))

    def _calls(self, episode: Episode) -> bool:
        episode.calls, episode.left = [Asked("add", {"a": 1, "b": 2})], 4
        return not episode.rollout.turns


class Rounds(ScriptedEngine):
    """Takes the turns of another engine together."""

    def __init__(self, engine: RolloutEngine) -> None:
        super().__init__(lambda prompt, n: [])
        self.sample = engine.sample


def check_follow(engine: Any, stop_ids: str, clip: Path, processor: Any, family: str) -> None:
    """The quick answer to a question takes its second turn before the slow one has ended its first.

    stop_ids: name of the engine's attribute.
    """
    builder = PromptBuilder(processor)
    prompts = [question(family, clip, builder)]
    builder.toolbox = toolbox(family, [add])
    for seed in range(20):
        setattr(engine, stop_ids, [])
        sampling = SamplingSettings(n=2, max_tokens=100, seed=(seed,))
        ((slow, quick),) = engine.sample(prompts, sampling)
        if stops := set(quick.token_ids[:10].tolist()) - set(slow.token_ids.tolist()):
            break
    setattr(engine, stop_ids, list(stops))
    engines = Adding(engine, builder), Adding(Rounds(engine), builder)
    (followed,), (rounds,) = (each.sample(prompts, sampling) for each in engines)
    assert [each.order for each in engines] == [[0, 1, 0, 1], [0, 0, 1, 1]]
    assert followed[0].turns[0].after == 100 > 10 >= followed[1].turns[0].after
    assert torch.equal(followed[0].token_ids[:100], slow.token_ids)
    check_same([followed], [rounds])

    def fail(*given: Any) -> None:
        raise KeyError("a tool's")

    with pytest.raises(KeyError, match="a tool's"):
        engine.follow((prompts, sampling, [2]), fail)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_episodes_in_vllm(family: str, clip: Path) -> None:
    """Each turn gets the exact tokens and pixels of all turns before it, as soon as they are there."""
    processor = tiny_processor(family)
    model: Any = tiny_model(family, processor.tokenizer, for_vllm=True)
    engine = VLLMEngine(model, processor, max_model_len=1024, max_sequences=16)
    try:
        engine.update_weights(model)
        prompts, groups = sampled(family, clip, model, engine)
        _, rounds = sampled(family, clip, model, Rounds(engine))
        check_follow(engine, "stop_ids", clip, processor, family)
        engine.update_weights(model)  # which refuses while requests are running
    finally:
        engine.close()
    check_sampler(model, prompts, groups)
    check_same(groups, rounds)


def check_same(groups: list[list[Rollout]], others: list[list[Rollout]]) -> None:
    for one, other in zip(chain(*groups), chain(*others), strict=True):
        assert torch.equal(one.token_ids, other.token_ids) and one.transcript == other.transcript
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)


def check_sampler(model: Any, prompts: list[Prompt], groups: list[list[Rollout]]) -> None:
    assert [[len(rollout.turns) for rollout in group] for group in groups] == [[0, 1, 2, 0], [0, 1]]
    pieces = [[rollout.pieces() for rollout in group] for group in groups]
    completions = [[rollout.token_ids for rollout in group] for group in groups]
    scored = group_logprobs(model, prompts, completions, pieces=pieces).logprobs
    own = torch.cat([rollout.logprobs for group in groups for rollout in group])
    difference = (scored - own).abs()
    assert float(difference.mean()) < 1e-5 and float(difference.max()) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_looks(family: str, clip: Path) -> None:
    builder = PromptBuilder(tiny_processor(family))
    box = builder.toolbox = toolbox(family, look_frames=6, max_looks=3)
    prompt = question(family, clip, builder)
    turn = builder.build_turn([box.call(Asked("look", {"start": 1, "end": 4}), prompt).result], prompt)
    config, pixels = build_model(family).config, 4 * SIDES[family] ** 2
    frames, training = PromptSettings(max_frames=8, frame_pixels=pixels), TGRPOSettings(num_generations=4)
    row = longest_row(config, frames, training, 30, None, box.settings)
    assert row.looks == 3 and 0 <= (row.returned - NOTICE_TOKENS) / 3 - len(turn.input_ids) < TURN_TOKENS
    grid = turn.features["video_grid_thw"][0]
    assert row.looked == 4 * 3 * int(grid.prod())
    few = longest_row(config, frames, training, 30, None, ToolSettings(tools="look", max_tool_tokens=50))
    assert (few.looks, few.returned) == (1, 50 + NOTICE_TOKENS)
    plain = longest_row(config, frames, training, 30, None, ToolSettings())
    assert plain.tokens == row.tokens - 4 * row.returned


@pytest.mark.slow
def test_ask_about_ten_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An overview of 16 frames, and a forced call."""

    class ForcedAt(ToolEngine):
        def _calls(self, episode: Episode) -> bool:
            episode.calls, episode.left = [Asked("look", {"start": 420, "end": 424})], 6
            return not episode.rollout.turns

    monkeypatch.setattr(engine_factory, "ToolEngine", ForcedAt)
    path = write_clip(tmp_path / "lecture.mp4", moving_square(600 * 8), 8.0)
    words = ["--tools", "look", "--max_frames", "16", "--frame_pixels", "3136", "--max_new_tokens", "12"]
    asked = ["ask", str(base_folder()), str(path), "What does she write last?", *words]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "[look(start=420, end=424): 420 to 424 s: 16 frames]" in said
