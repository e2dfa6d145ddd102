"""Prompts: the only templates, and a Sample's model inputs in one frame order.

A template is plain text with the placeholders `{question}`, `{options}`, `{hint}` and `{subtitles}` (`{{` and
`}}` stand for single braces). A line that holds only `{options}` or `{subtitles}` is left out when the
question has none. A template file may also replace the answer hints, one line a problem type, anywhere:

    {question}
    {options}
    Think first, then answer. {hint}
    #hint multiple choice: Answer with one letter.
    #hint OCR: Answer with the text that you read.

Types without such a line keep the hint of `ANSWER_HINTS`.
"""

import math
import string
import threading
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import Tensor

from video_r1.data.grounding import GROUNDING_HINTS
from video_r1.data.media import Media
from video_r1.data.records import Sample
from video_r1.errors import ConfigError, PromptError
from video_r1.settings.carried import template_text
from video_r1.settings.frames import TEMPORAL_PATCH, Contrast, Order
from video_r1.settings.shared import ProblemType

# Few words on purpose: small models with their own tokenizer read the same text.
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
TOKEN_FEATURES = ("mm_token_type_ids", "token_type_ids")  # features with a value for each token
SUBTITLE_CHARACTERS = 4000  # some 1,000 tokens; what is longer is cut, and says so
# Held while a tokenizer is used: fast ones keep settings (padding, cutting) that a call may have to change.
# A call in another thread that meets this is refused ("Already borrowed"), or gets the other's settings.
_TOKENIZING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question's model inputs in one frame order, or with one contrast (data/contrasts.py).

    input_ids: [P] int64, the chat with its visual placeholders expanded.
    features: what the model's forward takes besides ids and mask, for this prompt alone, by its processor's
        names. Of Qwen models: `pixel_values` [patches, dim] float32 and `image_grid_thw` [1, 3] for an image,
        `pixel_values_videos` and `video_grid_thw` for a video, `second_per_grid_ts` [1] float32 (Qwen2.5-VL),
        `mm_token_type_ids` [P].
    media: the frames in the order in which the model sees them; none for a blind prompt.
    permutation: [T] int64, tile i shows frame permutation[i]; None for the clip's own order.
    messages: the chat, for engines that tokenise themselves.
    contrast: what the permutation is, where there is one.
    """

    input_ids: Tensor
    features: dict[str, Tensor]
    media: Media
    permutation: Tensor | None
    messages: list[dict[str, Any]]
    contrast: Contrast = "shuffled"

    @property
    def order(self) -> Order:
        return "ordered" if self.permutation is None else self.contrast

    @property
    def patches(self) -> Tensor | None:
        """[T/2] int64: temporal patch i shows the clip's patch patches[i]. None where frames are in order, or
        make other pairs than in the clip.
        """
        if self.permutation is None or len(self.permutation) == 0 or len(self.permutation) % TEMPORAL_PATCH:
            return None
        pairs = self.permutation.view(-1, TEMPORAL_PATCH)
        patches = pairs[:, 0] // TEMPORAL_PATCH
        whole = torch.equal(pairs, patches[:, None] * TEMPORAL_PATCH + torch.arange(TEMPORAL_PATCH))
        return patches if whole else None


@dataclass(frozen=True, slots=True)
class Template:
    """The user's text of a question. `text` has the placeholders, `hints` the words for each problem type."""

    text: str
    hints: Mapping[ProblemType, str]

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
        """For the answer alone: without the instruction to think, with the same hints."""
        return Template("{subtitles}\n" * ("{subtitles}" in self.text) + DIRECT_TEMPLATE, self.hints)

    def __str__(self) -> str:
        """The whole template as a file has it."""
        return "\n".join([self.text, *(f"#hint {kind}: {hint}" for kind, hint in self.hints.items())])


def subtitle_text(subtitles: str | None, limit: int = SUBTITLE_CHARACTERS) -> str:
    """A row's subtitles behind a heading, as a prompt has them; "" without any. Of longer ones stay the first
    whole lines that have `limit` characters together, and a line that says how many characters are gone."""
    if not subtitles:
        return ""
    shown = subtitles
    if len(subtitles) > limit:
        shown = subtitles[: limit + 1].rpartition("\n")[0] or subtitles[:limit]
        shown += f"\n({len(subtitles) - len(shown)} more characters of subtitles)"
    return f"Subtitles:\n{shown}\n"


def load_template(path: str | Path | None, subtitles: bool = False) -> Template:
    """A template file, or that of a checkpoint's `video_r1.json`; None: the built-in. Raises ConfigError.

    subtitles: put a line for them first, unless the template says where they go.
    """
    template = Template(DEFAULT_TEMPLATE, ANSWER_HINTS) if path is None else _read_template(path)
    if not subtitles or "{subtitles}" in template.text:
        return template
    return Template("{subtitles}\n" + template.text, template.hints)


def _read_template(path: str | Path) -> Template:
    try:
        return _parsed(template_text(Path(path)).strip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt template {path}: cannot be read ({error})") from error
    except ValueError as error:
        raise ConfigError(f"prompt template {path}: {error}") from error


def _parsed(lines: list[str]) -> Template:
    """Raises ValueError, which says what is wrong."""
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
    return Template(text, hints)


def response_text(sample: Sample) -> str:
    """What SFT teaches: the rationale, then the tagged answer. Raises PromptError without a `process`."""
    if not sample.process:
        raise PromptError(f"question {sample.problem_id!r} has no `process`; SFT needs a rationale")
    return f"{sample.process.strip()}\n{sample.solution.strip()}"


def video_metadata(media: Media) -> dict[str, Any]:
    """What a Hugging Face video processor has to know of frames that are sampled already.

    The clock runs in seconds (`fps` 1), so that a frame's index is its timestamp and the processors' own
    formulas give the real sampling rate (T / duration) and the real timestamps.
    """
    return {
        "total_num_frames": media.duration,
        "fps": 1.0,
        "duration": media.duration,
        "frames_indices": media.timestamps.tolist(),
        "height": media.frames.shape[-2],
        "width": media.frames.shape[-1],
    }


class TextPrompts:
    """Prompts of a model whose processor is elsewhere: the question's text and its frames, no tokens."""

    tokenizer: Any = None

    def __init__(self, template: str | Path | None = None, subtitles: bool = False) -> None:
        self.template = load_template(template, subtitles)

    def with_template(self, template: Template) -> Self:
        other = copy(self)
        other.template = template
        return other

    def question(self, sample: Sample) -> str:
        """The user's text by the template, or the texts of the sample's messages where it has some."""
        if sample.messages:
            return "\n".join(message["content"] for message in sample.messages)
        return self.template.render(sample)

    def _chat(self, sample: Sample, visuals: list[dict[str, str]]) -> list[dict[str, Any]]:
        """The chat: one message by the template, or the sample's own. Visuals begin the first question."""
        text = self.question(sample)
        said = sample.messages or ({"role": "user", "content": text},)
        chat = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in said]
        first = next(turn for turn in chat if turn["role"] == "user")
        first["content"] = [*visuals, *first["content"]]
        return chat

    def build(
        self, sample: Sample, media: Media, permutation: Tensor | None = None, contrast: Contrast = "shuffled"
    ) -> Prompt:
        """The prompt of a question. `permutation` [T]: which frames it shows, by number, in place of all in
        order; all else stays as it is. Without any frame it has no visuals. contrast: what that is called.
        """
        if permutation is not None:
            media = media.reordered(permutation)
        visuals = self._visuals(media) if len(media.frames) else []
        nothing = torch.empty(0, dtype=torch.long)
        return Prompt(nothing, {}, media, permutation, self._chat(sample, visuals), contrast)

    def _visuals(self, media: Media) -> list[dict[str, str]]:
        """How a message names what it shows."""
        return [{"type": media.kind}]


class PromptBuilder(TextPrompts):
    """Turns samples and their frames into model inputs, with the model's own processor and chat template.
    Thread-safe: prompts are made one at a time.

    processor: with a chat template. Frames whose sides may be any multiple of its patches (`frame_multiple`)
        it takes as they are; otherwise it resizes them to a size of its own. One that takes no videos is
        given a clip as several images.
    template: path of a template file; None for the built-in template.
    max_prompt_length: tokens, visual ones included. A longer prompt is an error, it is never cut.
    subtitles: whether the template gets a line for them.
    """

    def __init__(
        self,
        processor: Any,
        template: str | Path | None = None,
        max_prompt_length: int = 16384,
        subtitles: bool = False,
    ) -> None:
        super().__init__(template, subtitles)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_prompt_length = max_prompt_length
        self.end_token_id = end_token_id(processor)
        self.multiple = frame_multiple(processor)
        self.takes_videos = getattr(processor, "video_processor", None) is not None
        self._special_tokens = sorted(special_tokens(self.tokenizer))
        self._settings: dict[str, Any] = {"return_tensors": "pt"}
        if self.multiple is not None:
            self._settings["do_resize"] = False
        self._video_settings = {"do_sample_frames": False}
        if hasattr(getattr(processor, "video_processor", None), "cap_pixels_per_frame"):
            self._video_settings["cap_pixels_per_frame"] = False  # concerns resizing only; unset, it warns

    def question(self, sample: Sample) -> str:
        """Raises PromptError when the record's text holds one of the tokenizer's special tokens."""
        text = super().question(sample)
        self._refuse_special_tokens(text, sample)
        return text

    def build(
        self, sample: Sample, media: Media, permutation: Tensor | None = None, contrast: Contrast = "shuffled"
    ) -> Prompt:
        """Raises PromptError: over the limit, frames that do not fit, no duration, special tokens."""
        plain = super().build(sample, media, permutation, contrast)
        text = chat_text(self.processor, plain.messages, add_generation_prompt=True)
        media = plain.media
        self._check_frames(sample, media)
        with _TOKENIZING:
            if len(media.frames) == 0:
                encoded = self.processor(text=[text], return_tensors="pt")
            elif media.kind == "image" or not self.takes_videos:
                encoded = self.processor(text=[text], images=[list(media.frames)], **self._settings)
            else:
                settings = self._settings | self._video_settings | {"video_metadata": [video_metadata(media)]}
                encoded = self.processor(text=[text], videos=[[media.frames]], **settings)
        features = {k: v for k, v in encoded.items() if isinstance(v, Tensor) and k != "attention_mask"}
        input_ids = features.pop("input_ids")[0]
        features |= {name: features[name][0] for name in TOKEN_FEATURES if name in features}
        if len(input_ids) > self.max_prompt_length:
            raise PromptError(
                f"question {sample.problem_id!r}: its prompt has {len(input_ids)} tokens, "
                f"{self.visual_tokens(input_ids)} of them visual; the limit (max_prompt_length) is "
                f"{self.max_prompt_length}. Take fewer or smaller frames, or raise the limit"
            )
        return replace(plain, input_ids=input_ids, features=features)

    def build_with_response(self, sample: Sample, media: Media, response: str) -> tuple[Prompt, Tensor]:
        """The ordered prompt and the response's token ids [L] int64, the end-of-turn token included.

        Raises PromptError as `build` does, and for an empty response or special tokens in it.
        """
        if not response.strip():
            raise PromptError(f"question {sample.problem_id!r}: its response is empty")
        self._refuse_special_tokens(response, sample)
        with _TOKENIZING:
            ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return self.build(sample, media), torch.tensor([*ids, self.end_token_id])

    def _visuals(self, media: Media) -> list[dict[str, str]]:
        """Frames as images where the processor takes no videos."""
        kinds = [media.kind] if self.takes_videos else ["image"] * len(media.frames)
        return [{"type": kind} for kind in kinds]

    def visual_tokens(self, input_ids: Tensor) -> int:
        """How many of `input_ids` are image or video placeholders."""
        found = [getattr(self.processor, f"{kind}_token_id", None) for kind in ("image", "video")]
        kinds = [number for number in found if number is not None]
        return int(torch.isin(input_ids, torch.tensor(kinds)).sum())

    def _check_frames(self, sample: Sample, media: Media) -> None:
        height, width = media.frames.shape[-2:]
        if self.multiple is not None and (height % self.multiple or width % self.multiple):
            raise PromptError(
                f"question {sample.problem_id!r}: frames of {width} x {height} pixels do not fit the model, "
                f"whose sides are multiples of {self.multiple} (size_multiple of the frame budget)"
            )
        if media.kind == "video" and not media.duration > 0:
            raise PromptError(
                f"question {sample.problem_id!r}: its clip lasts {media.duration} seconds, "
                "so it has no sampling rate"
            )

    def _refuse_special_tokens(self, text: str, sample: Sample) -> None:
        found = [token for token in self._special_tokens if token in text]
        if found:
            raise PromptError(
                f"question {sample.problem_id!r}: its text holds the model's special token {found[0]!r}, "
                "which would break the chat; remove it from the record"
            )


def frame_multiple(processor: Any) -> int | None:
    """Pixels by which both sides of a frame must be divisible: patch size × spatial merge size. None for
    processors that resize every frame to a size of their own, or cut images into parts.
    """
    parts = [getattr(processor, f"{kind}_processor", None) for kind in ("image", "video")]
    multiples = []
    for part in parts:
        patch, merge = (getattr(part, name, None) for name in ("patch_size", "merge_size"))
        if not isinstance(patch, int) or not isinstance(merge, int):
            return None
        multiples.append(patch * merge)
    return math.lcm(*multiples)


def chat_text(processor: Any, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
    """The chat by the processor's template, placeholders not expanded."""
    return processor.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        processor_kwargs={"do_sample_frames": False},  # without any, SmolVLM's warns at each call
    )


def special_tokens(tokenizer: Any) -> set[str]:
    """The tokens that stand for no text: of chats, visuals, sounds and ends."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def end_token_id(processor: Any) -> int:
    """The token that ends the assistant's turn: the special one that the chat template writes behind it, else
    `<|im_end|>` where the tokenizer has it, else EOS. processor: or a tokenizer.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    vocabulary = tokenizer.get_vocab()
    if processor is not tokenizer and processor.chat_template:
        said = {role: [{"type": "text", "text": f"{role} speaks"}] for role in ("user", "assistant")}
        chat = chat_text(processor, [{"role": role, "content": content} for role, content in said.items()])
        behind = chat.rpartition("assistant speaks")[2].strip()
        ends = [token for token in special_tokens(tokenizer) if behind.startswith(token)]
        return vocabulary[max(ends, key=len)] if ends else tokenizer.eos_token_id
    return vocabulary.get("<|im_end|>", tokenizer.eos_token_id)
