"""Prompt templates (the user's text of a question) and chat templates (the assistant's turn).

A prompt template is plain text with the placeholders {question}, {options}, {hint} and {subtitles}; `{{` and
`}}` are braces. A line of {options} or {subtitles} alone is left out where the question has none. A line such
as `#hint OCR: Give the text.` replaces the hint of a problem type in `ANSWER_HINTS`.

Chat templates of models that think by default (Qwen3.5) begin the assistant's turn with `<think>`, or with an
empty pair of the tags if thinking is off, which some control by the variable `enable_thinking`. Here a
completion contains its own `<think>…</think>`, which rewards parse and SFT teaches:

    template           the template writes         a reasoning prompt ends with   a direct prompt ends with
    Qwen3-VL           assistant↵                  assistant↵                     assistant↵
    Qwen3.5, 4B up     assistant↵<think>↵          assistant↵                     assistant↵<think></think>
    Qwen3.5, smaller   assistant↵<think></think>   assistant↵                     assistant↵<think></think>
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from video_r1.data.grounding import GROUNDING_HINTS
from video_r1.data.manifests.records import Sample
from video_r1.errors import ConfigError
from video_r1.settings.shared import ProblemType
from video_r1.settings.training_record import template_text

# Few words on purpose: small models with their own tokenizers get the same text.
INSTRUCTION = "Think within <think></think>, then answer within <answer></answer>."
ANSWER_HINTS: dict[ProblemType, str] = {
    "multiple choice": "Give the letter only.",
    "numerical": "Give a number.",
    "OCR": "Give the text.",
    "free-form": "Give a sentence.",
    "regression": "Give a number.",
    "math": "Give a value or an expression.",
    **GROUNDING_HINTS,
}
DEFAULT_TEMPLATE = "{question}\n{options}\n" + INSTRUCTION + " {hint}"
DIRECT_TEMPLATE = "{question}\n{options}\nAnswer within <answer></answer>. {hint}"
PLACEHOLDERS = ("question", "options", "hint", "subtitles")
SUBTITLE_CHARACTERS = 4000  # about 1,000 tokens; longer subtitles are cut, with a notice

SWITCH = "enable_thinking"
TOOLS_MESSAGE = """You can call these functions:
<tools>
{}
</tools>
To call one, end your turn with its name and arguments as JSON:
<tool_call>
{{"name": "function", "arguments": {{"argument": 1}}}}
</tool_call>"""
_BEGUN = re.compile(r"<think>\s*(</think>\s*)?\Z")
_OPEN = re.compile(r"<think>\s*\Z")
NO_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass(frozen=True, slots=True)
class Template:
    """The user's text of a question. text: with placeholders; thinks: whether it asks for reasoning."""

    text: str
    hints: Mapping[ProblemType, str]
    thinks: bool = True

    def render(self, sample: Sample) -> str:
        fields = {
            "question": sample.problem,
            "options": "\n".join(sample.options),
            "hint": self.hints[sample.problem_type],
            "subtitles": subtitle_text(sample.subtitles),
        }
        left_out = [f"{{{name}}}" for name in ("options", "subtitles") if not fields[name]]
        lines = (line for line in self.text.splitlines() if line.strip() not in left_out)
        return "\n".join(lines).format(**fields)

    def direct(self) -> "Template":
        """Return a template that asks for the answer alone, with the same hints."""
        return Template("{subtitles}\n" * ("{subtitles}" in self.text) + DIRECT_TEMPLATE, self.hints, False)

    def __str__(self) -> str:
        """Format the template as a template file."""
        return "\n".join([self.text, *(f"#hint {kind}: {hint}" for kind, hint in self.hints.items())])


def subtitle_text(subtitles: str | None, limit: int = SUBTITLE_CHARACTERS) -> str:
    """Return a row's subtitles under a heading; "" without any. Lines beyond `limit` characters are cut and
    counted.
    """
    if not subtitles:
        return ""
    if len(subtitles) > limit:
        shown = subtitles[: limit + 1].rpartition("\n")[0] or subtitles[:limit]
        subtitles = f"{shown}\n({len(subtitles) - len(shown)} more characters of subtitles)"
    return f"Subtitles:\n{subtitles}\n"


def load_template(path: str | Path | None, subtitles: bool = False) -> Template:
    """Load a template file, or the template in a checkpoint's `video_r1.json`; None: the built-in template.

    subtitles: add a line for them at the top, unless the template has the placeholder. Raises ConfigError.
    """
    template = Template(DEFAULT_TEMPLATE, ANSWER_HINTS)
    if path is not None:
        try:
            template = _parsed(template_text(Path(path)).strip().splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompt template {path}: cannot be read ({error})") from error
        except ValueError as error:
            raise ConfigError(f"prompt template {path}: {error}") from error
    if not subtitles or "{subtitles}" in template.text:
        return template
    return Template("{subtitles}\n" + template.text, template.hints)


def _parsed(lines: list[str]) -> Template:
    """Parse a template file. Raises ValueError with the reason."""
    hints, types = dict(ANSWER_HINTS), get_args(ProblemType)
    for line in (line for line in lines if line.startswith("#hint ")):
        problem_type, colon, hint = line.removeprefix("#hint ").partition(":")
        if not colon or problem_type.strip() not in types:
            raise ValueError(f"{line!r} must read '#hint TYPE: words', with a TYPE of {', '.join(types)}")
        hints[problem_type.strip()] = hint.strip()  # type: ignore[index]
    text = "\n".join(line for line in lines if not line.startswith("#hint "))
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    except ValueError as error:
        raise ValueError(f"{error}; write {{{{ and }}}} for braces that are no placeholder") from error
    for field in sorted(fields.difference(PLACEHOLDERS)):
        known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise ValueError(f"unknown placeholder {{{field}}}; known are {known}")
    if not fields >= {"question", "options"}:
        raise ValueError("it must contain {question} and {options}")
    return Template(text, hints, not text.endswith(DIRECT_TEMPLATE))  # as `Template.direct` makes it


def prompt_text(
    processor: Any,
    messages: list[dict[str, Any]],
    thinks: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Render the chat up to the completion, placeholders not expanded. thinks: the completion begins with its
    reasoning; otherwise the prompt ends with an empty one, if the template has any. tools: JSON schemas, in
    the template's own words; a template that has none for tools gets a system message (TOOLS_MESSAGE).
    """
    switch: dict[str, Any] = {}
    if not thinks and SWITCH in str(processor.chat_template):
        switch[SWITCH] = False
    if tools and _knows_tools(processor):
        switch["tools"] = list(tools)
    elif tools:
        messages = with_tools(messages, tools)
    text = chat_text(processor, messages, add_generation_prompt=True, **switch)
    return _BEGUN.sub("", text) if thinks else _OPEN.sub(NO_THOUGHT, text)


def with_tools(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a chat whose system message, a new one if it has none, explains the tools."""
    said = {"type": "text", "text": TOOLS_MESSAGE.format("\n".join(json.dumps(tool) for tool in tools))}
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": [said]}, *messages]
    own = messages[0]["content"]
    return [{"role": "system", "content": [*own, {"type": "text", "text": "\n\n"}, said]}, *messages[1:]]


def tools_turn(results: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the results of calls as a user's message, for a model whose template has no tool turns."""
    start, end = ({"type": "text", "text": f"<{slash}tool_response>"} for slash in ("", "/"))
    return {"role": "user", "content": [part for result in results for part in (start, *result, end)]}


def _knows_tools(processor: Any) -> bool:
    return "tool_response" in str(processor.chat_template)


def turn_text(processor: Any, results: Sequence[list[dict[str, Any]]], thinks: bool = True) -> str:
    """Render the tool turn with these results, and the beginning of the policy's next turn. It follows the
    policy's end-of-turn token. Raises ConfigError for a template that rewrites what stands before it.
    """
    if _knows_tools(processor):
        turns = [{"role": "tool", "content": result} for result in results]
    else:
        turns = [tools_turn(results)]
    call = {"type": "function", "function": {"name": "tool", "arguments": {}}}
    asked = {"role": "user", "content": [{"type": "text", "text": "question"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "call"}], "tool_calls": [call]}
    end = processor.tokenizer.convert_ids_to_tokens(end_token_id(processor))
    before = chat_text(processor, [asked, said]).rpartition(end)[0] + end
    whole = prompt_text(processor, [asked, said, *turns], thinks)
    if not whole.startswith(before):
        raise ConfigError("tools: the chat template changes earlier turns when a tool answers")
    return whole.removeprefix(before)


def calls_text(processor: Any, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Render the calls (name, arguments) at the end of a policy's turn, in the form that its family has."""
    said = [{"name": name, "arguments": dict(arguments)} for name, arguments in calls]
    if not _knows_tools(processor):
        return "".join(f"\n<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in said)
    asked = {"role": "user", "content": [{"type": "text", "text": "question"}]}
    turn = {"role": "assistant", "content": [{"type": "text", "text": "before"}]}
    turn["tool_calls"] = [{"type": "function", "function": call} for call in said]
    end = processor.tokenizer.convert_ids_to_tokens(end_token_id(processor))
    return chat_text(processor, [asked, turn]).rpartition(end)[0].partition("before")[2]


def chat_text(
    processor: Any, messages: list[dict[str, Any]], add_generation_prompt: bool = False, **variables: Any
) -> str:
    """Render the chat by the processor's template, placeholders not expanded. variables: of the template."""
    return processor.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        processor_kwargs={"do_sample_frames": False},  # SmolVLM's warns at each call without any
        **variables,
    )


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the tokens that are not text: of chats, visuals, sounds and ends."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def end_token_id(processor: Any) -> int:
    """Return the token that the chat template writes after the assistant's turn, else `<|im_end|>` if the
    tokenizer has it, else EOS. processor: or a tokenizer.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    vocabulary = tokenizer.get_vocab()
    if processor is not tokenizer and processor.chat_template:
        turns = {role: [{"type": "text", "text": f"{role} speaks"}] for role in ("user", "assistant")}
        chat = chat_text(processor, [{"role": role, "content": content} for role, content in turns.items()])
        behind = chat.rpartition("assistant speaks")[2].strip()
        ends = [token for token in special_tokens(tokenizer) if behind.startswith(token)]
        return vocabulary[max(ends, key=len)] if ends else tokenizer.eos_token_id
    return vocabulary.get("<|im_end|>", tokenizer.eos_token_id)
