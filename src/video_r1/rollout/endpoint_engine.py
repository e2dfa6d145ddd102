"""An OpenAI-compatible endpoint as the engine that samples for an evaluation or a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollout
from video_r1.errors import VideoR1Error
from video_r1.rollout.chat import FramesAs, chat_request, completions_of
from video_r1.rollout.endpoint import ATTEMPTS, ChatClient, Endpoint
from video_r1.rollout.engine import SamplingSettings, prompt_seed, prompt_seeds, wanted_counts
from video_r1.rollout.http_client import ServerFailure, ServerRefusal

SEEDS = 2**31  # endpoints differ in how large a seed they take
UNNAMED_TOKEN = -1


class EndpointEngine:
    """Asks `model` at the endpoint, up to `concurrency` requests at once. frames_as: see `chat_request`."""

    def __init__(
        self, endpoint: Endpoint, model: str, frames_as: FramesAs = "images", concurrency: int = 16
    ) -> None:
        self.endpoint, self.model = endpoint, model
        self.frames_as: FramesAs = frames_as
        self._client = ChatClient(endpoint, concurrency)

    def update_weights(self, model: Any) -> None:
        raise VideoR1Error(f"{self.endpoint.url} serves weights of its own; it cannot sample for training")

    def rest(self) -> None:
        """The endpoint's memory is its own."""

    def close(self) -> None:
        self._client.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSettings,
        counts: Sequence[int] | None = None,
        on_text: Callable[[int, int, str], object] | None = None,
    ) -> list[list[Rollout]]:
        """`sampling.n` completions of each prompt, or `counts[q]` of prompt q; result `[prompts][n]`.

        A completion has as many tokens as the endpoint says, none of them named, and no log-probs (nan).
        on_text: is given each piece of text as it is written, with the numbers of its prompt and completion;
        then a failure is not tried again. Raises VideoR1Error when a request is refused or has failed eight
        times, or the endpoint stays away.
        """
        counts = wanted_counts(prompts, sampling, counts)
        seeds = prompt_seeds(sampling.seed, len(prompts))

        async def answer(place: int) -> tuple[int, list[Rollout]]:
            def request(n: int, drawn: int) -> dict[str, Any]:
                seed = prompt_seed(seeds[place], drawn) % SEEDS
                return chat_request(self.model, prompts[place], self.frames_as, sampling, n, seed)

            try:
                if on_text is None:
                    return place, await self._client.draw(counts[place], request, rollouts_of)
                hear = partial(on_text, place)
                return place, await self._client.draw_aloud(counts[place], request, rollouts_of, hear)
            except ServerRefusal as refusal:
                raise VideoR1Error(f"{self.endpoint.url} refused a request: {refusal}") from refusal
            except ServerFailure as failure:
                if on_text is not None:
                    raise VideoR1Error(f"{self.endpoint.url} failed: {failure}") from failure
                raise VideoR1Error(
                    f"{self.endpoint.url} failed {ATTEMPTS} times at one request: {failure}; started again, "
                    "an evaluation continues"
                ) from failure

        answered = [pair for pairs in self._client.each(range(len(prompts)), answer) for pair in pairs]
        return [rollouts for _, rollouts in sorted(answered, key=lambda pair: pair[0])]


def rollouts_of(reply: Any) -> list[Rollout]:
    """The completions in an answer, each with their mean number of tokens. Raises ServerFailure."""
    completions = completions_of(reply)
    said = reply.get("usage") or {}
    tokens = round((said.get("completion_tokens") or 0) / len(completions))
    return [
        Rollout(
            torch.full((tokens,), UNNAMED_TOKEN),
            torch.full((tokens,), torch.nan),
            completion.text,
            "length" if completion.finish_reason == "length" else "stop",
        )
        for completion in completions
    ]
