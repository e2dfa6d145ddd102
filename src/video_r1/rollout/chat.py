"""What is said to an OpenAI-compatible endpoint, and how its answers are read."""

from __future__ import annotations

import base64
import json
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from PIL import Image
from torch import Tensor

from video_r1.data.media import Media
from video_r1.errors import ConfigError
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.requests_http import ServerFailure, ServerRefusal, get, post

logger = logging.getLogger(__name__)

JPEG_QUALITY = 90
ATTEMPTS = 8  # of one request whose failures pass
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts
FramesAs = Literal["images", "video"]


class Completion(NamedTuple):
    """One answer of a model. finish_reason: "stop", "length" (cut off), "content_filter" or another word
    of the endpoint's."""

    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address (…/v1), key, and limits in seconds."""

    url: str
    key: str | None = None
    timeout: float = 600.0
    wait: float = 240.0


def chat_request(
    model: str, question: str, media: Media, frames_as: FramesAs, sampling: SamplingSettings
) -> dict[str, Any]:
    """The body of a request for one completion; `n` and `seed` are the caller's to add.

    frames_as: "images" gives a clip as one image a frame with its time before it, which every endpoint with
    vision understands; "video" as one video of those frames, vLLM's form.
    """
    is_video = media.kind == "video" and frames_as == "video"
    return {
        "model": model,
        "messages": [{"role": "user", "content": chat_content(question, media, frames_as)}],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        **(video_fields(media) if is_video else {}),
    }


def pause_before(attempt: int) -> float:
    """Seconds to wait before attempt 1, 2, …: doubled each time, and not the same for all who wait."""
    return min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def chat_content(question: str, media: Media, frames_as: FramesAs) -> list[dict[str, Any]]:
    """The content of the user's message: the media, then the question's text."""
    text = {"type": "text", "text": question}
    frames = [jpeg(frame) for frame in media.frames]
    if media.kind == "image":
        return [_image(frames[0]), text]
    if frames_as == "video":
        url = f"data:video/jpeg;base64,{','.join(frames)}"
        return [{"type": "video_url", "video_url": {"url": url}}, text]
    parts: list[dict[str, Any]] = [
        {
            "type": "text",
            "text": f"{len(frames)} frames of a video of {media.duration:.1f} seconds, in order:",
        }
    ]
    for time_, frame in zip(media.timestamps.tolist(), frames, strict=True):
        parts += [{"type": "text", "text": f"{time_:.1f} s"}, _image(frame)]
    return [*parts, text]


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
    if message.get("refusal"):
        return Completion(str(message["refusal"]), "content_filter")
    return Completion(content, str(finish_reason or "stop"))


def served_model(endpoint: Endpoint, wanted: str | None) -> tuple[str, bool]:
    """The name of the model to ask for, and whether the endpoint is vLLM. Waits for an endpoint that starts.

    Raises ConfigError: nothing answers within `endpoint.wait`, the key is refused, it serves several models
    and none is named, or not the one that is named. A service without a list of models has to be told one.
    """
    deadline, told = time.monotonic() + endpoint.wait, False
    while True:
        try:
            listed = get(f"{endpoint.url}/models", endpoint.key, timeout=10.0)
            break
        except ServerRefusal as refusal:
            if wanted is not None and refusal.status == 404:
                return wanted, False
            raise ConfigError(
                f"{endpoint.url}: {refusal}; give the address of an OpenAI-compatible endpoint, which mostly "
                "ends in /v1, the model's name with --model, and the key in the environment (--key_variable)"
            ) from refusal
        except ServerFailure as failure:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{endpoint.url}: no endpoint answered within {endpoint.wait:g} s ({failure})"
                ) from failure
            if not told:
                logger.warning("%s: %s; waiting up to %g s for it", endpoint.url, failure, endpoint.wait)
                told = True
            time.sleep(min(1.0, endpoint.wait / 10))
    try:
        entries = {str(entry["id"]): entry.get("owned_by") for entry in listed["data"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{endpoint.url}/models is no list of models: {json.dumps(listed)[:200]}"
        ) from error
    if wanted is None and len(entries) != 1:
        shown = ", ".join(sorted(entries)[:10])
        raise ConfigError(f"{endpoint.url} serves {len(entries)} models; name one with --model: {shown}")
    model = next(iter(entries)) if wanted is None else wanted
    if entries and model not in entries:
        raise ConfigError(f"{endpoint.url} serves {', '.join(sorted(entries)[:10])}, not {model}")
    return model, entries.get(model) == "vllm"


def form_of_frames(
    endpoint: Endpoint, model: str, is_vllm: bool, wanted: Literal["auto", "images", "video"]
) -> FramesAs:
    """How a clip is sent. "auto": as a video where a vLLM server takes the frames' times, else as images.

    Raises ConfigError when "video" is wanted of an endpoint that does not take them.
    """
    if wanted == "images" or (wanted == "auto" and not is_vllm):
        return "images"
    request = {"model": model, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 1}
    fields = {"media_io_kwargs": {"video": {"num_frames": -1}}}
    try:
        post(f"{endpoint.url}/chat/completions", endpoint.key, {**request, **fields}, endpoint.timeout)
        return "video"
    except ServerRefusal as refusal:
        if wanted == "auto":
            return "images"
        raise ConfigError(
            f"{endpoint.url} does not take a video's frames with their times ({refusal}); start vLLM with "
            "--trust-request-mm-kwargs, or set frames_as images"
        ) from refusal
    except ServerFailure as failure:
        raise ConfigError(f"{endpoint.url}: {failure}") from failure


def endpoint_url(address: str) -> str:
    """The address without a slash at its end; a host alone gets the usual `/v1`."""
    address = address.rstrip("/")
    return address if urlsplit(address).path else f"{address}/v1"
