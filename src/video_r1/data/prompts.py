"""Prompts: a Sample's model inputs in one frame order, its text by a template (templates.py)."""

import math
import threading
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from video_r1.data.decoding.media import Media, Shown, clips_of, reordered
from video_r1.data.manifests.records import Sample
from video_r1.data.templates import Template, end_token_id, load_template, prompt_text, special_tokens
from video_r1.errors import PromptError
from video_r1.settings.frames import TEMPORAL_PATCH, Contrast, Order

TOKEN_FEATURES = ("mm_token_type_ids", "token_type_ids")  # features with a value for each token
# Held while a tokenizer is used: fast ones keep settings (padding, cutting) that a call may have to change.
# A call in another thread that meets this is refused ("Already borrowed"), or gets the other's settings.
_TOKENIZING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question's model inputs in one frame order, or with one contrast (data/contrasts.py).

    input_ids: [P] int64, the chat with its visual placeholders expanded.
    features: what the model's forward takes besides ids and mask, for this prompt alone, by its processor's
        names. Of Qwen models: `pixel_values` [patches, dim] float32 and `image_grid_thw` [n, 3] for n images,
        `pixel_values_videos` and `video_grid_thw` for videos, `second_per_grid_ts` [n] float32 (Qwen2.5-VL),
        `mm_token_type_ids` [P].
    media: each clip or image, its frames in the order in which the model sees them; none in a blind prompt.
    permutation: [T] int64, tile i shows frame permutation[i] of all clips' frames one after the other; None
        for the clips' own order.
    messages: the chat, for engines that tokenise themselves.
    contrast: what the permutation is, where there is one.
    thinks: whether the completion begins with its reasoning (templates.py).
    """

    input_ids: Tensor
    features: dict[str, Tensor]
    media: tuple[Media, ...]
    permutation: Tensor | None
    messages: list[dict[str, Any]]
    contrast: Contrast = "shuffled"
    thinks: bool = True

    @property
    def order(self) -> Order:
        return "ordered" if self.permutation is None else self.contrast

    @property
    def frames(self) -> int:
        """How many it shows; 0 of a blind prompt."""
        return sum(len(media.frames) for media in self.media)

    @property
    def patches(self) -> Tensor | None:
        """[T/2] int64: temporal patch i shows patch patches[i] of the clips'. None where frames are in order,
        or make other pairs than in a clip.
        """
        if self.permutation is None or len(self.permutation) == 0 or len(self.permutation) % TEMPORAL_PATCH:
            return None
        pairs = self.permutation.view(-1, TEMPORAL_PATCH)
        patches = pairs[:, 0] // TEMPORAL_PATCH
        whole = torch.equal(pairs, patches[:, None] * TEMPORAL_PATCH + torch.arange(TEMPORAL_PATCH))
        return patches if whole else None


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

    def _chat(self, sample: Sample, visuals: Sequence[list[dict[str, str]]]) -> list[dict[str, Any]]:
        """The chat: one message by the template, or the sample's own. The visuals of each file stand at its
        mark in the user's text, without marks before the first question.
        """
        said = turns_of(sample, self.question(sample))
        pieces = between_marks(sample, said)
        if pieces is None:
            first = next(place for place, turn in enumerate(said) if turn["role"] == "user")
            before = [""] * len(visuals)
            pieces = [[*before * (place == first), turn["content"]] for place, turn in enumerate(said)]
        waiting, chat = iter(visuals), []
        for turn, (start, *others) in zip(said, pieces, strict=True):
            behind = [part for piece in others for part in (*next(waiting), *_parts(piece))]
            chat.append({**turn, "content": [*_parts(start), *behind] or [{"type": "text", "text": ""}]})
        return chat

    def build(
        self, sample: Sample, media: Shown, permutation: Tensor | None = None, contrast: Contrast = "shuffled"
    ) -> Prompt:
        """The prompt of a question. media: of each of its files. `permutation` [T]: which frames it shows, by
        number, in place of all in order (`Prompt.permutation`); all else stays as it is. Without any frame it
        has no visuals. contrast: what that is called.
        """
        shown = clips_of(media)
        if len(shown) != len(sample.paths):
            raise ValueError(f"{len(shown)} clips or images for a question about {len(sample.paths)}")
        if permutation is not None:
            shown = reordered(shown, permutation)
        visuals = [self._visuals(one) if len(one.frames) else [] for one in shown]
        nothing = torch.empty(0, dtype=torch.long)
        chat = self._chat(sample, visuals)
        return Prompt(nothing, {}, shown, permutation, chat, contrast, self.template.thinks)

    def _visuals(self, media: Media) -> list[dict[str, str]]:
        """How a message names what it shows."""
        return [{"type": media.kind}]


def turns_of(sample: Sample, text: str) -> Sequence[Mapping[str, str]]:
    """The messages of a sample, or its text as the only one."""
    return sample.messages or ({"role": "user", "content": text},)


def between_marks(sample: Sample, said: Sequence[Mapping[str, str]]) -> list[list[str]] | None:
    """Each turn's text in pieces, between which the sample's files go; None where no marks say so. Only marks
    in the user's turns count: templates of newer models show nothing in others. Another number of them is
    plain text of a question about one file; of one about several it raises PromptError.
    """
    pieces = [
        turn["content"].split(sample.mark) if turn["role"] == "user" else [turn["content"]] for turn in said
    ]
    marks, count = sum(map(len, pieces)) - len(pieces), len(sample.paths)
    if count > 1 and marks not in (0, count):
        raise PromptError(
            f"question {sample.problem_id!r}: its prompt has the mark {sample.mark} {marks} times for "
            f"{count} files; write it once for each, or nowhere, in the record and the template"
        )
    return pieces if marks == count else None


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}] if text else []


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
        pieces = between_marks(sample, turns_of(sample, text)) or [[text]]
        self._refuse_special_tokens("\n".join(chain.from_iterable(pieces)), sample)
        return text

    def build(
        self, sample: Sample, media: Shown, permutation: Tensor | None = None, contrast: Contrast = "shuffled"
    ) -> Prompt:
        """Raises PromptError: over the limit, frames that do not fit, no duration, special tokens."""
        plain = super().build(sample, media, permutation, contrast)
        text = prompt_text(self.processor, plain.messages, plain.thinks)
        for shown in plain.media:
            self._check_frames(sample, shown)
        start = self.tokenizer.bos_token
        # A template that writes the token of the start has it once: the tokenizer would add another one
        common = {"add_special_tokens": False} if start and text.startswith(start) else {}
        with _TOKENIZING:
            if plain.frames == 0:
                encoded = self.processor(text=[text], return_tensors="pt", **common)
            elif plain.media[0].kind == "image" or not self.takes_videos:
                images = [frame for shown in plain.media for frame in shown.frames]
                encoded = self.processor(text=[text], images=[images], **self._settings, **common)
            else:
                metadata = {"video_metadata": [video_metadata(shown) for shown in plain.media]}
                settings = self._settings | self._video_settings | metadata | common
                videos = [shown.frames for shown in plain.media]
                try:
                    encoded = self.processor(text=[text], videos=[videos], **settings)
                except ValueError as error:
                    if len({len(frames) for frames in videos}) == 1:
                        raise
                    counts = " and ".join(str(len(frames)) for frames in videos)
                    raise PromptError(
                        f"question {sample.problem_id!r}: the model's processor does not take clips of "
                        f"{counts} frames together; give all clips as many (min_frames and max_frames)"
                    ) from error
        features = {k: v for k, v in encoded.items() if isinstance(v, Tensor) and k != "attention_mask"}
        input_ids = features.pop("input_ids")[0]
        features |= {name: features[name][0] for name in TOKEN_FEATURES if name in features}
        if len(input_ids) > self.max_prompt_length:
            count = len(plain.media)
            of_several = f" (of {count} {sample.data_type}s)" if count > 1 else ""
            raise PromptError(
                f"question {sample.problem_id!r}: its prompt has {len(input_ids)} tokens, "
                f"{self.visual_tokens(input_ids)} of them visual{of_several}; the limit (max_prompt_length) "
                f"is {self.max_prompt_length}. Take fewer or smaller frames, or raise the limit"
            )
        return replace(plain, input_ids=input_ids, features=features)

    def build_with_response(self, sample: Sample, media: Shown, response: str) -> tuple[Prompt, Tensor]:
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
