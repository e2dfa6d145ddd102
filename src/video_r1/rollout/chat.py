"""What is said to an OpenAI-compatible endpoint, and how its answers are read."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Literal, NamedTuple

from PIL import Image
from torch import Tensor

from video_r1.data.decoding.media import Media
from video_r1.data.prompts import Prompt
from video_r1.data.templates import SWITCH
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.http_client import ServerFailure

JPEG_QUALITY = 90
FramesAs = Literal["images", "video"]


class Completion(NamedTuple):
    """finish_reason: "stop", "length" (cut off), "content_filter" or another word of the endpoint's."""

    text: str
    finish_reason: str


def chat_request(
    model: str, prompt: Prompt, frames_as: FramesAs, sampling: SamplingSettings, n: int, seed: int
) -> dict[str, Any]:
    """The body of a request for `n` completions; of `sampling`, temperature, top_p and max_tokens count.

    frames_as: "images" gives a clip as one image a frame with its time before it, which every endpoint with
    vision understands; "video" as one video of those frames, vLLM's form. It has one place for a video's
    times in a request, so that several clips go as images. That a completion is not to think is told where
    frames go as vLLM's videos: other endpoints may refuse its field.
    """
    shown = [media for media in prompt.media if len(media.frames)]
    is_video = frames_as == "video" and len(shown) == 1 and shown[0].kind == "video"
    waiting = iter([visual_parts(media, is_video, place, len(shown)) for place, media in enumerate(shown, 1)])
    messages = []
    for turn in prompt.messages:
        parts: list[dict[str, Any]] = []
        for part in turn["content"]:
            parts += [part] if part["type"] == "text" else next(waiting)
        texts = [part["text"] for part in parts if part["type"] == "text"]
        is_text = turn["role"] != "user" and len(texts) == len(parts)  # which all endpoints take as one
        messages.append({"role": turn["role"], "content": "".join(texts) if is_text else parts})
    return {
        "model": model,
        "messages": messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "n": n,
        "seed": seed,
        **(video_fields(shown[0]) if is_video else {}),
        **({} if prompt.thinks or frames_as != "video" else {"chat_template_kwargs": {SWITCH: False}}),
    }


def visual_parts(media: Media, as_video: bool, place: int, count: int) -> list[dict[str, Any]]:
    """What a message shows of one clip or image, which is number `place` of the `count` in its prompt."""
    frames = [jpeg(frame) for frame in media.frames]
    if media.kind == "image":
        return [_image(frames[0])]
    if as_video:
        url = f"data:video/jpeg;base64,{','.join(frames)}"
        return [{"type": "video_url", "video_url": {"url": url}}]
    number = f"Video {place} of {count}: " if count > 1 else ""
    said = f"{number}{len(frames)} frames of a video of {media.duration:.1f} seconds, in order:"
    parts: list[dict[str, Any]] = [{"type": "text", "text": said}]
    for time_, frame in zip(media.timestamps.tolist(), frames, strict=True):
        parts += [{"type": "text", "text": f"{time_:.1f} s"}, _image(frame)]
    return parts


def video_fields(media: Media) -> dict[str, Any]:
    """vLLM's fields for frames that are sampled already: their times, on a clock of milliseconds."""
    times = [round(1000 * seconds) for seconds in media.timestamps.tolist()]
    video = {
        "num_frames": -1,  # all that are sent
        "fps": 1000.0,
        "frames_indices": times,
        "total_num_frames": max(round(1000 * media.duration), len(times)),
        "duration": media.duration,
    }
    return {"media_io_kwargs": {"video": video}}


def jpeg(frame: Tensor) -> str:
    """A frame [3, H, W] uint8 as JPEG, in base64."""
    file = BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=JPEG_QUALITY)
    return base64.b64encode(file.getvalue()).decode()


def _image(data: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def completions_of(reply: Any) -> list[Completion]:
    """The completions in an answer, in their order. A reasoning that stands apart becomes the rationale.

    Raises ServerFailure when the answer is none, or holds a completion that the server broke off.
    """
    try:
        choices = sorted(reply["choices"], key=lambda choice: choice.get("index", 0))
        completions = [_completion(choice["message"], choice.get("finish_reason")) for choice in choices]
    except (KeyError, TypeError, AttributeError) as error:
        raise ServerFailure(f"its answer is no chat completion: {json.dumps(reply)[:200]}") from error
    if not completions:
        raise ServerFailure("its answer has no completions")
    for completion in completions:
        if completion.finish_reason in ("abort", "error"):
            raise ServerFailure(f"a completion ended with {completion.finish_reason!r}")
    return completions


def _completion(message: Mapping[str, Any], finish_reason: str | None) -> Completion:
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str) and reasoning.strip() and "<think>" not in content:
        content = f"<think>{reasoning.strip()}</think>\n{content.strip()}"
    elif "</think>" in content and "<think>" not in content:  # the server's template wrote the first tag
        content = f"<think>{content.lstrip()}"
    if message.get("refusal"):
        return Completion(str(message["refusal"]), "content_filter")
    return Completion(content, str(finish_reason or "stop"))
