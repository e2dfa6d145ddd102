"""Rollouts from an OpenAI-compatible endpoint, for an evaluation, a question, or a teacher that calls tools.

Such an endpoint has its own processor: it gets the question's text and the frames, and returns text without
token ids or log-probs, so nothing can be trained on its rollouts.
"""

import asyncio
import base64
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from video_r1.chat_client import (
    ATTEMPTS,
    MOST_TOKENS,
    ChatClient,
    Endpoint,
    FramesAs,
    ServerFailure,
    ServerRefusal,
    completions_of,
    event_loop,
    number,
    shape_of,
)
from video_r1.data.decoding.media import Media
from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollout
from video_r1.data.templates import SWITCH
from video_r1.errors import VideoR1Error
from video_r1.rollout.engine import (
    Asking,
    ContinuingEngine,
    SamplingSettings,
    Then,
    prompt_seed,
    prompt_seeds,
)

SEEDS = 2**31  # endpoints differ in how large a seed they take
UNNAMED_TOKEN = -1
JPEG_QUALITY = 90


class EndpointEngine(ContinuingEngine):
    """Samples from `model` at the endpoint, by up to `concurrency` requests at once.

    frames_as: see `chat_request`. fields: further ones of each request. Thread-safe.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        frames_as: FramesAs = "images",
        concurrency: int = 16,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        self.endpoint, self.fields = endpoint, fields or {}
        self.model = self.served_model = model
        self.frames_as: FramesAs = frames_as
        self._client = ChatClient(endpoint, concurrency)

    def update_weights(self, model: Any) -> None:
        raise VideoR1Error(f"{self.endpoint.url} serves its own weights; it cannot sample for training")

    def close(self) -> None:
        self._client.close()

    def follow(self, asked: Asking, then: Then) -> None:
        """Sample as `ContinuingEngine.follow` says.

        A completion has as many tokens as the endpoint counts, with unknown ids (-1) and log-probs (nan).
        Raises VideoR1Error when a request is refused or fails eight times, or the endpoint stays away.
        """
        prompts, sampling, counts = asked
        seeds = prompt_seeds(sampling.seed, len(prompts))

        async def answer(index: int) -> None:
            own = replace(sampling, seed=(seeds[index],))
            try:
                await self.converse(prompts[index], own, counts[index], partial(then, index))
            except ServerRefusal as refusal:
                raise VideoR1Error(f"{self.endpoint.url} refused a request: {refusal}") from refusal
            except ServerFailure as failure:
                raise VideoR1Error(
                    f"{self.endpoint.url} failed {ATTEMPTS} times at one request: {failure}; started again, "
                    "an evaluation continues"
                ) from failure

        for _ in self._client.each(range(len(prompts)), answer):
            pass

    async def converse(
        self, prompt: Prompt, sampling: SamplingSettings, n: int, then: Any, threads: Executor | None = None
    ) -> None:
        """Sample one prompt from the event loop, and go on with completion g as then(g, rollout) says, which
        is called in `threads`. Raises as `ChatClient.draw`.
        """

        async def answer(prompt: Prompt, sampling: SamplingSettings, n: int) -> list[Rollout]:
            (seed,) = prompt_seeds(sampling.seed, 1)

            def request(missing: int, drawn: int) -> dict[str, Any]:
                own = prompt_seed(seed, drawn) % SEEDS
                body = chat_request(self.model, prompt, self.frames_as, sampling, missing, own)
                return {**body, **self.fields}

            return await self._client.draw(n, request, rollouts_of)

        async def go_on(number: int, new: Rollout) -> None:
            while turn := await event_loop().run_in_executor(threads, then, number, new):
                (new,) = await answer(turn[0], turn[1], 1)

        first = enumerate(await answer(prompt, sampling, n))
        await asyncio.gather(*(go_on(number, new) for number, new in first))


def rollouts_of(reply: Any) -> list[Rollout]:
    """Return the completions in an answer, each with their mean number of tokens. Raises ServerFailure."""
    completions = completions_of(reply)
    with shape_of(reply, "chat completion"):
        counted = (reply.get("usage") or {}).get("completion_tokens") or 0
        tokens = round(number(counted / len(completions), 0, MOST_TOKENS))
    return [
        Rollout(
            torch.full((tokens,), UNNAMED_TOKEN),
            torch.full((tokens,), torch.nan),
            completion.text,
            "length" if completion.finish_reason == "length" else "stop",
        )
        for completion in completions
    ]


# ---- Requests


def chat_request(
    model: str, prompt: Prompt, frames_as: FramesAs, sampling: SamplingSettings, n: int, seed: int
) -> dict[str, Any]:
    """Build a request for `n` completions; of `sampling`, temperature, top_p and max_tokens count.

    frames_as: "images" sends a clip as one image a frame, each after its time, which every endpoint with
    vision understands; "video" sends one video, vLLM's form, which has the times of one clip a request:
    several clips are sent as images. Only "video" switches thinking off: other endpoints may refuse that.
    """
    shown = [media for media in prompt.media if len(media.frames)]
    is_video = frames_as == "video" and len(shown) == 1 and shown[0].kind == "video"
    visuals = (visual_parts(each, is_video, number, len(shown)) for number, each in enumerate(shown, 1))
    messages = []
    for turn in prompt.messages:
        parts: list[dict[str, Any]] = []
        for part in turn["content"]:
            parts += [part] if part["type"] == "text" else next(visuals)
        texts = [part["text"] for part in parts if part["type"] == "text"]
        is_text = turn["role"] != "user" and len(texts) == len(parts)  # all endpoints take plain text
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


def visual_parts(media: Media, as_video: bool, number: int, count: int) -> list[dict[str, Any]]:
    """Return the message parts of a clip or image, which is `number` of `count` in its prompt."""
    frames = [jpeg(frame) for frame in media.frames]
    if media.kind == "image":
        return [_image(frames[0])]
    if as_video:
        url = f"data:video/jpeg;base64,{','.join(frames)}"
        return [{"type": "video_url", "video_url": {"url": url}}]
    prefix = f"Video {number} of {count}: " if count > 1 else ""
    said = f"{prefix}{len(frames)} frames of a video of {media.duration:.1f} seconds, in order:"
    parts: list[dict[str, Any]] = [{"type": "text", "text": said}]
    for time_, frame in zip(media.timestamps.tolist(), frames, strict=True):
        parts += [{"type": "text", "text": f"{time_:.1f} s"}, _image(frame)]
    return parts


def video_fields(media: Media) -> dict[str, Any]:
    """Return vLLM's fields for frames that are already sampled: their times, in milliseconds."""
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
    """Encode a frame [3, H, W] uint8 as JPEG, in base64."""
    file = BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=JPEG_QUALITY)
    return base64.b64encode(file.getvalue()).decode()


def _image(data: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
