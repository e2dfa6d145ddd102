"""Completions from any OpenAI-compatible endpoint (`/chat/completions`), for evaluation and questions.

Such an endpoint has its own processor: it gets the question's text and the frames, and gives text. What it
sampled and how likely it was stays its own, so nothing can be trained on it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from video_r1.data.media import Media
from video_r1.data.prompts import Prompt, PromptBuilder, load_template
from video_r1.data.records import Sample
from video_r1.data.rollouts import Rollout
from video_r1.errors import VideoR1Error
from video_r1.rollout.chat import ATTEMPTS, Endpoint, FramesAs, chat_request, completions_of, pause_before
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.requests_http import ServerFailure, ServerRefusal, post
from video_r1.rollout.sampling import prompt_seed, prompt_seeds

SEEDS = 2**31  # endpoints differ in how large a seed they take
UNNAMED_TOKEN = -1


class TextPrompts(PromptBuilder):
    """Prompts of a model whose processor is elsewhere: the question's text and its frames, no tokens."""

    def __init__(self, template: str | Path | None = None) -> None:
        self.template = load_template(template)
        self.tokenizer = None

    def question(self, sample: Sample) -> str:
        return self.template.render(sample)

    def build(self, sample: Sample, media: Media, permutation: Tensor | None = None) -> Prompt:
        if permutation is not None:
            media = media.reordered(permutation)
        content = [{"type": media.kind}, {"type": "text", "text": self.question(sample)}]
        nothing = torch.empty(0, dtype=torch.long)
        return Prompt(nothing, {}, media, permutation, [{"role": "user", "content": content}])


class EndpointEngine:
    """Asks `model` at the endpoint, with up to `concurrency` requests at once.

    frames_as: see `chat_request`. Failures that pass (no connection, 5xx, 429, time-outs, unusable answers)
    are tried again, with growing pauses or after the pause that the endpoint asks for.
    """

    def __init__(
        self, endpoint: Endpoint, model: str, frames_as: FramesAs = "images", concurrency: int = 16
    ) -> None:
        self.endpoint, self.model, self.concurrency = endpoint, model, concurrency
        self.frames_as: FramesAs = frames_as

    def update_weights(self, model: Any) -> None:
        raise VideoR1Error(f"{self.endpoint.url} serves weights of its own; it cannot sample for training")

    def close(self) -> None:
        """Nothing is held."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, counts: Sequence[int] | None = None
    ) -> list[list[Rollout]]:
        """`sampling.n` completions of each prompt, or `counts[q]` of prompt q; result [prompts][n].

        A completion has as many tokens as the endpoint says, none of them named, and no log-probs (nan).
        Raises VideoR1Error when a request is refused or has failed eight times.
        """
        counts = [sampling.n] * len(prompts) if counts is None else list(counts)
        seeds = prompt_seeds(sampling.seed, len(prompts))
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint") as pool:
            asked = zip(prompts, counts, seeds, strict=True)
            futures = [pool.submit(self._completions, prompt, sampling, *rest) for prompt, *rest in asked]
            try:
                return [future.result() for future in futures]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _completions(
        self, prompt: Prompt, sampling: SamplingSettings, count: int, seed: int
    ) -> list[Rollout]:
        """With as many requests as it takes: some endpoints give one completion at a time."""
        rollouts: list[Rollout] = []
        while len(rollouts) < count:
            missing = count - len(rollouts)
            fields = {"n": missing, "seed": prompt_seed(seed, len(rollouts)) % SEEDS}
            rollouts += self._ask(self._request(prompt, sampling) | fields)[:missing]
        return rollouts

    def _request(self, prompt: Prompt, sampling: SamplingSettings) -> dict[str, Any]:
        parts = prompt.messages[0]["content"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        return chat_request(self.model, text, prompt.media, self.frames_as, sampling)

    def _ask(self, request: dict[str, Any]) -> list[Rollout]:
        """One request, tried again while its failures pass."""
        endpoint = self.endpoint
        for attempt in range(ATTEMPTS):
            try:
                reply = post(f"{endpoint.url}/chat/completions", endpoint.key, request, endpoint.timeout)
                completions = completions_of(reply)
                break
            except ServerRefusal as refusal:
                raise VideoR1Error(f"{endpoint.url} refused a request: {refusal}") from refusal
            except ServerFailure as failure:
                if attempt == ATTEMPTS - 1:
                    raise VideoR1Error(
                        f"{endpoint.url} failed {ATTEMPTS} times at one request: {failure}; started again, "
                        "an evaluation continues"
                    ) from failure
                asked = failure.retry_after
                time.sleep(pause_before(attempt + 1) if asked is None else asked)
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
