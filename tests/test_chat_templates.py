"""Chat templates of models that think by default: where a prompt ends, and what a completion begins with."""

from __future__ import annotations

import pytest
from test_prompts import make_clip, make_sample
from tiny_models import chat_template, tiny_processor

from video_r1.chat_client import completions_of
from video_r1.data.prompts import PromptBuilder, TextPrompts, response_text
from video_r1.rollout.endpoint_engine import chat_request
from video_r1.rollout.engine import SamplingSettings

FAMILY = "qwen3_5"
EMPTY = "<think>\n\n</think>\n\n"


def thinking_turn(value: str, then: str, otherwise: str) -> str:
    """The assistant's turn of a template that asks whether `enable_thinking` has that value."""
    return f"""
{{%- if add_generation_prompt %}}
    {{{{- '<|im_start|>assistant\\n' }}}}
    {{%- if enable_thinking is defined and enable_thinking is {value} %}}
        {{{{- '{then}' }}}}
    {{%- else %}}
        {{{{- '{otherwise}' }}}}
    {{%- endif %}}
{{%- endif %}}"""


NO_THOUGHT, A_THOUGHT = r"<think>\n\n</think>\n\n", r"<think>\n"
# As the templates of Qwen3.5 begin it: from 4B up, and of the smaller ones.
LARGE = thinking_turn("false", NO_THOUGHT, A_THOUGHT)
SMALL = thinking_turn("true", A_THOUGHT, NO_THOUGHT)
ALWAYS = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
PLAIN = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"


def builder_of(turn: str) -> PromptBuilder:
    processor = tiny_processor(FAMILY)
    said, found, _ = chat_template(FAMILY).rpartition("{%- if add_generation_prompt -%}")
    assert found
    processor.chat_template = said + turn
    return PromptBuilder(processor)


@pytest.mark.parametrize(
    ("turn", "direct_end"), [(LARGE, EMPTY), (SMALL, EMPTY), (ALWAYS, EMPTY), (PLAIN, "")]
)
def test_where_a_prompt_ends(turn: str, direct_end: str) -> None:
    builder, clip, sample = builder_of(turn), make_clip(FAMILY), make_sample()
    decode = builder.tokenizer.decode
    reasoned = decode(builder.build(sample, clip).input_ids)
    assert reasoned.endswith("then answer within <answer></answer>. Give the letter only.<|im_end|>\n"
                             "<|im_start|>assistant\n")  # fmt: skip
    direct = builder.with_template(builder.template.direct())
    text = decode(direct.build(sample, clip).input_ids)
    assert text.endswith(f"Give the letter only.<|im_end|>\n<|im_start|>assistant\n{direct_end}")


@pytest.mark.parametrize("turn", [LARGE, SMALL, ALWAYS, PLAIN])
def test_a_response_has_its_reasoning_once(turn: str) -> None:
    """What SFT teaches behind the prompt, and rewards read without it, has both tags."""
    builder, sample = builder_of(turn), make_sample(process="<think>It moves.</think>")
    prompt, response = builder.build_with_response(sample, make_clip(FAMILY), response_text(sample))
    chat = builder.tokenizer.decode([*prompt.input_ids, *response])
    assert chat.rpartition("<|im_start|>")[2] == (
        "assistant\n<think>It moves.</think>\n<answer>B</answer><|im_end|>"
    )


def test_an_endpoint_is_told_not_to_think() -> None:
    asked = TextPrompts()
    for builder, thinks in ((asked, True), (asked.with_template(asked.template.direct()), False)):
        prompt = builder.build(make_sample(), make_clip(FAMILY))
        assert prompt.thinks is thinks
        for frames_as in ("video", "images"):
            body = chat_request("m", prompt, frames_as, SamplingSettings(), 1, 0)
            told = {"enable_thinking": False} if frames_as == "video" and not thinks else None
            assert body.get("chat_template_kwargs") == told


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "\nSo.\n</think>\n\n<answer>B</answer>"}, "<think>So.\n</think>\n\n<answer>B</answer>"),
        ({"content": "<think>It moves.</think>"}, "<think>It moves.</think>"),
        ({"content": "<answer>B</answer>"}, "<answer>B</answer>"),
        (
            {"reasoning_content": " So. ", "content": "\n<answer>B</answer>"},
            "<think>So.</think>\n<answer>B</answer>",
        ),
    ],
)
def test_an_answer_whose_first_tag_stood_in_the_prompt(message: dict[str, str], text: str) -> None:
    (found,) = completions_of({"choices": [{"message": message, "finish_reason": "stop"}]})
    assert found.text == text
