"""Prompts: a Sample's model inputs, with its frames in order or with a contrast clip.

A contrast clip is a question's own clip without its frame order, or without frames: a choice of frame numbers
that depends only on their count T. A model that answers correctly with a contrast clip does not need what the
contrast removes; the temporal gap is the accuracy that needs the order.

Shuffled and reversed may act on pairs of frames, the temporal patches of the Qwen vision towers: reversed is
then 6 7 4 5 2 3 0 1. A tower sees one pair at a time, so permuting pairs permutes the features.
"""

import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import torch
from torch import Generator, Tensor

from video_r1.data.decoding.media import Media, Shown, clips_of, reordered
from video_r1.data.manifests.records import Sample
from video_r1.data.sources.media_types import ClipRef
from video_r1.data.templates import (
    Template,
    end_token_id,
    load_template,
    prompt_text,
    special_tokens,
    tools_turn,
    turn_text,
    with_tools,
)
from video_r1.errors import PromptError
from video_r1.settings.frames import LOOK_CONTROLS, TEMPORAL_PATCH, Contrast, ContrastUnit, Order

TOKEN_FEATURES = ("mm_token_type_ids", "token_type_ids")  # features with one value per token
# Fast tokenizers keep settings (padding, truncation) that a call may change: a call in another thread then
# fails ("Already borrowed") or gets the other call's settings.
_TOKENIZING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Prompt:
    """Model inputs of a question in one frame order, or with one contrast.

    input_ids: [P] int64, the chat with its visual placeholders expanded.
    features: inputs of the model's forward besides ids and mask, for this prompt alone, by its processor's
        names. Qwen models: `pixel_values` [patches, dim] float32 and `image_grid_thw` [n, 3] for n images,
        `pixel_values_videos` and `video_grid_thw` for videos, `second_per_grid_ts` [n] float32 (Qwen2.5-VL),
        `mm_token_type_ids` [P].
    media: each clip or image, its frames in the order that the model sees; none in a blind prompt.
    permutation: [T] int64, position i shows frame permutation[i] of the concatenated clips; None for the
        clips' own order.
    messages: the chat, for engines that tokenise themselves.
    contrast: the kind of permutation, or a control of looks (elsewhere, no-look).
    thinks: whether the completion begins with its reasoning (templates.py).
    files: what `media` was read from, for tools that read more of it.
    parts: of an answer that goes on after tool calls: the question's prompt and each tool turn, with the
        index of its first token in `input_ids`. Tokens between them are the policy's; `features` is empty.
    """

    input_ids: Tensor
    features: dict[str, Tensor]
    media: tuple[Media, ...]
    permutation: Tensor | None
    messages: list[dict[str, Any]]
    contrast: Order = "shuffled"
    thinks: bool = True
    files: tuple[ClipRef, ...] = ()
    parts: tuple[tuple[int, "Prompt"], ...] = ()

    @property
    def pieces(self) -> "list[Prompt | Tensor]":
        """Prompts with visuals and the policy's tokens between them, in order; their ids are `input_ids`."""
        pieces: list[Prompt | Tensor] = []
        done = 0
        for first, part in self.parts or ((0, self),):
            pieces += [self.input_ids[done:first], part] if first > done else [part]
            done = first + len(part.input_ids)
        return [*pieces, self.input_ids[done:]] if done < len(self.input_ids) else pieces

    @property
    def order(self) -> Order:
        own = self.permutation is None and self.contrast not in LOOK_CONTROLS
        return "ordered" if own else self.contrast

    @property
    def frames(self) -> int:
        """Number of frames; 0 for a blind prompt."""
        return sum(len(media.frames) for media in self.media)

    @property
    def patches(self) -> Tensor | None:
        """[T/2] int64: temporal patch i shows patch patches[i] of the clips. None for frames in order, or if
        they form other pairs than in the clips.
        """
        if self.permutation is None or len(self.permutation) == 0 or len(self.permutation) % TEMPORAL_PATCH:
            return None
        pairs = self.permutation.view(-1, TEMPORAL_PATCH)
        patches = pairs[:, 0] // TEMPORAL_PATCH
        whole = torch.equal(pairs, patches[:, None] * TEMPORAL_PATCH + torch.arange(TEMPORAL_PATCH))
        return patches if whole else None


NO_RATIONALE = (
    "SFT needs a rationale: video-r1 annotate writes them with a teacher, and --target answer trains on the "
    "answers alone"
)


def response_text(sample: Sample) -> str:
    """Return SFT's target: the rationale, then the tagged answer. Raises PromptError without a rationale."""
    if not sample.process:
        raise PromptError(f"question {sample.problem_id!r} has no `process`; {NO_RATIONALE}")
    return f"{sample.process.strip()}\n{sample.solution.strip()}"


def video_metadata(media: Media) -> dict[str, Any]:
    """Return a Hugging Face video processor's metadata for frames that are already sampled.

    With `fps` 1 a frame's index is its timestamp, and the processors' formulas give the real sampling rate
    (T / duration) and timestamps.
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
    """Prompts for a model whose processor is not here (an endpoint): text and frames, no token ids."""

    processor: Any = None
    tokenizer: Any = None
    takes_videos = True

    def __init__(
        self, template: str | Path | None = None, subtitles: bool = False, toolbox: Any = None
    ) -> None:
        """toolbox: the Toolbox (tools.py) whose tools the prompts offer."""
        self.template = load_template(template, subtitles)
        self.toolbox = toolbox

    def without_tools(self) -> Self:
        """Return the same prompts without an offer of tools."""
        other = copy(self)
        other.toolbox = None
        return other

    def with_template(self, template: Template) -> Self:
        other = copy(self)
        other.template = template
        return other

    def question(self, sample: Sample) -> str:
        """Return the user's text: the rendered template, or the texts of the sample's own messages."""
        if sample.messages:
            return "\n".join(message["content"] for message in sample.messages)
        return self.template.render(sample)

    def _chat(self, sample: Sample, visuals: Sequence[list[dict[str, str]]]) -> list[dict[str, Any]]:
        """Build the chat: one message from the template, or the sample's own messages. Each file's visuals
        replace its mark in the user's text; without marks they precede the first question.
        """
        turns = sample.messages or ({"role": "user", "content": self.question(sample)},)
        waiting, chat = iter(visuals), []
        for turn, (start, *others) in zip(turns, _around_files(sample, turns), strict=True):
            behind = [part for piece in others for part in (*next(waiting), *_text(piece))]
            chat.append({**turn, "content": [*_text(start), *behind] or [{"type": "text", "text": ""}]})
        return chat

    def build(
        self, sample: Sample, media: Shown, permutation: Tensor | None = None, contrast: Order = "shuffled"
    ) -> Prompt:
        """Build a question's prompt. media: one per file. permutation: `Prompt.permutation`; an empty one
        gives no visuals. contrast: its name.
        """
        shown = clips_of(media)
        if len(shown) != len(sample.paths):
            raise ValueError(f"{len(shown)} clips or images for a question about {len(sample.paths)}")
        if permutation is not None:
            shown = reordered(shown, permutation)
        counts = [min(1, len(clip.frames)) if self.takes_videos else len(clip.frames) for clip in shown]
        visuals = [
            [{"type": clip.kind if self.takes_videos else "image"}] * count
            for clip, count in zip(shown, counts, strict=True)
        ]
        nothing = torch.empty(0, dtype=torch.long)
        chat = self._chat(sample, visuals)
        if self.toolbox is not None and self.processor is None:
            chat = with_tools(chat, self.toolbox.schemas)
        return Prompt(nothing, {}, shown, permutation, chat, contrast, self.template.thinks, sample.files)

    def build_turn(self, results: Sequence[Sequence[str | Media]], like: Prompt) -> Prompt:
        """Build the turn in which tools answer, up to the policy's next turn.

        results: of each call, texts and visuals. like: the question's prompt. Raises PromptError for images
        and clips in one turn.
        """
        media = tuple(part for result in results for part in result if isinstance(part, Media))
        if len({clip.kind for clip in media}) > 1:
            raise PromptError("tools returned images and clips in one turn; call them one after the other")
        contents = [[item for part in result for item in self._items(part)] for result in results]
        return self._turn(contents, media, like)

    def _items(self, part: str | Media) -> list[dict[str, str]]:
        if isinstance(part, str):
            return _text(part)
        return [{"type": part.kind}] if self.takes_videos else [{"type": "image"}] * len(part.frames)

    def _turn(self, contents: list[list[dict[str, str]]], media: tuple[Media, ...], like: Prompt) -> Prompt:
        nothing = torch.empty(0, dtype=torch.long)
        order = None if media else nothing
        return Prompt(nothing, {}, media, order, [tools_turn(contents)], like.contrast, like.thinks)


def _around_files(sample: Sample, turns: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Split each turn's text where the sample's files go: at their marks, or else before the first question.

    Only marks in user turns count: templates of newer models drop visuals in other turns. Other numbers of
    marks than of files are plain text for one file, and raise PromptError for several.
    """
    pieces = [
        turn["content"].split(sample.mark) if turn["role"] == "user" else [turn["content"]] for turn in turns
    ]
    marks, count = sum(map(len, pieces)) - len(pieces), len(sample.paths)
    if count > 1 and marks not in (0, count):
        raise PromptError(
            f"question {sample.problem_id!r}: its prompt has the mark {sample.mark} {marks} times for "
            f"{count} files; write it once for each, or nowhere, in the record and the template"
        )
    if marks != count:
        pieces = [[turn["content"]] for turn in turns]
        first = next(place for place, turn in enumerate(turns) if turn["role"] == "user")
        pieces[first][:0] = [""] * count
    return pieces


def _text(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}] if text else []


def _texts(content: Sequence[Mapping[str, str]]) -> list[str]:
    return [part["text"] for part in content if part["type"] == "text"]


def _without_words(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn of a chat with "x" in place of each text that is not blank."""
    return {**turn, "content": [
        {**part, "text": "x"} if part.get("text", "").strip() else part for part in turn["content"]
    ]}  # fmt: skip


class PromptBuilder(TextPrompts):
    """Model inputs of samples, made by the model's processor and chat template. Thread-safe.

    processor: needs a chat template. It resizes frames only if it cannot take any multiple of its patches
        (`frame_multiple`). A processor without videos gets a clip as images.
    template: path of a template file; None for the built-in template.
    max_prompt_length: in tokens, visual ones included. A longer prompt is an error; it is never truncated.
    subtitles: add a line for subtitles to the template.
    toolbox: the Toolbox (tools.py) whose tools the prompts offer.
    """

    def __init__(
        self,
        processor: Any,
        template: str | Path | None = None,
        max_prompt_length: int = 16384,
        subtitles: bool = False,
        toolbox: Any = None,
    ) -> None:
        super().__init__(template, subtitles, toolbox)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_prompt_length = max_prompt_length
        self.end_token_id = end_token_id(processor)
        self.multiple = frame_multiple(processor)
        self.takes_videos = getattr(processor, "video_processor", None) is not None
        visuals = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video")} - {None}
        names = special_tokens(self.tokenizer).union(map(str, visuals))
        self._special_ids = frozenset(self.tokenizer.convert_tokens_to_ids(sorted(names)))
        self._settings: dict[str, Any] = {"return_tensors": "pt"}
        if self.multiple is not None:
            self._settings["do_resize"] = False
        self._video_settings = {"do_sample_frames": False}
        if hasattr(getattr(processor, "video_processor", None), "cap_pixels_per_frame"):
            self._video_settings["cap_pixels_per_frame"] = False  # for resizing only; warns if unset

    def without_tools(self) -> Self:
        """Return the same prompts without an offer of tools, longer by what tools may return."""
        other = super().without_tools()
        other.max_prompt_length += self.toolbox.settings.max_tool_tokens if self.toolbox else 0
        return other

    def build(
        self, sample: Sample, media: Shown, permutation: Tensor | None = None, contrast: Order = "shuffled"
    ) -> Prompt:
        """Build a question's prompt. Raises PromptError if it is too long or does not fit the model, or if
        its texts add special tokens to the chat.
        """
        plain = super().build(sample, media, permutation, contrast)
        tools = self.toolbox.schemas if self.toolbox else ()
        text, other = (
            prompt_text(self.processor, chat, plain.thinks, tools)
            for chat in (plain.messages, [_without_words(turn) for turn in plain.messages])
        )
        said = "\n".join("".join(_texts(turn["content"])) for turn in plain.messages)
        self._refuse_special_tokens(
            sample, said + json.dumps(tools, ensure_ascii=False)
        )  # also without visuals
        self._refuse_special_tokens(sample, text, other)
        for shown in plain.media:
            self._check_frames(sample, shown)
        try:
            input_ids, features = self._encoded(text, plain.media)
        except ValueError as error:
            lengths = {len(shown.frames) for shown in plain.media}
            if sample.data_type != "video" or len(lengths) == 1:
                raise
            counts = " and ".join(str(len(shown.frames)) for shown in plain.media)
            raise PromptError(
                f"question {sample.problem_id!r}: the model's processor does not take clips of "
                f"{counts} frames together; give all clips as many (min_frames and max_frames)"
            ) from error
        if len(input_ids) > self.max_prompt_length:
            count = len(plain.media)
            of_several = f" (of {count} {sample.data_type}s)" if count > 1 else ""
            raise PromptError(
                f"question {sample.problem_id!r}: its prompt has {len(input_ids)} tokens, "
                f"{self.visual_tokens(input_ids)} of them visual{of_several}; the limit (max_prompt_length) "
                f"is {self.max_prompt_length}. Take fewer or smaller frames, or raise the limit"
            )
        return replace(plain, input_ids=input_ids, features=features)

    def _encoded(self, text: str, media: Sequence[Media]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the token ids [P] of a rendered chat, placeholders expanded, and the other inputs."""
        start = self.tokenizer.bos_token
        # If the template writes the BOS token, the tokenizer must not add a second one.
        common = {"add_special_tokens": False} if start and text.startswith(start) else {}
        shown = [clip for clip in media if len(clip.frames)]
        with _TOKENIZING:
            if not shown:
                encoded = self.processor(text=[text], return_tensors="pt", **common)
            elif shown[0].kind == "image" or not self.takes_videos:
                images = [frame for clip in shown for frame in clip.frames]
                encoded = self.processor(text=[text], images=[images], **self._settings, **common)
            else:
                metadata = {"video_metadata": [video_metadata(clip) for clip in shown]}
                settings = self._settings | self._video_settings | metadata | common
                encoded = self.processor(text=[text], videos=[[clip.frames for clip in shown]], **settings)
        features = {k: v for k, v in encoded.items() if isinstance(v, Tensor) and k != "attention_mask"}
        input_ids = features.pop("input_ids")[0]
        return input_ids, features | {n: features[n][0] for n in TOKEN_FEATURES if n in features}

    def _turn(self, contents: list[list[dict[str, str]]], media: tuple[Media, ...], like: Prompt) -> Prompt:
        """Build what follows the policy's end-of-turn token. Raises PromptError for special tokens."""
        if self._added_token("".join(text for content in contents for text in _texts(content))):
            raise PromptError("a tool's text holds a special token of the model")
        try:
            input_ids, features = self._encoded(turn_text(self.processor, contents, like.thinks), media)
        except ValueError as error:  # clips of several lengths, for some families
            raise PromptError(f"the model's processor does not take these results: {error}") from error
        return replace(super()._turn(contents, media, like), input_ids=input_ids, features=features)

    def build_with_response(self, sample: Sample, media: Shown, response: str) -> tuple[Prompt, Tensor]:
        """Build the ordered prompt, and the response's token ids (`turn_ids`). Raises PromptError."""
        if not response.strip():
            raise PromptError(f"question {sample.problem_id!r}: its response is empty")
        return self.build(sample, media), self.turn_ids(sample, response)

    def turn_ids(self, sample: Sample, text: str) -> Tensor:
        """Return the token ids [L] int64 of a turn of the assistant, with the end-of-turn token. Raises
        PromptError.
        """
        self._refuse_special_tokens(sample, text)
        with _TOKENIZING:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, self.end_token_id])

    def visual_tokens(self, input_ids: Tensor) -> int:
        """Count the image and video placeholders in `input_ids`."""
        kinds = [getattr(self.processor, f"{kind}_token_id", None) for kind in ("image", "video")]
        return sum(int((input_ids == kind).sum()) for kind in {*kinds} - {None})

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

    def _added_token(self, text: str, plain: str = "") -> str | None:
        """Return a special token of `text` that `plain`, the same chat with other words, does not have."""
        with _TOKENIZING:
            both = self.tokenizer([text, plain], add_special_tokens=False)["input_ids"]
        own, wanted = ([number for number in ids if number in self._special_ids] for ids in both)
        if own == wanted:
            return None
        return self.tokenizer.convert_ids_to_tokens([*(Counter(own) - Counter(wanted)), *wanted][0])

    def _refuse_special_tokens(self, sample: Sample, text: str, plain: str = "") -> None:
        if (token := self._added_token(text, plain)) is not None:
            raise PromptError(
                f"question {sample.problem_id!r}: its text holds the model's special token {token!r}, "
                "which would break the chat; remove it from the record"
            )


def frame_multiple(processor: Any) -> int | None:
    """Return the divisor of both sides of a frame, in pixels: patch size × spatial merge size. None for
    processors that resize every frame to their own size, or cut images into parts.
    """
    parts = [getattr(processor, f"{kind}_processor", None) for kind in ("image", "video")]
    multiples = []
    for part in parts:
        patch, merge = (getattr(part, name, None) for name in ("patch_size", "merge_size"))
        if not isinstance(patch, int) or not isinstance(merge, int):
            return None
        multiples.append(patch * merge)
    return math.lcm(*multiples)


# --- contrasts ------------------------------------------------------------------------------------


def shuffled_order(frames: int, generator: Generator) -> Tensor:
    """Draw a permutation [T] int64 uniformly from all but the identity. Raise ValueError for T < 2."""
    if frames < 2:
        raise ValueError(f"{frames} frame has no order to shuffle")
    identity = torch.arange(frames)
    while torch.equal(permutation := torch.randperm(frames, generator=generator), identity):
        pass
    return permutation


def _dropped(frames: int, generator: Generator) -> Tensor:
    """Draw half of the frames, in their order; an even number, since pairs make temporal patches."""
    kept = frames // 2 // TEMPORAL_PATCH * TEMPORAL_PATCH
    return torch.randperm(frames, generator=generator)[:kept].sort().values


_CONTRASTS: dict[Contrast, Callable[[int, Generator], Tensor]] = {  # of a clip 0 1 2 3 4 5 6 7
    "shuffled": shuffled_order,  # 3 1 0 2 7 5 4 6: no order (T-GRPO, arXiv 2503.21776)
    # 7 6 5 4 3 2 1 0: no arrow of time (ArrowRL, arXiv 2506.03340)
    "reversed": lambda frames, generator: torch.arange(frames).flip(0),
    # 5 5 5 5 5 5 5 5: no change
    "frozen": lambda frames, generator: torch.randint(frames, (1,), generator=generator).repeat(frames),
    # 4 4: one frame, as often as a temporal patch needs it
    "single": lambda frames, generator: torch.full((TEMPORAL_PATCH,), frames // 2),
    "dropped": _dropped,  # 1 2 5 6: fewer moments (TaRO, arXiv 2606.09248)
    "blind": lambda frames, generator: torch.empty(0, dtype=torch.long),  # no visuals
}


def contrast_order(
    contrast: Contrast, clips: Sequence[int], generator: Generator, unit: ContrastUnit = "frame"
) -> Tensor | None:
    """Return [T'] int64, the frame numbers that the contrast shows, counted through all clips.

    clips: frames per clip. unit: what shuffled and reversed permute. A clip that is too short for the
    contrast keeps its order; None if all are.
    """
    by_patch = unit == "patch" and contrast in ("shuffled", "reversed")
    fewest = 2 * TEMPORAL_PATCH if by_patch or contrast == "dropped" else 2
    if all(frames < fewest for frames in clips):
        return None
    orders = []
    for first, frames in zip(accumulate(clips, initial=0), clips, strict=False):
        order = torch.arange(first, first + frames)
        if frames >= fewest:
            units = order.split(TEMPORAL_PATCH if by_patch else 1)
            order = torch.cat([order[:0], *(units[i] for i in _CONTRASTS[contrast](len(units), generator))])
        orders.append(order)
    return torch.cat(orders)


def contrast_prompt(
    sample: Sample,
    media: Shown,
    builder: TextPrompts,
    contrast: Contrast,
    generator: Generator,
    unit: ContrastUnit = "frame",
) -> Prompt | None:
    """Build the prompt with contrast clips; None for too short clips, images and text. Raises PromptError."""
    shown = contrast_order(contrast, [len(clip.frames) for clip in clips_of(media)], generator, unit)
    return None if shown is None else builder.build(sample, media, shown, contrast)


def blind_prompt(sample: Sample, media: Shown, builder: TextPrompts) -> Prompt:
    """Build the question's prompt without any visuals. Raises PromptError."""
    return builder.build(sample, media, torch.empty(0, dtype=torch.long), "blind")
