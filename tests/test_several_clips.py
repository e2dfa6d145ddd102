"""Questions about several clips or images: what reaches the model, an endpoint and the run folder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from general_models import GENERAL
from group_batches import tokens_of
from test_general import PROCESSORS as GENERAL_PROCESSORS
from test_general import build as general_build
from test_general import plain_logprobs
from test_prompts import FAMILIES, PROCESSORS, make_clip, make_sample, side
from test_rollout_transformers import build_model, reference_inputs, teacher_forced

from video_r1.data.decoding.media import Media, Shown
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder, TextPrompts, contrast_order, contrast_prompt
from video_r1.data.reading import build_question
from video_r1.data.rollouts import Rollout, Rollouts
from video_r1.errors import PromptError
from video_r1.models.families import find_family
from video_r1.models.group_forward import encode_vision, group_logprobs
from video_r1.rollout.endpoint_engine import chat_request
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.engine_factory import in_process_engine
from video_r1.training.logprob_contrast import token_contrasts

torch.set_num_threads(1)

TWO = make_sample(problem="Which one falls?", more_paths=("other.mp4",))
MARKED = replace(TWO, problem="Does the ball of <video> fall as in <video>?")
THREE = make_sample("free-form", problem="Which is odd?", data_type="image", more_paths=("b.png", "c.png"))
SHUFFLED = [3, 1, 0, 2, 7, 5, 4, 6, 8 + 2, 8 + 0, 8 + 3, 8 + 1]


def clips_of(edge: int) -> tuple[Media, Media]:
    """Eight frames and four that are wider, of another duration."""
    first = make_clip("qwen2_5_vl" if edge == 56 else "qwen3_vl")
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (4, 3, edge, edge * 3 // 2), generator=generator, dtype=torch.uint8)
    return first, Media(pixels, torch.linspace(0, 2, 4, dtype=torch.float64), 2.4, "video")


def images_of(edge: int) -> tuple[Media, ...]:
    frames = [clips_of(edge)[0].frames[:1], clips_of(edge)[1].frames[:1], clips_of(edge)[0].frames[4:5]]
    return tuple(Media(frame, torch.zeros(1, dtype=torch.float64), 0.0, "image") for frame in frames)


def prompts_of(builder: PromptBuilder, edge: int) -> list[Prompt]:
    """Two clips before the question, two at their marks in another order, three images."""
    clips = clips_of(edge)
    return [
        builder.build(TWO, clips),
        builder.build(MARKED, clips, torch.tensor(SHUFFLED)),
        builder.build(THREE, images_of(edge)),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_each_alone(family: str) -> None:
    builder, clips = PromptBuilder(PROCESSORS[family]), clips_of(side(family))
    several, _, images = prompts_of(builder, side(family))
    apart = [builder.build(make_sample(), clip) for clip in clips]
    for name in apart[0].features:
        if name != "mm_token_type_ids":
            expected = torch.cat([prompt.features[name] for prompt in apart])
            assert torch.equal(several.features[name], expected), name
    assert several.features["video_grid_thw"].tolist() == [[4, 4, 4], [2, 4, 6]]
    assert images.features["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 6], [1, 4, 4]]
    assert builder.visual_tokens(several.input_ids) == 4 * 4 + 2 * 6
    assert several.frames == 12 and images.frames == 3


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_log_probabilities_and_generation_are_those_of_a_plain_forward(family: str) -> None:
    torch.manual_seed(0)
    model, prompts = build_model(family), prompts_of(PromptBuilder(PROCESSORS[family]), side(family))
    completions = [tokens_of(6, 3), tokens_of(4), tokens_of(5, 1, 2)]
    with torch.no_grad():
        ours = group_logprobs(model, prompts, completions, temperature=0.7).logprobs
    expected = [
        (teacher_forced(model, prompt, tokens) / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        for prompt, group in zip(prompts, completions, strict=True)
        for tokens in group
    ]
    torch.testing.assert_close(ours, torch.cat(expected), atol=1e-5, rtol=0)

    engine = in_process_engine(model, PROCESSORS[family])
    groups = engine.sample(prompts, SamplingSettings(n=2, temperature=0, max_tokens=12))
    for prompt, group in zip(prompts, groups, strict=True):
        output = model.generate(**reference_inputs(prompt), max_new_tokens=12, do_sample=False)
        generated = output[0, len(prompt.input_ids) :].tolist()
        assert [rollout.token_ids.tolist() for rollout in group] == [generated] * 2


@pytest.mark.slow
@pytest.mark.parametrize("family", GENERAL)
def test_the_general_path(family: str) -> None:
    """Clips are several images where the processor takes no videos; marks may be special tokens."""
    torch.manual_seed(0)
    model, builder = general_build(family), PromptBuilder(GENERAL_PROCESSORS[family])
    assert find_family(model) is None
    if family in ("internvl", "llava_onevision"):  # whose processors stack clips
        with pytest.raises(
            PromptError, match="does not take clips of 8 and 4 frames together; give all clips"
        ):
            builder.build(TWO, clips_of(56))
        short = tuple(clip.reordered(torch.arange(4)) for clip in clips_of(56))
        order = torch.tensor([3, 1, 0, 2, 7, 5, 4, 6])
        prompts = [
            builder.build(MARKED, short, order),
            builder.build(THREE, images_of(56)),
            builder.build(TWO, short),
        ]
    else:
        prompts = prompts_of(builder, 56)
    completions = [tokens_of(4, 2), tokens_of(3), tokens_of(5)]
    with torch.no_grad():
        expected = plain_logprobs(model, prompts, completions, 0.7)
        ours = group_logprobs(model, prompts, completions, temperature=0.7).logprobs
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    engine = in_process_engine(model, builder.processor)
    rollouts = engine.sample(prompts, SamplingSettings(n=2, max_tokens=4, seed=1))
    with torch.no_grad():
        sampled = [[rollout.token_ids for rollout in group] for group in rollouts]
        again = group_logprobs(model, prompts, sampled).logprobs
    drawn = torch.cat([rollout.logprobs for group in rollouts for rollout in group])
    torch.testing.assert_close(again, drawn, atol=1e-5, rtol=0)


def said(prompt: Prompt) -> list[str]:
    """The user's message: texts, and the kinds of visuals."""
    parts = next(turn for turn in prompt.messages if turn["role"] == "user")["content"]
    return [part.get("text", f"[{part['type']}]") for part in parts]


def test_where_they_stand() -> None:
    builder, clips = PromptBuilder(PROCESSORS["qwen2_5_vl"]), clips_of(56)
    rest = TextPrompts().question(TWO).removeprefix(TWO.problem)
    assert said(builder.build(TWO, clips)) == ["[video]", "[video]", TWO.problem + rest]
    marked = ["Does the ball of ", "[video]", " fall as in ", "[video]", "?" + rest]
    assert said(builder.build(MARKED, clips)) == marked
    text = builder.tokenizer.decode(builder.build(MARKED, clips).input_ids)
    pieces = ["ball of ", "<|video_pad|>", " fall as in", "<|video_pad|>", "?"]
    places = [text.index(pieces[0])]
    for piece in pieces[1:]:
        places.append(text.index(piece, places[-1] + 1))
    assert text.count("<video>") == 0 and text[: places[0]].count("<|video_pad|>") == 0

    choices = replace(
        THREE, problem_type="multiple choice", options=("A. <image>", "B. <image>", "C. <image>")
    )
    assert said(builder.build(choices, images_of(56)))[:4] == [
        "Which is odd?\nA. ",
        "[image]",
        "\nB. ",
        "[image]",
    ]
    turns = ("Here is <video>.", "And <video>. Same?")
    chat = tuple({"role": "user", "content": turn} for turn in turns)
    prompt = builder.build(
        replace(TWO, messages=(chat[0], {"role": "assistant", "content": "Yes."}, chat[1])), clips
    )
    kinds = [[part["type"] for part in turn["content"]] for turn in prompt.messages]
    assert kinds == [["text", "video", "text"], ["text"], ["text", "video", "text"]]
    blind = builder.build(MARKED, clips, torch.empty(0, dtype=torch.long), "blind")
    assert "".join(said(blind)) == "Does the ball of  fall as in ?" + rest and blind.frames == 0


def test_marks_of_other_turns_are_text() -> None:
    """Templates from Qwen3-VL on show nothing in them."""
    turns = ("system", "Name <video>."), ("user", "Hello."), ("assistant", "A <video>?"), ("user", "Same?")
    chat = tuple({"role": role, "content": text} for role, text in turns)
    builder = PromptBuilder(PROCESSORS["qwen3_vl"])
    for sample, clips in ((TWO, clips_of(64)), (make_sample(), clips_of(64)[:1])):
        prompt = builder.build(replace(sample, messages=chat), clips)
        texts = [[part.get("text", "[video]") for part in turn["content"]] for turn in prompt.messages]
        assert texts == [["Name <video>."], ["[video]"] * len(clips) + ["Hello."], ["A <video>?"], ["Same?"]]
    asked = ({"role": "user", "content": "<video><video>"}, chat[2], chat[3])
    blind = builder.build(replace(TWO, messages=asked), clips_of(64), torch.empty(0, dtype=torch.long))
    assert blind.messages[0]["content"] == [{"type": "text", "text": ""}]  # templates take its first part


def test_what_a_prompt_refuses() -> None:
    builder, clips = PromptBuilder(PROCESSORS["qwen2_5_vl"], max_prompt_length=60), clips_of(56)
    with pytest.raises(
        PromptError, match=r"has the mark <video> 1 times for 2 files; write it once for each"
    ):
        builder.build(replace(TWO, problem="Does <video> fall?"), clips)
    with pytest.raises(
        PromptError, match=r"28 of them visual \(of 2 videos\); the limit \(max_prompt_length\) is 60"
    ):
        builder.build(TWO, clips)
    with pytest.raises(ValueError, match="1 clips or images for a question about 2"):
        builder.build(TWO, clips[:1])
    with pytest.raises(PromptError, match="84 x 56 pixels do not fit"):
        PromptBuilder(PROCESSORS["qwen3_vl"]).build(TWO, (clips_of(64)[0], clips[1]))


def test_the_order_of_several_clips() -> None:
    """Each clip is permuted in itself; numbers count on; what is too short keeps its order."""

    def shown(contrast: Any, *clips: int, unit: Any = "frame") -> list[int] | None:
        order = contrast_order(contrast, clips, torch.Generator().manual_seed(0), unit)
        return None if order is None else order.tolist()

    assert shown("reversed", 4, 2, 3) == [3, 2, 1, 0, 5, 4, 8, 7, 6]
    assert shown("reversed", 4, 2, unit="patch") == [2, 3, 0, 1, 4, 5]
    assert shown("reversed", 2, 2, unit="patch") is None and shown("shuffled", 1, 1, 1) is None
    assert shown("single", 8, 4) == [4, 4, 10, 10] and shown("blind", 8, 4) == []
    drawn = shown("shuffled", 8, 4)
    assert drawn is not None and sorted(drawn[:8]) == list(range(8)) and sorted(drawn[8:]) == [8, 9, 10, 11]
    assert drawn[:8] == shown("shuffled", 8)  # the first clip's is that of the clip alone
    assert shown("dropped", 8, 2, 4) is not None


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("unit", ["frame", "patch"])
def test_contrasts_and_drops(family: str, unit: Any) -> None:
    """Frames stay in their clips; features of permuted pairs are those of the tower's, for unequal sizes."""
    clips, builder = clips_of(side(family)), PromptBuilder(PROCESSORS[family])
    question = build_question(TWO, clips, builder, torch.Generator().manual_seed(2), "shuffled", unit)
    contrast = question.contrast
    assert contrast is not None and contrast.permutation is not None
    assert not torch.equal(contrast.permutation, torch.arange(12))
    for media, clip, first in zip(contrast.media, clips, (0, 8), strict=True):
        order = contrast.permutation[first : first + len(clip.frames)] - first
        assert torch.equal(media.frames, clip.frames[order])
    assert contrast_prompt(THREE, images_of(side(family)), builder, "shuffled", torch.Generator()) is None
    if unit == "frame":
        return
    model = build_model(family)
    rollouts = [Rollout(tokens, torch.zeros(len(tokens)), "", "stop") for tokens in tokens_of(5, 3)]
    given = Rollouts(question, rollouts)
    with torch.no_grad():
        vision = encode_vision(model, [question.ordered])
    apart = token_contrasts(model, [given], 0.8, batch_size=1)
    shared = token_contrasts(model, [replace(given, vision=vision)], 0.8, batch_size=1)
    torch.testing.assert_close(shared[0], apart[0], rtol=0, atol=1e-5)


def request_of(sample: Sample, shown: Shown, frames_as: Any) -> tuple[list[str], dict[str, Any]]:
    body = chat_request("m", TextPrompts().build(sample, shown), frames_as, SamplingSettings(), 1, 0)
    return [part.get("text", part["type"]) for part in body["messages"][0]["content"]], body


def test_what_an_endpoint_is_sent() -> None:
    """Clips as images behind headings, also where one would go as a video: a request has one clip's times."""
    for frames_as in ("images", "video"):
        parts, body = request_of(MARKED, clips_of(56), frames_as)
        heading = "Video 1 of 2: 8 frames of a video of 4.0 seconds, in order:"
        assert parts[:4] == ["Does the ball of ", heading, "0.0 s", "image_url"]
        second = parts.index("Video 2 of 2: 4 frames of a video of 2.4 seconds, in order:")
        assert parts[second - 1] == " fall as in " and parts.count("image_url") == 12
        assert parts[-1].startswith("?\nA. left") and "media_io_kwargs" not in body
    parts, _ = request_of(THREE, images_of(56), "video")
    assert parts[:3] == ["image_url"] * 3 and len(parts) == 4
    parts, body = request_of(make_sample(), clips_of(56)[0], "video")
    assert parts[0] == "video_url" and "media_io_kwargs" in body
